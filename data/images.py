"""Bytes to pixels: any ordinary image, upright, eight bits deep, over white, in the size and crop a run asks for."""

import io
import math
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # of a file, Pillow's own bound: a quarter of a gigabyte of colour
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
UPRIGHT = 1  # Exif's orientation of an image that needs no turn
ORIENTATION = 0x0112


class View(NamedTuple):
    """A random resized crop and a flip.

    Args:
        area: share of the image that is kept, in (0, 1]
        log_ratio: logarithm of the crop's width over its height, beyond the image's own
        x, y: where the crop lies, from 0 (left, top) to 1 (right, bottom)
        flip: mirror it
    """

    area: float = 1.0
    log_ratio: float = 0.0
    x: float = 0.5
    y: float = 0.5
    flip: bool = False


def decode(content: bytes, size: int, channels: int, view: View | None = None) -> np.ndarray:
    """An encoded image as uint8 [size, size, channels].

    The largest centred square, or of `view` the crop, is resized to `size` (bicubic, antialiased). A JPEG of at least
    four times as many pixels a side is decoded at a half, a quarter or an eighth, which costs libjpeg less.

    Raises:
        ValueError: the bytes are no image, are damaged, or hold more than MAX_PIXELS.
    """
    least = 2 * size if view is None else math.ceil(2 * size * math.exp(abs(view.log_ratio) / 2) / view.area**0.5)
    pixels = _jpeg(content, channels, least)
    if pixels is not None and view is None and pixels.shape[:2] == (size, size):
        return pixels
    if pixels is None:
        image = upright(content).convert("L" if channels == 1 else "RGB")
    else:
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    if view is not None:
        image = _seen(image, size, view)
    elif image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels)


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


def _jpeg(content: bytes, channels: int, least: int) -> np.ndarray | None:
    """uint8 [height, width, channels] of a JPEG, scaled down while both sides keep `least` pixels; None: for Pillow."""
    if content[:2] != b"\xff\xd8" or (b"Exif\0" in content[:65536] and not _is_upright(content)):
        return None
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    if colorspace not in ("YCbCr", "Gray", "RGB") or (colorspace == "RGB" and channels == 1):
        return None
    _check_pixels(width, height)
    scaled = {"min_height": least, "min_width": least, "min_factor": 2} if min(width, height) >= 2 * least else {}
    return simplejpeg.decode_jpeg(content, "GRAY" if channels == 1 else "RGB", **scaled)


def _is_upright(content: bytes) -> bool:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return image.getexif().get(ORIENTATION, UPRIGHT) == UPRIGHT


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


def _seen(image: Image.Image, size: int, view: View) -> Image.Image:
    shape = math.exp(view.log_ratio / 2)
    width, height = (
        min(side, max(1.0, side * view.area**0.5 * stretch))
        for side, stretch in zip(image.size, (shape, 1 / shape), strict=True)
    )
    left, top = view.x * (image.width - width), view.y * (image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))  # rounding may pass the edge
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(image) if view.flip else image
