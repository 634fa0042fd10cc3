"""A source's images by position, as evaluation reads them."""

import hashlib
import json
import tempfile

import numpy as np

from data.errors import DataError
from data.files import escaped
from data.images import LIMITS, Limits, Size, header, sides
from data.shards.reader import OnError
from data.sources.source import Source


class Listed:
    """A source's images by position, in the source's order, with the interface of `Shards`.

    Args:
        source: the images
        name: of the source, for messages
        size: that each image must have; None allows any
        channels: that each image must have, but that grey ones may be among coloured ones; None allows any
    """

    on_error: OnError = "stop"
    limits: Limits = LIMITS
    beside = "the first image"  # whose size and channels these are, for messages
    unpacked: tempfile.TemporaryDirectory[str] | None = None  # holds a compressed archive as long as it is read

    def __init__(self, source: Source, name: str, size: Size | None = None, channels: int | None = None):
        self.source, self.source_name, self.size, self.channels = source, name, size, channels

    def __len__(self) -> int:
        return len(self.source.items)

    @property
    def labels(self) -> np.ndarray:
        """int64 [images], -1 where an image has none."""
        return np.array([item.label for item in self.source.items])

    @property
    def classes(self) -> list[str]:
        """Names of the labels 0, 1, ...; empty if they have none."""
        return self.source.classes

    def images(self, positions: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Return the encoded images at some positions, and their labels.

        Raises:
            DataError: An image cannot be read, or has another size or more channels.
        """
        contents, labels = [], []
        for position in positions.tolist():
            try:
                content, label = self.source.read(self.source.items[position])
                if self.size or self.channels:
                    check_shape(content, self.limits, self.size, self.channels, self.beside)
            except (ValueError, OSError) as error:
                raise DataError(f"{self.name(position)}: {error}") from error
            contents.append(content)
            labels.append(label)
        return contents, np.array(labels, dtype=np.int64)

    def name(self, position: int) -> str:
        return f"{self.source_name}, {escaped(self.source.items[position].name)}"

    def bounds(self, position: int) -> tuple[int, int]:
        return 0, len(self)

    def fingerprint(self) -> str:
        """Return a checksum of the images' names, sizes, times and labels."""
        rows = [[item.key, item.size, item.stamp, item.label] for item in self.source.items]
        return hashlib.sha256(json.dumps([rows, self.size]).encode()).hexdigest()[:16]


def check_shape(content: bytes, limits: Limits, size: Size | None, channels: int | None, beside: str) -> None:
    """Check that an encoded image has the size and the channels of another one.

    Args:
        content: the encoded image
        limits: of an image
        size: that it must have; None allows any
        channels: that it must have, but that it may be grey among coloured ones; None allows any
        beside: the other image, for messages

    Raises:
        ValueError: It has others, or cannot be decoded.
    """
    (width, height), own = header(content, limits)
    if size and (height, width) != (expected := sides(size)):
        others = f"{expected[1]}x{expected[0]}"
        raise ValueError(f"it has {width}x{height} pixels, and {beside} {others}: --size brings all to one size")
    if channels and own != channels and (own, channels) != (1, 3):
        if (own, channels) == (3, 1):
            raise ValueError(f"it is in colour, and {beside} is grey: set --channels to 3 or 1")
        raise ValueError(f"it has {own} channels, and {beside} {channels}: all must have the same")
