"""Kernel inception distance (Binkowski et al. 2018)."""

import numpy as np
import torch
from torch import Tensor

from trainer.metrics.statistics import ROWS, SEED, FeatureStatistics, MetricRanks, ReferenceStatistics, short


def kid(fake: FeatureStatistics, real: ReferenceStatistics, ranks: MetricRanks) -> dict[str, float]:
    """Return the mean and the standard deviation over the subsets, of which each rank computes its own."""
    if fake.features is None or real.features is None:
        return {}
    fakes, reals = fake.features, real.features
    parts = subsets(len(fakes), len(reals))
    distances = torch.zeros(len(parts), dtype=torch.float64, device=ranks.device)

    def compute() -> None:
        for i in ranks.own(range(len(parts))):
            fake_part, real_part = (torch.from_numpy(part).to(ranks.device) for part in parts[i])
            drawn = len(fakes), i  # which subset it is depends on both
            if drawn not in real.kernel_sums:
                real.kernel_sums[drawn] = kernel_sum(reals[real_part])
            distances[i] = mmd(fakes[fake_part], reals[real_part], real.kernel_sums[drawn])

    ranks.run(compute)
    distances, count = ranks.sum(distances), short(len(fakes))
    std = {f"kid_std{count}": distances.std(correction=0).item()} if len(parts) > 1 else {}
    return {f"kid{count}": distances.mean().item(), **std}


def subsets(num_fake: int, num_real: int, count: int = 100, most: int = 1000) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the indices of fake and real images in each of KID's subsets, drawn as by torch-fidelity.

    A subset has `most` images, or fewer if there are fewer; if it has all images, there is only one subset.
    """
    random, size = np.random.RandomState(SEED), min(most, num_fake, num_real)
    count = 1 if size == num_fake == num_real else count
    return [
        (random.choice(num_fake, size, replace=False), random.choice(num_real, size, replace=False))
        for _ in range(count)
    ]


def kernel_sum(a: Tensor, b: Tensor | None = None) -> float:
    """Return the sum of (x y / D + 1)^3 over all pairs of rows of `a` [n, D] and `b` [m, D].

    Without `b` the pairs are those of two different rows of `a`.
    """
    x, y = (
        torch.cat([one.double() / one.shape[1] ** 0.5, one.new_ones(len(one), 1, dtype=torch.float64)], 1)
        for one in (a, a if b is None else b)
    )
    total = 0.0
    for first in range(0, len(x), ROWS):
        part = x[first : first + ROWS]
        if b is not None:
            total += _cubes(part @ y.T)
        else:  # pairs with later parts count twice; those within the part are already there in both orders
            total += 2 * _cubes(part @ y[first + ROWS :].T) + _cubes(part @ part.T)
    return total if b is not None else total - (x * x).sum(1).pow(3).sum().item()


def _cubes(kernel: Tensor) -> float:
    return torch.dot((kernel * kernel).flatten(), kernel.flatten()).item()


def mmd(fake: Tensor, real: Tensor, real_sum: float | None = None) -> float:
    """Return the KID of one subset: the unbiased squared maximum mean discrepancy (Binkowski et al. 2018).

    Args:
        fake, real: features [m, D]
        real_sum: kernel_sum(real) if it is known
    """
    m = len(fake)
    known = kernel_sum(real) if real_sum is None else real_sum
    return (kernel_sum(fake) + known) / (m * (m - 1)) - 2 * kernel_sum(fake, real) / m**2
