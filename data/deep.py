"""Images of sixteen bits a channel, of which Pillow holds grey ones alone, and of other channels than 1, 3 and 4.

They are read as arrays, resized channel by channel in float32, and written as PNG or .npy.
"""

import io
import math
import struct
import sys
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile, ImageOps

from data.arrays import array, encode_npy, is_array
from data.images import (
    CENTRE_CROP,
    FORMATS,
    LIMITS,
    MODES,
    Limits,
    Size,
    View,
    check_channels,
    check_header,
    decode,
    decode_own_size,
    decode_whole,
    viewed,
)

WHITE = 65535
GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601), as Pillow has it
PNG, COLOUR_TYPES = b"\x89PNG\r\n\x1a\n", {1: 0, 3: 2, 4: 6}  # a PNG's first bytes; its types, by channels


def is_deep(content: bytes) -> bool:
    """Return whether a readable image has sixteen bits a channel."""
    if is_array(content):
        return array(content).dtype == np.uint16
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return image.mode.startswith("I") or _is_deep_colour(image)


def decode_to(
    content: bytes,
    size: Size | None,
    channels: int,
    bits: int,
    view: View = CENTRE_CROP,
    limits: Limits = LIMITS,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Return an image of 8 or 16 bits as uint8 or uint16 [height, width, channels], in `out` if that is given.

    The other arguments, and what is raised, are those of `decode_deep`.
    """
    if bits == 8 and channels in MODES:
        if size is None:
            return decode_own_size(content, channels, limits)
        return decode(content, size, channels, view, out, limits)
    pixels = decode_deep(content, size, channels, view, limits)
    pixels = pixels if bits == 16 else to_eight(pixels)
    if out is not None:
        out[:] = pixels
    return pixels


def to_eight(pixels: np.ndarray) -> np.ndarray:
    """Return uint16 pixels as the nearest of eight bits."""
    return np.rint(pixels / 257).astype(np.uint8)


def decode_deep(content: bytes, size: Size | None, channels: int, view: View, limits: Limits = LIMITS) -> np.ndarray:
    """Return an image as uint16 [height, width, channels]; a value v of eight bits becomes 257 v.

    Args:
        content: encoded
        size: height and width; None: its own
        channels: 1, 3 or 4, as `data.images.decode` has it, or those of an array
        view: the crop
        limits: of an image

    Raises:
        ValueError: The bytes are no image, are damaged, hold more than the limits or other channels, or cannot be read
            at their depth.
    """
    check_channels(content, channels)
    pixels = _with_channels(read_deep(content, limits), channels)
    return pixels if size is None else changed(pixels, lambda image: viewed(image, size, view))


def read_deep(content: bytes, limits: Limits = LIMITS) -> np.ndarray:
    """Return an image as uint16 [height, width, channels]: 1 (grey), 3 (colour), 4 (colour and alpha), or others.

    Raises:
        ValueError: As `decode_deep`.
    """
    check_header(content, limits)
    if is_array(content):
        pixels = array(content)
        return pixels if pixels.dtype == np.uint16 else pixels.astype(np.uint16) * np.uint16(257)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if _is_deep_colour(image):
                return _read_deep_colour(content)
            if image.mode.startswith("I"):
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return np.asarray(image).clip(0, WHITE).astype(np.uint16)[..., None]
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from error
    whole = decode_whole(content, limits, alpha=True)  # of eight bits
    return np.asarray(whole).reshape(whole.height, whole.width, -1).astype(np.uint16) * np.uint16(257)


def changed(pixels: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Return uint16 pixels [height, width, channels] that Pillow changes, each channel as an image in float32.

    Colours count as much as they are opaque, as Pillow resizes them.
    """
    values = pixels.astype(np.float32)
    alpha = values[..., 3:] / WHITE if pixels.shape[2] == 4 else None
    if alpha is not None:
        values[..., :3] *= alpha
    planes = (change(Image.fromarray(np.ascontiguousarray(values[..., i]))) for i in range(values.shape[2]))
    made = np.stack([np.asarray(plane) for plane in planes], 2)
    if alpha is not None:
        made[..., :3] /= (made[..., 3:] / WHITE).clip(min=1 / WHITE)
    return np.rint(made).clip(0, WHITE).astype(np.uint16)


def over_white(pixels: np.ndarray) -> np.ndarray:
    """Return uint16 pixels [height, width, channels] without alpha, which is the fourth of four channels."""
    if pixels.shape[2] != 4:
        return pixels
    alpha = pixels[..., 3:] / WHITE
    return np.rint(pixels[..., :3] * alpha + WHITE * (1 - alpha)).astype(np.uint16)


def encode(pixels: np.ndarray) -> tuple[str, bytes]:
    """Return pixels [height, width, channels], uint8 or uint16, as a file that holds them, after its ending."""
    return ("png", encode_png(pixels)) if pixels.shape[2] in MODES else ("npy", encode_npy(pixels))


def encode_png(pixels: np.ndarray) -> bytes:
    """Return pixels [height, width, 1, 3 or 4 channels], uint8 or uint16, as a PNG of their depth."""
    height, width, channels = pixels.shape
    if pixels.dtype == np.uint8:
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "PNG")
        return file.getvalue()
    rows = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(height, -1)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])  # filter 2: the difference to the row above
    header = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")
    return PNG + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _raw_mode(image: Image.Image) -> str:
    """Return how the file lays its pixels out, by Pillow's name, such as RGB;16B for colours of two bytes each."""
    arguments = next(iter(getattr(image, "tile", ())), (None,) * 4)[3]
    if image.format == "PPM" and image.mode == "RGB" and isinstance(arguments, tuple) and arguments[1] > 255:
        return "PPM;16"
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether Pillow would read eight bits alone of a colour image, or one with alpha."""
    return ";16" in _raw_mode(image) and not image.mode.startswith("I")


def _read_deep_colour(content: bytes) -> np.ndarray:
    """Read all bytes by other layouts: in the other order the low bytes are the high ones; grey and alpha are four."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        layout = _raw_mode(image)
        if layout == "PPM;16":
            return _read_ppm(content, image)
    if layout == "LA;16B":
        grey, alpha = np.moveaxis(_read_as(content, "RGBA").view(">u2").astype(np.uint16), 2, 0)
        return np.stack([grey, grey, grey, alpha], 2)
    if layout[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16"):
        raise ValueError(f"its sixteen bits a channel are laid out as {layout}, and not read: save it as RGB or RGBA")
    other = layout[:-1] + {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[layout[-1]]
    high, low = (_read_as(content, one) for one in (layout, other))
    return high.astype(np.uint16) << 8 | low


def _read_ppm(content: bytes, image: Image.Image) -> np.ndarray:
    codec, _, offset, (_, largest) = image.tile[0]  # type: ignore[attr-defined]
    if codec != "ppm":
        raise ValueError("it is a PPM of text with sixteen bits a channel, which is not read: save it as a binary one")
    shape = (image.height, image.width, 3)
    pixels = np.frombuffer(content, ">u2", math.prod(shape), offset).reshape(shape)
    return np.rint(pixels * (WHITE / largest)).clip(0, WHITE).astype(np.uint16)


def _read_as(content: bytes, layout: str) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        assert isinstance(image, ImageFile.ImageFile)
        image.tile = [
            tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)
            for tile in image.tile
        ]
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image)


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[2] == channels:
        return pixels
    if channels < 4:
        pixels = over_white(pixels)
        if channels == 1 and pixels.shape[2] == 3:
            return np.rint(pixels @ GREY).astype(np.uint16)[..., None]
        return np.repeat(pixels, channels, 2) if pixels.shape[2] < channels else pixels
    alpha = pixels[..., 3:] if pixels.shape[2] == 4 else np.full_like(pixels[..., :1], WHITE)
    colours = pixels[..., :3] if pixels.shape[2] > 1 else np.repeat(pixels, 3, 2)
    return np.concatenate([colours, alpha], 2)
