"""Random draws by name: what a draw is depends on (seed, step, name, position), and on nothing else.

Neither the number of processes nor micro-batches change it. torch's generators are not keyed by position, so the draws
are our own.
"""

import hashlib

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """Return a generator's seed in [0, 2^63), a hash of everything that the draw depends on."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def prior(seed: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return z [n, *shape] of the samples with these indices [n], each drawn by its own generator."""
    generator = torch.Generator()
    draws = [torch.randn(shape, generator=generator.manual_seed(key(seed, "evaluate", i))) for i in index.tolist()]
    return torch.stack(draws)
