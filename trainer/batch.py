"""A batch, from uint8 to [-1, 1] and back, and its draws.

A draw depends on (seed, step, name, position in the global batch) alone.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A generator's seed in [0, 2^63) from what it depends on."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def normalize(image: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] to uint8, clamped and rounded.

    Raises:
        FloatingPointError: a value is not finite; a cast would make it look like an ordinary pixel.
    """
    if not image.isfinite().all():
        raise FloatingPointError(f"{int((~image.isfinite()).sum())} of {image.numel()} pixels are not finite")
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@dataclass
class Batch:
    """Some rows of a global batch.

    Args:
        image: [n, channels, size, size] in [-1, 1]
        rows: their positions in the global batch
        batch_size: of the global batch
        seed: of the run
        step: of the run
    """

    image: Tensor
    rows: slice
    batch_size: int
    seed: int
    step: int

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The draw `name` from N(0, I), [n, *shape]: made for the global batch, then sliced.

        A draw for some rows alone would not do: the first rows of a longer draw are other numbers.
        """
        generator = torch.Generator(self.image.device).manual_seed(key(self.seed, self.step, name))
        draw = torch.randn((self.batch_size, *shape), generator=generator, device=self.image.device)
        return draw[self.rows].to(self.image.dtype)

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` rows."""
        return [
            Batch(image, slice(self.rows.start + i * size, self.rows.start + (i + 1) * size), *self._source())
            for i, image in enumerate(self.image.split(size))
        ]

    def _source(self) -> tuple[int, int, int]:
        return self.batch_size, self.seed, self.step
