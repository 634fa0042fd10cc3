"""Random draws by name: what a draw is depends on (seed, step, name, position), and on nothing else.

Neither the number of processes nor micro-batches change it. torch's generators are not keyed by position, so the draws
are our own: fixed blocks of positions have a key each, and a process draws the blocks that its rows lie in.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64  # positions of the global batch that are drawn at once


def key(*parts: int | str) -> int:
    """Return a generator's seed in [0, 2^63), a hash of everything that the draw depends on."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def draw(
    distribution: Callable[..., Tensor],
    seed: int,
    step: int,
    name: str,
    rows: slice,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Return the draw `name` of some positions of a step's global batch, float32 [rows, *shape].

    Drawing only these rows would give other numbers (`randn(8)[:4]` is not `randn(4)`), and drawing the global batch
    would cost each of many processes as much as one.

    Args:
        distribution: torch.randn or torch.rand
        seed, step, name: what the draw depends on, with the position
        rows: positions in the global batch
        shape: of the draw for one position
        device: of the draw
    """
    generator, parts = torch.Generator(device), []
    for first in range(rows.start // BLOCK * BLOCK, rows.stop, BLOCK):
        generator.manual_seed(key(seed, step, name, first // BLOCK))
        block = distribution((BLOCK, *shape), generator=generator, device=device)
        parts.append(block[max(0, rows.start - first) : rows.stop - first])
    return torch.cat(parts)


def prior(seed: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return z [n, *shape] of the samples with these indices [n], each drawn by its own generator."""
    generator = torch.Generator()
    draws = [torch.randn(shape, generator=generator.manual_seed(key(seed, "evaluate", i))) for i in index.tolist()]
    return torch.stack(draws)
