"""TIFFs with more channels than Pillow reads, such as bands of satellites: the first image of the file, by tifffile.

Others are refused if they hold several images, which are often one image's channels.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

from data.errors import DataError

FIRST = tuple(PREFIXES)  # a TIFF's first bytes
BIG = 43  # the third byte of a BigTIFF, or the fourth, whose header has eight more
WIDTH, HEIGHT, SAMPLES, ORIENTATION, PHOTOMETRIC, EXTRA = 256, 257, 277, 274, 262, 338  # tags; SAMPLES: channels
SUBFILE, PART = 254, 1 | 4  # a tag; its bits of a reduced image, such as a thumbnail, and of a mask
PARTS = 32  # images of a file that are looked at; a pyramid has fewer
ALPHA = (1, 2, (1,), (2,))  # values of EXTRA, which says what channels beyond a colour's are
WITHOUT_COLOUR = (0, 1)  # values of PHOTOMETRIC: grey
COMPRESSIONS = (1, 5, 8, 32946, 32773, 50000)  # none, LZW, deflate, deflate, PackBits, zstd
MOST = 2**30  # bytes of pixels: a few compressed bytes may hold any number


def is_wide(content: bytes) -> bool:
    """Return whether bytes are a TIFF of more than four channels, or of two to four that are no colours or alpha."""
    if not content.startswith(FIRST):
        return False
    found = _tags(content)
    samples = _number(found, SAMPLES, 1)
    bands = _number(found, PHOTOMETRIC, 2) in WITHOUT_COLOUR and (samples > 2 or found.get(EXTRA) not in ALPHA)
    return samples > 4 or (samples > 1 and bands)


def is_stack(content: bytes) -> bool:
    """Return whether bytes are another TIFF, with a second image that is no thumbnail, mask or level of a pyramid."""
    if not content.startswith(FIRST) or is_wide(content):
        return False
    file = io.BytesIO(content)
    try:
        tags = _directory(file)
        for i in range(PARTS):
            file.seek(tags.next)
            tags.load(file)
            if i and WIDTH in tags and not _number(tags, SUBFILE, 0) & PART:
                return True
            if not tags.next or WIDTH not in tags:
                return False
    except Exception:  # Pillow raises nearly anything on damaged bytes, and tells of them as it decodes them
        pass
    return False


def shape(content: bytes) -> tuple[int, int, int]:
    """Return height, width and channels of such a TIFF, by its tags."""
    found = _tags(content)
    return _number(found, HEIGHT, 0), _number(found, WIDTH, 0), _number(found, SAMPLES, 1)


def read(content: bytes) -> np.ndarray:
    """Return the pixels of such a TIFF, [height, width, channels] in its own type.

    Raises:
        ValueError: It is damaged or turned, holds too many pixels, or is compressed in a way that is not read.
        DataError: tifffile is not installed.
    """
    try:
        from tifffile import TiffFile
    except ImportError as error:
        raise DataError(
            "a TIFF of many channels is among the images, and tifffile, which reads those, is not installed: pip "
            "install 'vaegan-trainer[tiff]'"
        ) from error
    turned = _number(_tags(content), ORIENTATION, 1)
    if turned != 1:
        raise ValueError(f"it is a TIFF whose Orientation is {turned}, expected 1: turn the pixels of all channels")
    try:
        with TiffFile(io.BytesIO(content)) as file:
            page = file.pages.first
            reason = _refusal(page)
            pixels = None if reason else page.asarray(maxworkers=1)
            by_planes = page.planarconfig == 2
    except Exception as error:  # tifffile raises nearly anything on damaged bytes
        raise ValueError(f"it is a damaged TIFF: {error}") from error
    if pixels is None:
        raise ValueError(reason)
    pixels = np.moveaxis(pixels, 0, -1) if by_planes else pixels
    if pixels.shape != shape(content):
        raise ValueError(f"it is a TIFF of shape {[*pixels.shape]}, but its tags tell of {[*shape(content)]}")
    pixels.flags.writeable = False
    return pixels


def _refusal(page: Any) -> str:
    """Return why a page is not decoded, before it is; empty if it can be."""
    if page.compression not in COMPRESSIONS:
        expected = "expected none, LZW, deflate, PackBits or zstd: write it anew"
        return f"it is a TIFF with compression {page.compression}, {expected}"
    size = max(page.nbytes, math.prod(page.chunks) * math.prod(page.chunked) * page.dtype.itemsize)
    if size > MOST:
        return f"it has {size:,} bytes of pixels, more than {MOST:,}: scale it down, or cut it"
    if page.bitspersample != 8 * page.dtype.itemsize:
        return f"it is a TIFF of {page.bitspersample} bits a channel, expected 8 or 16: write it anew"
    parts = math.prod(page.chunked)
    if len(page.dataoffsets) != parts or len(page.databytecounts) != parts or not all(page.databytecounts):
        return "it is a TIFF without some of its strips or tiles: write it anew"
    return ""


def _tags(content: bytes) -> Mapping[int, Any]:
    """Return the tags of a TIFF's first image; none if they are damaged."""
    file = io.BytesIO(content)
    try:
        tags = _directory(file)
        file.seek(tags.next)
        tags.load(file)
        return {tag: tags[tag] for tag in (WIDTH, HEIGHT, SAMPLES, ORIENTATION, PHOTOMETRIC, EXTRA) if tag in tags}
    except Exception:  # Pillow raises nearly anything on damaged bytes
        return {}


def _directory(file: io.BytesIO) -> ImageFileDirectory_v2:
    """Return what will hold an image's tags; its `next` is where the file has the first image's."""
    start = file.read(16)
    return ImageFileDirectory_v2(start if BIG in start[2:4] else start[:8])


def _number(tags: Mapping[int, Any], tag: int, default: int) -> int:
    value = tags.get(tag, default)
    return value if isinstance(value, int) else default
