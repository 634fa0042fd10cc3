"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.metrics.statistics import FeatureStatistics, MetricRanks, ReferenceStatistics, short

# Neighbours in a ball: of precision and recall (Kynkaanniemi et al. 2019), of density and coverage (Naeem et al. 2020).
NEAREST = (3, 5)


def prdc(fake: FeatureStatistics, real: ReferenceStatistics, ranks: MetricRanks) -> dict[str, float]:
    """Return precision, recall, density and coverage; each rank compares its own rows of the samples."""
    if fake.features is None or real.features is None:
        return {}
    fakes, reals, parts = fake.features, real.features, ranks.rows(len(fake.features))
    if real.radii is None:
        real.radii = ranks.sum(ranks.run(lambda: radii(reals, ranks.rows(len(reals)))))
    real_radii, fake_radii = real.radii, ranks.sum(ranks.run(lambda: radii(fakes, parts)))
    counts = ranks.run(lambda: neighbours(fakes, reals, fake_radii, real_radii, parts))
    total = Neighbours(*(ranks.sum(count.double()) for count in counts))
    return {f"{name}{short(len(fakes))}": value for name, value in manifold_scores(total, len(fakes)).items()}


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances [n, m] between the rows of a [n, D] and b [m, D], float64."""
    squares = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    squares += a.square().sum(1)[:, None]
    return squares.clamp_(min=0)


def radii(features: Tensor, parts: Sequence[slice], nearest: Sequence[int] = NEAREST) -> Tensor:
    """Return the squared distance of features [n, D] to their k-th nearest neighbours, for each k of `nearest`.

    Only the rows in `parts` are computed; the others are 0, so that ranks can add up their results [n, len(nearest)].
    """
    features = features.double()
    found = torch.zeros(len(features), len(nearest), dtype=torch.float64, device=features.device)
    for rows in parts:
        most = min(max(nearest) + 1, len(features))
        nearby = squared_distances(features[rows], features).topk(most, largest=False).values
        found[rows] = nearby[:, [min(k, most - 1) for k in nearest]]
    return found


class Neighbours(NamedTuple):
    """Counts over some of the fake images, which ranks can add up. A ball reaches to the k-th nearest neighbour."""

    precise: Tensor  # fake images inside the 3-neighbour ball of any real image
    dense: Tensor  # pairs of a fake image and a real image's 5-neighbour ball that contains it
    recalled: Tensor  # [real images] above 0 if the 3-neighbour ball of a fake image contains the real image
    covered: Tensor  # [real images] above 0 if a fake image is inside the 5-neighbour ball of the real image


def neighbours(
    fake: Tensor, real: Tensor, fake_radii: Tensor, real_radii: Tensor, parts: Sequence[slice]
) -> Neighbours:
    """Return the counts over the rows in `parts` of `fake`.

    Args:
        fake, real: features [n, D] and [m, D]
        fake_radii, real_radii: results of `radii`, [n, 2] and [m, 2]
        parts: rows of `fake`
    """
    real = real.double()
    zero = torch.zeros((), dtype=torch.float64, device=real.device)
    precise, dense, recalled, covered = zero, zero, real.new_zeros(len(real)), real.new_zeros(len(real))
    for rows in parts:
        squares = squared_distances(fake[rows].double(), real)
        precise = precise + (squares <= real_radii[:, 0]).any(1).sum()
        recalled = recalled + (squares <= fake_radii[rows, :1]).any(0)
        inside = squares <= real_radii[:, 1]
        dense = dense + inside.sum()
        covered = covered + inside.any(0)
    return Neighbours(precise, dense, recalled, covered)


def manifold_scores(counts: Neighbours, num_fake: int) -> dict[str, float]:
    """Return precision, recall, density and coverage, given counts over all fake images."""
    return {
        "precision": (counts.precise / num_fake).item(),
        "recall": (counts.recalled > 0).double().mean().item(),
        "density": (counts.dense / (NEAREST[1] * num_fake)).item(),
        "coverage": (counts.covered > 0).double().mean().item(),
    }
