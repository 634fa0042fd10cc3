"""Statistics of some samples, exact and independent of the order in which samples and shards are added."""

import hashlib
import io
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data import latents
from data.arrays import MAGIC, array, array_shape, is_array
from data.dataset import ShardEntry, Split, Spread
from data.images import FORMATS, LIMITS, Limits, decode, decode_whole

COUNTED = ("label", "width", "height", "mode", "format")


@dataclass
class DatasetSummary:
    """Statistics of some samples; those of two parts add up to those of the whole.

    Args:
        images: number of images
        encoded: their bytes
        digest: sum of the samples' hashes (key, label, image)
        counts: for each of COUNTED, the number of images with each value
        pixels: int64 [4, 256], the number of pixels with each value: of grey images, then of the three colours
    """

    images: int = 0
    encoded: int = 0
    digest: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in COUNTED})
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((4, 256), np.int64))

    def add(self, key: str, content: bytes, label: int, limits: Limits = LIMITS) -> None:
        """Decode a sample and count it.

        Raises:
            ValueError: A run could not read the image; nothing has been counted.
        """
        image = decode_whole(content, limits)
        if is_array(content):
            form = "NPY" if content.startswith(MAGIC) else "TIFF"
            mode = f"{array(content).dtype} x {array_shape(content)[2]}"
        else:
            with Image.open(io.BytesIO(content), formats=FORMATS) as header:
                mode, form = header.mode, str(header.format)
        if form in ("JPEG", "MPO"):
            decode(content, 32, 3, limits=limits)  # runs read JPEGs by libjpeg-turbo, which refuses more than Pillow
        self.count(key, content, label, latents.Description(*image.size, mode, form))
        histogram = np.reshape(image.histogram(), (-1, 256))
        self.pixels[slice(0, 1) if len(histogram) == 1 else slice(1, 4)] += histogram

    def add_latents(self, key: str, content: bytes, label: int) -> None:
        """Unpack a sample of latents and count it; raise ValueError, and count nothing, if they are damaged."""
        form = "npy" if content.startswith(latents.NPY) else "safetensors"
        self.count(key, content, label, latents.describe(latents.unpack(content), form))

    def count(self, key: str, content: bytes, label: int, description: latents.Description) -> None:
        """Count a sample, of whose pixels or numbers nothing is known."""
        self.images += 1
        self.encoded += len(content)
        head = f"{key}\n{label}\n".encode("utf-8", "surrogateescape")
        self.digest += int.from_bytes(hashlib.sha256(head + content).digest())
        for name, value in zip(COUNTED, (label, *description), strict=True):
            self.counts[name][str(value)] += 1

    def __iadd__(self, other: "DatasetSummary") -> "DatasetSummary":
        self.images += other.images
        self.encoded += other.encoded
        self.digest += other.digest
        for name in COUNTED:
            self.counts[name].update(other.counts[name])
        self.pixels = self.pixels + np.array(other.pixels)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return plain data of which `DatasetSummary(**data)` makes an equal summary."""
        return {**vars(self), "pixels": self.pixels.tolist()}

    @property
    def fingerprint(self) -> str:
        """A checksum of keys, labels and images, whatever shards they are in."""
        return f"{self.digest % 2**128:032x}"

    def split(self, shards: list[ShardEntry]) -> Split:
        """Return what dataset.json says of these samples."""
        labels = {int(label): count for label, count in self.counts["label"].items()}
        mean, std = self._moments()
        return Split(
            images=self.images,
            image_bytes=self.encoded,
            fingerprint=self.fingerprint,
            unlabelled=labels.pop(-1, 0),
            labels={str(label): labels[label] for label in sorted(labels)},
            width=_spread(self.counts["width"]),
            height=_spread(self.counts["height"]),
            modes=dict(sorted(self.counts["mode"].items())),
            formats=dict(sorted(self.counts["format"].items())),
            mean=mean,
            std=std,
            shards=shards,
        )

    def _moments(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of each channel; grey images among coloured ones count as coloured."""
        grey, *colours = self.pixels.tolist()
        if not self.pixels.any():  # these are latents
            return [], []
        channels = [[*map(sum, zip(grey, one, strict=True))] for one in colours] if any(colours[0]) else [grey]
        mean, std = [], []
        for channel in channels:  # Python's integers are exact, so that no order of additions can be seen
            n = sum(channel) or 1
            total = sum(value * count for value, count in enumerate(channel))
            squares = sum(value**2 * count for value, count in enumerate(channel))
            mean.append(round(total / n / 255, 6))
            std.append(round(math.sqrt(n * squares - total**2) / n / 255, 6))
        return mean, std


def _spread(counts: Counter[str]) -> Spread | None:
    values = sorted((int(value), count) for value, count in counts.items())
    half, below = sum(counts.values()) / 2, 0
    for value, count in values:
        below += count
        if below >= half:
            return Spread(values[0][0], value, values[-1][0])
    return None
