"""Bytes to pixels."""

import io

import numpy as np
from PIL import Image, ImageOps


def decode(content: bytes, size: int, channels: int) -> np.ndarray:
    """An encoded image as uint8 [channels, size, size].

    It is turned as its Exif says, transparency goes over white, the shorter side is resized to `size` (bicubic,
    antialiased) and the centre kept.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: the bytes are no image that Pillow reads.
    """
    image: Image.Image = Image.open(io.BytesIO(content))
    ImageOps.exif_transpose(image, in_place=True)
    image = _flatten(image).convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _flatten(image: Image.Image) -> Image.Image:
    """Transparency over white; sixteen bits to eight by their high byte, where Pillow's conversion clips to white."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image
