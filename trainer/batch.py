"""A batch, from uint8 to [-1, 1] and back, and its draws.

A draw depends on (seed, step, name, position in the global batch) alone.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A generator's seed in [0, 2^63) from what it depends on."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def normalize(image: Tensor) -> Tensor:
    """uint8 to [-1, 1], laid out channel by channel."""
    return image.float().contiguous() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] to uint8, clamped and rounded.

    Raises:
        FloatingPointError: a value is not finite; a cast would make it look like an ordinary pixel.
    """
    if not image.isfinite().all():
        raise FloatingPointError(f"{int((~image.isfinite()).sum())} of {image.numel()} pixels are not finite")
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@contextmanager
def strict_fp32(device: torch.device) -> Iterator[None]:
    """In float32 as it is written: no autocast, no TF32, no choice of algorithms by speed."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def prior(seed: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """z [n, *shape] of samples with some indices [n]: each by a generator of its own, so that blocks change nothing."""
    generator = torch.Generator()
    draws = [torch.randn(shape, generator=generator.manual_seed(key(seed, "evaluate", i))) for i in index.tolist()]
    return torch.stack(draws)


@dataclass
class Batch:
    """Some rows of a global batch.

    Args:
        images: of each data set, [n, channels, size, size] in [-1, 1]
        rows: their positions in the global batch
        batch_size: of the global batch
        seed: of the run
        step: of the run
    """

    images: tuple[Tensor, ...]
    rows: slice
    batch_size: int
    seed: int
    step: int

    @property
    def image(self) -> Tensor:
        """Of the first data set."""
        return self.images[0]

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The draw `name` from N(0, I), [n, *shape]: made for the global batch, then sliced.

        A draw for some rows alone would not do: the first rows of a longer draw are other numbers.
        """
        return self._draw(torch.randn, name, shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The draw `name` from U[0, 1), [n, *shape]."""
        return self._draw(torch.rand, name, shape)

    def _draw(self, of: Callable[..., Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(self.image.device).manual_seed(key(self.seed, self.step, name))
        draw = of((self.batch_size, *shape), generator=generator, device=self.image.device)
        return draw[self.rows].to(self.image.dtype)

    def ramp(self, start: int, steps: int) -> float:
        """0 before step `start`, then rising linearly to 1 after `steps` more."""
        since = self.step - start
        return float(since >= 0) if not steps else min(1.0, max(0.0, since / steps))

    def due(self, every: int, start: int = 0) -> bool:
        """Whether this step is `start` or a multiple of `every` after it."""
        return self.step >= start and (self.step - start) % every == 0

    def positions(self) -> Tensor:
        """int64 [n]: where these rows are in the global batch."""
        return torch.arange(self.rows.start, self.rows.stop, device=self.image.device)

    def placed(self, value: Tensor) -> Tensor:
        """[batch_size, ...]: `value` in these rows, zero in the others, such that the mean over all parts of a global
        batch holds every row."""
        # In float64 the scaling is undone to the bit by any number of parts, once rounded back.
        whole = value.new_zeros((self.batch_size, *value.shape[1:]), dtype=torch.float64)
        whole[self.rows] = value.double() * (self.batch_size / len(value))
        return whole

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` rows."""
        return [
            Batch(images, slice(self.rows.start + i * size, self.rows.start + (i + 1) * size), *self._source())
            for i, images in enumerate(zip(*(image.split(size) for image in self.images), strict=True))
        ]

    def _source(self) -> tuple[int, int, int]:
        return self.batch_size, self.seed, self.step
