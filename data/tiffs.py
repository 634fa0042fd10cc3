"""TIFFs of more than four channels, such as bands of satellites, which Pillow cannot read."""

import io
from functools import lru_cache

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

TIFF = b"II*\0", b"MM\0*"  # a TIFF's first bytes, in either order of bytes
SAMPLES, ORIENTATION = 277, 274  # tags: the number of channels; how the image is turned, 1 if it is upright
MOST = 2**30  # bytes of pixels: few compressed bytes may hold any number


def is_wide(content: bytes) -> bool:
    """Return whether bytes are a TIFF whose first image has more than four channels."""
    return content.startswith(TIFF) and _tags(content).get(SAMPLES, 1) > 4


@lru_cache(maxsize=1)  # an image's header, channels and pixels are asked for one after the other
def read(content: bytes) -> np.ndarray:
    """Return the pixels of a TIFF's first image, [height, width, channels] in its own type.

    Raises:
        ValueError: It is damaged or turned, holds too many pixels, or needs tifffile, which is not installed.
    """
    try:
        from tifffile import TiffFile
    except ImportError:
        raise ValueError(
            "it is a TIFF of more than four channels, and tifffile, which reads those, is not installed: pip install "
            "tifffile imagecodecs, or '.[tiff]' of this project"
        ) from None
    if _tags(content).get(ORIENTATION, 1) != 1:
        raise ValueError("it is a TIFF of more than four channels that is not upright: turn its pixels, not its tag")
    try:
        with TiffFile(io.BytesIO(content)) as file:
            page = file.pages.first
            if page.nbytes > MOST:
                raise ValueError(f"it has {page.nbytes:,} bytes of pixels, more than {MOST:,}: cut it into parts")
            pixels = page.asarray()
    except Exception as error:  # tifffile raises nearly anything on damaged bytes
        raise ValueError(f"it is a TIFF that cannot be read: {error}") from error
    pixels = np.moveaxis(pixels, 0, -1) if page.planarconfig == 2 else pixels
    pixels.flags.writeable = False
    return pixels


def _tags(content: bytes) -> ImageFileDirectory_v2 | dict[int, int]:
    """Return the tags of a TIFF's first image; none if they are damaged."""
    file = io.BytesIO(content)
    try:
        tags = ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        tags.get(SAMPLES)  # which is parsed only now
        return tags
    except Exception:  # Pillow raises nearly anything on damaged bytes; it then refuses the image
        return {}
