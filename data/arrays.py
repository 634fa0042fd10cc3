"""Images of any number of channels: .npy files of integers, [height, width, channels] or [height, width], and TIFFs."""

import io
import math

import numpy as np
from numpy.lib import format as npy

from data import tiffs

MAGIC = b"\x93NUMPY"  # the first bytes of a .npy file
DEPTHS: dict[str, type[np.unsignedinteger]] = {"u1": np.uint8, "u2": np.uint16}  # types of pixels
LOW = 16  # pixels: no run has images of a smaller height, so that a smaller first number may be that of channels


def is_array(content: bytes) -> bool:
    """Return whether bytes begin as those of a .npy file, or as a TIFF that `data.tiffs` reads."""
    return content.startswith(MAGIC) or tiffs.is_wide(content)


def array(content: bytes) -> np.ndarray:
    """Return the pixels of an array, uint8 or uint16 [height, width, channels], which cannot be written to.

    Raises:
        ValueError: It is damaged or holds anything else, such as latents; the message says what.
        DataError: It is a TIFF, and tifffile is not installed.
    """
    if not content.startswith(MAGIC):
        pixels = tiffs.read(content)
        return pixels.astype(_depth(pixels.dtype, "TIFF"), copy=False)
    file = io.BytesIO(content)
    try:
        read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    except Exception as error:  # numpy raises nearly anything on damaged bytes
        raise ValueError(f"it is a damaged .npy file: {error}") from error
    depth = _depth(dtype, ".npy file")
    expected = "expected [height, width, channels] or [height, width]"
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"it is a .npy file of shape {[*shape]}, {expected}")
    height, width, channels = (*shape, 1)[:3]
    if height < LOW and height < channels:
        raise ValueError(
            f"it is a .npy file of shape {[*shape]}, {expected}: {height} seem to be its channels, which come last, as "
            "numpy.moveaxis(x, 0, -1) puts them"
        )
    if len(content) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError("it is a damaged .npy file, cut short or with more bytes than its shape has")
    pixels = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")
    return pixels.reshape(height, width, channels).astype(depth, copy=False)


def array_shape(content: bytes) -> tuple[int, int, int]:
    """Return the height, width and channels of an array, of a TIFF without decoding it; raise as `array`."""
    height, width, channels = array(content).shape if content.startswith(MAGIC) else tiffs.shape(content)
    return height, width, channels


def _depth(dtype: np.dtype, file: str) -> type[np.unsignedinteger]:
    """Return the type of a file's pixels in this machine's order of bytes."""
    if dtype.str[1:] not in DEPTHS:
        raise ValueError(
            f"it is a {file} of {dtype}, expected the uint8 or uint16 of pixels: other numbers have no known range, so "
            "scale them to one of these"
        )
    return DEPTHS[dtype.str[1:]]


def is_pixels(content: bytes) -> bool:
    """Return whether bytes are a .npy file of pixels that `array` reads."""
    try:
        return content.startswith(MAGIC) and array(content).size > 0
    except ValueError:
        return False


def encode_npy(pixels: np.ndarray) -> bytes:
    """Return pixels [height, width, channels] as a .npy file; equal ones give equal bytes."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(pixels), allow_pickle=False)
    return file.getvalue()
