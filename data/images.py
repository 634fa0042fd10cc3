"""Bytes to pixels: any ordinary image, upright, eight bits deep, over white, in the size and crop a run asks for."""

import io
import math
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # of a file, Pillow's own bound: a quarter of a gigabyte of colour
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
JPEG, EXIF = b"\xff\xd8", b"\xff\xe1"  # how a file begins, and a segment of it
SEGMENTS = frozenset(bytes([0xFF, kind]) for kind in (*range(0xE0, 0xF0), 0xFE))  # before the image's: APP0 to 15, COM
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS refuses what this would only tell
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes without colour
UPRIGHT = 1  # Exif's orientation of an image that needs no turn
ORIENTATION = 0x0112


class View(NamedTuple):
    """What of an image is seen.

    Args:
        area: share of the image that is kept, in (0, 1]; 0 is its largest centred square
        log_ratio: logarithm of the crop's width over its height
        x, y: where the crop lies, from 0 (left, top) to 1 (right, bottom)
        flip: mirror it
    """

    area: float = 0.0
    log_ratio: float = 0.0
    x: float = 0.5
    y: float = 0.5
    flip: bool = False


CENTRE = View()


def decode(content: bytes, size: int, channels: int, view: View = CENTRE, out: np.ndarray | None = None) -> np.ndarray:
    """An encoded image as uint8 [size, size, channels], in `out` where that is given.

    What `view` keeps is resized to `size` (bicubic, antialiased). A JPEG, of which that is at least four times as many
    pixels a side, is decoded at a half, a quarter or an eighth, which costs libjpeg less.

    Raises:
        ValueError: the bytes are no image, are damaged, or hold more than MAX_PIXELS.
    """
    out = np.empty((size, size, channels), np.uint8) if out is None else out
    if content.startswith(JPEG) and (not _has_exif(content) or _is_upright(content)):
        if view is CENTRE and _fits(content, out):
            return out
        pixels = _jpeg(content, channels, size, view)
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    else:
        image = upright(content).convert("L" if channels == 1 else "RGB")
    if view.area:
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=_box(*image.size, view))
    elif image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    if view.flip:
        image = ImageOps.mirror(image)
    out[:] = np.asarray(image).reshape(out.shape)
    return out


def upright(content: bytes) -> Image.Image:
    """An encoded image, whole, of mode L or RGB: the first frame, turned as its Exif says, transparency over white,
    sixteen bits to eight by their high byte.

    Raises:
        ValueError: the bytes are no image, are damaged, or hold more than MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_pixels(*image.size)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        image = _flatten(image)
        return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode in ("1", "LA") else "RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no image of a known kind ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from error


def header(content: bytes) -> tuple[tuple[int, int], int]:
    """Width and height of an encoded image, and its channels: 1 is grey, 3 colour; the pixels are not read.

    Raises:
        ValueError: the bytes are no image, or hold more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_pixels(*image.size)
            return image.size, 1 if image.mode in GREY else 3
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"it is damaged, or no image of a known kind ({', '.join(FORMATS)})") from error


def _jpeg(content: bytes, channels: int, size: int, view: View) -> np.ndarray:
    """uint8 [height, width, channels] of a JPEG, scaled down as far as leaves a view twice as many pixels a side."""
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    _check_pixels(width, height)
    least = 2 * size
    if view.area:
        least = math.ceil(least * math.exp(abs(view.log_ratio) / 2) / view.area**0.5)
    scaled = {"min_height": least, "min_width": least, "min_factor": 2} if min(width, height) >= 2 * least else {}
    return simplejpeg.decode_jpeg(content, "GRAY" if channels == 1 else "RGB", **scaled)


def _fits(content: bytes, out: np.ndarray) -> bool:
    """Decode a JPEG into `out`, if it has that very size: where it has, nothing else needs to be known of it."""
    try:
        pixels = simplejpeg.decode_jpeg(content, "GRAY" if out.shape[2] == 1 else "RGB", buffer=out)
    except ValueError:  # larger than out, of another colour space, or damaged: whoever looks closer will tell
        return False
    return pixels.shape == out.shape


def _has_exif(content: bytes) -> bool:
    """By a walk over the first segments: a search would cost more than the decoding of a small image."""
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
    except Exception:  # Pillow raises nearly anything on damaged bytes; of the pixels libjpeg will tell
        return True


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}: scale it down first")


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # Pillow's conversion would clip to white
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known: convert it first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _box(width: int, height: int, view: View) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a view's crop; a side longer than the image is cut to it."""
    side, stretch = (width * height * view.area) ** 0.5, math.exp(view.log_ratio / 2)
    w, h = min(width, max(1.0, side * stretch)), min(height, max(1.0, side / stretch))
    left, top = view.x * (width - w), view.y * (height - h)
    return left, top, min(left + w, width), min(top + h, height)  # rounding may pass the edge
