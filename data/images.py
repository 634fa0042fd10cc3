"""Encoded images to pixels: upright, eight bits deep, over white, in the size and crop that a run needs.

JPEGs are decoded here by libjpeg-turbo (simplejpeg), several times as fast as by Pillow, and scaled meanwhile, which no
loader of torchvision does. Pillow decodes the other formats.
"""

import io
import math
import re
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from data.arrays import MAGIC, array, array_shape, is_array
from data.errors import DataError
from data.tiffs import is_stack

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by channels; arrays have any number of channels
MAX_CHANNELS = 1024
COLOURS = {1: "grey", 3: "colour", 4: "colour and alpha"}  # what channels are, by their number
STRIP = 256  # rows that are blended with white at once
JPEG, EXIF = b"\xff\xd8", b"\xff\xe1"  # a JPEG's first bytes, and the first bytes of its Exif segment
SCAN, END = b"\xff\xda", b"\xff\xd9"  # a JPEG's marks of a scan and of its end
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # a segment with a length, or END; never within a scan's data
MAX_SEGMENTS = 2**16  # of a JPEG
SEGMENTS = frozenset(bytes([0xFF, kind]) for kind in (*range(0xE0, 0xF0), 0xFE))  # APP0 to 15, COM: before the image
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes without colour
UNKNOWN = f"it is no image of a known kind ({', '.join(FORMATS)}), or damaged"
ORIENTATION, UPRIGHT = 0x0112, 1  # Exif's tag, and its value for an image that needs no turn
Image.MAX_IMAGE_PIXELS = None  # Limits take its place


class ChannelsError(ValueError):
    """An image has other channels than the run's, whose setting may be what is wrong."""


class Limits(NamedTuple):
    """How much an encoded image may hold; one with more is refused before it is decoded."""

    pixels: int = 89_478_485  # by default Pillow's limit: a quarter of a gigabyte in colour
    bytes: int = 2**28  # encoded
    scans: int = 50  # of a JPEG, each of which covers all pixels; encoders write a dozen


LIMITS = Limits()
Size = int | tuple[int, int]  # of square images, or height and width, in pixels


class Format(NamedTuple):
    """What images are read as."""

    size: Size
    channels: int  # 1, 3 or 4, or the number that all images have as arrays
    bits: int = 8  # of a channel, 8 or 16


class View(NamedTuple):
    """A crop of an image."""

    area: float = 0.0  # share of the image that is kept, in (0, 1]; 0: the largest centred part of the size's shape
    log_ratio: float = 0.0  # logarithm of how much wider than the size's shape the crop is
    x: float = 0.5  # where the crop lies, from 0 (left) to 1 (right)
    y: float = 0.5  # from 0 (top) to 1 (bottom)
    flip: bool = False  # mirror it
    unscaled: bool = False  # take as many pixels as the size has, at x and y; smaller images are enlarged to it


CENTRE_CROP = View()


def sides(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else size


def one_size(size: Size) -> Size:
    """Return a size of squares as one number, so that it is always written alike."""
    return size if isinstance(size, int) or size[0] != size[1] else size[0]


def channels_in_words(channels: int) -> str:
    return COLOURS.get(channels, f"{channels} channels")


def plain(size: Size) -> int | list[int]:
    """Return a size as JSON has it."""
    return size if isinstance(size, int) else [*size]


def decode(
    content: bytes,
    size: Size,
    channels: int,
    view: View = CENTRE_CROP,
    out: np.ndarray | None = None,
    limits: Limits = LIMITS,
) -> np.ndarray:
    """Return an encoded image as uint8 [height, width, 1, 3 or 4 channels], in `out` if that is given.

    Transparent images are laid over white, unless there are 4 channels: colour and alpha, 255 where an image has none.
    The view is resized to `size` (bicubic, antialiased) unless it is unscaled. A JPEG whose view is at least four times
    as large is decoded at a half, a quarter or an eighth of its size first, which libjpeg does in less time.

    Raises:
        ValueError: The bytes are no image, are damaged, or hold more than the limits or another number of channels.
    """
    height, width = sides(size)
    out = np.empty((height, width, channels), np.uint8) if out is None else out
    _check(content, limits)
    check_channels(content, channels)
    if content.startswith(JPEG) and channels < 4 and (not _has_exif(content) or _is_upright(content)):
        if view is CENTRE_CROP and _decode_into(content, out):
            return out
        pixels = _decode_jpeg(content, channels, size, view, limits)
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    else:
        image, mode = decode_whole(content, limits, channels == 4), MODES[channels]
        image = image if image.mode == mode else image.convert(mode)
    image = viewed(image, size, view)
    out[:] = np.asarray(image).reshape(out.shape)
    return out


def viewed(image: Image.Image, size: Size, view: View) -> Image.Image:
    """Return a view of an image in some size."""
    height, width = sides(size)
    if view.unscaled:
        image = _window(image, width, height, view)
    elif view.area:
        view = view._replace(log_ratio=view.log_ratio + math.log(width / height))
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=_box(*image.size, view))
    elif image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    if view.flip:
        image = ImageOps.mirror(image)
    return image


def decode_whole(content: bytes, limits: Limits = LIMITS, alpha: bool = False) -> Image.Image:
    """Return the first frame of an encoded image, upright and over white, in mode L or RGB.

    If `alpha` is kept, a transparent image is in mode RGBA instead, as it is. Of two channels the first is
    returned, and of more than four the first three.

    Raises:
        ValueError: The bytes are no image, are damaged, or hold more than the limits.
    """
    try:
        _check(content, limits)
        if is_array(content):
            header(content, limits)
            image = _of_array(array(content), limits)
        else:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_pixels(*image.size, limits)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        if alpha and image.has_transparency_data:
            return image.convert("RGBA")
        image = _flatten(image)
        return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode in ("1", "LA") else "RGB")
    except DataError:  # of the environment, not of these bytes
        raise
    except UnidentifiedImageError as error:
        raise ValueError(UNKNOWN) from error
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from error


def decode_own_size(content: bytes, channels: int, limits: Limits = LIMITS) -> np.ndarray:
    """Return an encoded image in its own size, uint8 [height, width, channels]; raise ValueError as `decode` does."""
    check_channels(content, channels)
    image = decode_whole(content, limits, channels == 4)
    return np.asarray(image.convert(MODES[channels])).reshape(image.height, image.width, channels)


def header(content: bytes, limits: Limits = LIMITS) -> tuple[tuple[int, int], int]:
    """Return an encoded image's width and height, and its channels, without decoding it.

    These are 1 (grey) or 3 (colour, perhaps with alpha), and those of an array as they are.

    Raises:
        ValueError: The bytes are no image, or hold more than the limits.
    """
    if is_array(content):
        height, width, channels = array_shape(content)
        _check_pixels(width, height, limits)
        return (width, height), channels
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_pixels(*image.size, limits)
            return image.size, 1 if image.mode in GREY else 3
    except UnidentifiedImageError as error:
        raise ValueError(UNKNOWN) from error
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from error


def check_header(content: bytes, limits: Limits) -> None:
    """Raise a ValueError unless the bytes begin as an image within the limits."""
    _check(content, limits)
    header(content, limits)


def check_channels(content: bytes, channels: int) -> None:
    """Raise a ChannelsError unless an image has the channels, or both have 1, 3 or 4, of which one makes the other."""
    shape = array_shape(content) if is_array(content) else ()
    own = shape[2] if shape else max(MODES)
    if own == channels or (own in MODES and channels in MODES):
        return
    if not shape:
        header(content, Limits(*[2**62] * len(LIMITS)))  # raises a reason for the user
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            raise ChannelsError(
                f"it is of mode {image.mode}, which is read as 1, 3 or 4 channels, not as the {channels} of "
                "data.channels (or --channels): set that to one of these, or leave out such images"
            )
    first = ". If its channels come first, numpy.moveaxis(x, 0, -1) puts them last"
    first *= channels in shape and content.startswith(MAGIC)
    raise ChannelsError(
        f"it has {own} channels, expected the {channels} of data.channels (or --channels): set that to "
        f"{'1, 3 or 4' if own in MODES else own}, or leave out such images{first}"
    )


def limit_settings(limit: str) -> str:
    """Return the settings and options that set a limit, for messages."""
    return f"data.max_{limit}, or --max_{limit} of data.prepare, data.inspect and trainer.evaluate"


def _decode_jpeg(content: bytes, channels: int, size: Size, view: View, limits: Limits) -> np.ndarray:
    """Return uint8 [height, width, channels] of a JPEG, scaled down so that the view keeps at least twice the size."""
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    _check_pixels(width, height, limits)
    wanted = [2 * side for side in sides(size)]
    if view.area:
        stretch = math.exp(abs(view.log_ratio + math.log(wanted[1] / wanted[0])) / 2)
        wanted = [math.ceil(max(wanted) * stretch / view.area**0.5)] * 2
    least = dict(zip(("min_height", "min_width"), wanted, strict=True))
    enough = not view.unscaled and height >= 2 * wanted[0] and width >= 2 * wanted[1]
    scaled = least | {"min_factor": 2} if enough else {}
    return simplejpeg.decode_jpeg(content, "GRAY" if channels == 1 else "RGB", **scaled)


def _decode_into(content: bytes, out: np.ndarray) -> bool:
    """Decode a JPEG into `out` if it has just that size, which saves reading its header."""
    try:
        pixels = simplejpeg.decode_jpeg(content, "GRAY" if out.shape[2] == 1 else "RGB", buffer=out)
    except ValueError:  # larger, of another colour space, or damaged: decoding it the usual way tells which
        return False
    return pixels.shape == out.shape


def _has_exif(content: bytes) -> bool:
    """Look at the first segments only: a search of all bytes takes longer than decoding a small image."""
    place = len(JPEG)
    while (kind := content[place : place + 2]) in SEGMENTS:
        if kind == EXIF:
            return True
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return False


def _is_upright(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.getexif().get(ORIENTATION, UPRIGHT) == UPRIGHT
    except Exception:  # Pillow raises nearly anything on damaged bytes; libjpeg may still read the pixels
        return True


def _check(content: bytes, limits: Limits) -> None:
    if len(content) > limits.bytes:
        raise ValueError(f"it has more than {limits.bytes:,} bytes ({limit_settings('bytes')})")
    if (
        content.startswith(JPEG) and content.count(SCAN) > limits.scans
    ):  # a preview, or bytes after END, may look like some
        _check_scans(content, limits)
    if is_stack(content):
        raise ValueError(
            "it is a TIFF of several images, of which only the first would be read: save each as a file of its own, or "
            "stack the channels of one, numpy.save(FILE, numpy.moveaxis(tifffile.imread(TIFF), 0, -1))"
        )


def _check_scans(content: bytes, limits: Limits) -> None:
    """Count scans by their segments, as libjpeg does."""
    place, scans = len(JPEG), 0
    for _ in range(MAX_SEGMENTS):
        found = MARKER.search(content, place)
        if found is None or found[0] == END:
            return
        scans += found[0] == SCAN
        if scans > limits.scans:
            raise ValueError(f"it has more than {limits.scans:,} scans ({limit_settings('scans')}): encode it again")
        place = found.end() + max(2, int.from_bytes(content[found.end() : found.end() + 2]))
    raise ValueError(f"it has more than {MAX_SEGMENTS:,} segments: encode it again")


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        most = f"{limits.pixels:,} ({limit_settings('pixels')})"
        raise ValueError(f"it has {width} x {height} pixels, more than {most}: scale it down")


def _of_array(pixels: np.ndarray, limits: Limits) -> Image.Image:
    """Return pixels [height, width, channels] as a picture of those channels that one can show."""
    height, width, channels = pixels.shape
    _check_pixels(width, height, limits)
    shown = channels if channels in MODES else 1 if channels == 2 else 3
    eight = (pixels[..., :shown] >> (8 * pixels.itemsize - 8)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(eight[..., 0] if shown == 1 else eight))


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "I":  # Pillow's conversion would clip to white
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known: convert it first")
    return _over_white(image) if image.has_transparency_data else image


def _over_white(image: Image.Image) -> Image.Image:
    """Blend strip by strip: blending the whole image takes four times the memory."""
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


def _window(image: Image.Image, width: int, height: int, view: View) -> Image.Image:
    """Return the part of `width` x `height` pixels that lies where a view says."""
    if image.width < width or image.height < height:
        image = ImageOps.cover(image, (width, height), Image.Resampling.BICUBIC)
    left, top = int(view.x * (image.width - width + 1)), int(view.y * (image.height - height + 1))
    left, top = min(left, image.width - width), min(top, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _box(width: int, height: int, view: View) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a view's crop, each side at most the image's."""
    side, stretch = (width * height * view.area) ** 0.5, math.exp(view.log_ratio / 2)
    w, h = min(width, max(1.0, side * stretch)), min(height, max(1.0, side / stretch))
    left, top = view.x * (width - w), view.y * (height - h)
    return left, top, min(left + w, width), min(top + h, height)  # rounding may pass the edge
