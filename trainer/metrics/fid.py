"""Frechet inception distance (Heusel et al. 2017)."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.metrics.statistics import FeatureStatistics, Gaussian, MetricRanks, ReferenceStatistics, short


def fid(fake: FeatureStatistics, real: ReferenceStatistics, ranks: MetricRanks) -> dict[str, Callable[[], float]]:
    """Return the function that computes the FID, which takes seconds."""
    return {f"fid{short(fake.gaussian.n)}": lambda: frechet(fake.gaussian, real.gaussian, real.root)}


def frechet(a: Gaussian, b: Gaussian, root_b: Tensor | None = None) -> float:
    """Return the squared Frechet distance between two Gaussians, as FID is (Heusel et al. 2017, eq. 6), at least 0.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)); the last trace is the sum of the singular values of B^(1/2) A^(1/2).
    Those of B^(1/2) A B^(1/2) are their squares, of which rounding would destroy the small ones. `root_b` is the square
    root of B if it is known.
    """
    trace = torch.linalg.svdvals((b.root() if root_b is None else root_b) @ a.root()).sum()
    difference = a.mu - b.mu
    return max(0.0, (difference @ difference + a.sigma.trace() + b.sigma.trace() - 2 * trace).item())
