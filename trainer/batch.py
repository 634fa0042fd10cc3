"""A batch of images in [-1, 1], with its random draws."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.schedule import Varying, at
from models.visible import visible
from trainer.draws import draw, key


def normalize(image: Tensor) -> Tensor:
    """Map uint8 or uint16 to [-1, 1] in float32, contiguous by channel."""
    return (image.float().contiguous() / (peak(image) / 2)).sub_(1)


def peak(image: Tensor) -> int:
    """Return the largest value of a channel: 255 of uint8, 65535 of uint16."""
    return torch.iinfo(image.dtype).max


def to_uint8(image: Tensor) -> Tensor:
    """Map [-1, 1] to uint8, as `to_pixels`."""
    return to_pixels(image, 8)


def to_pixels(image: Tensor, bits: int) -> Tensor:
    """Map [-1, 1] to uint8 or uint16, clamped and rounded.

    Raises:
        FloatingPointError: a value is not finite; the cast would turn it into an ordinary pixel.
    """
    if not image.isfinite().all():
        raise FloatingPointError(f"{int((~image.isfinite()).sum())} of {image.numel()} pixels are not finite")
    dtype = torch.uint8 if bits == 8 else torch.uint16
    return ((image.clamp(-1, 1) + 1) * ((2**bits - 1) / 2)).round().to(dtype)


def visible_pixels(pixels: Tensor) -> Tensor:
    """Return images [n, channels, height, width] as a screen shows them: uint8 [n, 1 or 3, height, width]."""
    hidden = pixels.dtype == torch.uint16 or pixels.shape[1] not in (1, 3)
    return to_uint8(visible(normalize(pixels))) if hidden else pixels


@dataclass
class Batch:
    """Some rows of a global batch, as `models.system.Batch` describes it."""

    images: tuple[Tensor, ...]  # images of each dataset, [n, channels, size, size] in [-1, 1]
    rows: slice  # their positions in the global batch
    batch_size: int  # images of the global batch
    seed: int  # the run's seed
    step: int  # the step, counted from 0
    label: Tensor | None = None  # of the first dataset's images, int64 [n]

    @property
    def image(self) -> Tensor:
        """The images of the first dataset."""
        return self.images[0]

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the draw `name` from N(0, I), [n, *shape], a function of seed, step, name and position."""
        return self._draw(torch.randn, name, shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the draw `name` from U[0, 1), [n, *shape]."""
        return self._draw(torch.rand, name, shape)

    def common(self, name: str, count: int) -> list[float]:
        """Return the draw `name` of numbers from U[0, 1) that all images of a step share; no device computes them."""
        return [(key(self.seed, self.step, name, i) >> 10) / 2**53 for i in range(count)]

    def _draw(self, distribution: Callable[..., Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        image = self.image
        return draw(distribution, self.seed, self.step, name, self.rows, shape, image.device).to(image.dtype)

    def ramp(self, start: int, steps: int) -> float:
        """Return 0 before step `start`, then a weight that rises linearly to 1 over `steps` steps."""
        since = self.step - start
        return float(since >= 0) if not steps else min(1.0, max(0.0, since / steps))

    def at(self, setting: Varying) -> float:
        """Return the value at this step of a setting that may vary."""
        return at(setting, self.step)

    def due(self, every: int, start: int = 0) -> bool:
        """Return whether this step is `start` or a multiple of `every` after it."""
        return self.step >= start and (self.step - start) % every == 0

    def positions(self) -> Tensor:
        """Return the rows' positions in the global batch, int64 [n]."""
        return torch.arange(self.rows.start, self.rows.stop, device=self.image.device)

    def split(self, size: int) -> list["Batch"]:
        """Return micro-batches of `size` rows."""
        parts = zip(*(image.split(size) for image in self.images), strict=True)
        starts = range(self.rows.start, self.rows.stop, size)
        labels = [None] * len(starts) if self.label is None else self.label.split(size)
        return [
            replace(self, images=images, rows=slice(start, start + size), label=label)
            for start, images, label in zip(starts, parts, labels, strict=True)
        ]
