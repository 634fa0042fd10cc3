"""Statistics of images' features, from which the metrics of samples are computed.

They are sums that are the same to the bit however the images are dealt to ranks, which torchmetrics' and
torch-fidelity's are not; the tests compare the metrics with torch-fidelity's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from trainer.exact_sum import ExactSum

T = TypeVar("T")
SEED = 2020  # torch-fidelity's seed of shuffles and subsets, so that both compute the same numbers
ROWS = 128  # rows of a matrix of distances that are computed at once, few enough for a processor's cache


class Gaussian(NamedTuple):
    """Mean [D] and covariance [D, D] (divided by n - 1) of features, both float64, and the number of images n."""

    mu: Tensor
    sigma: Tensor
    n: int

    def root(self) -> Tensor:
        """Return the symmetric square root of the covariance.

        Eigenvalues that are only rounding count as 0: their roots would be a thousand times as large, and would differ
        between numbers of threads.
        """
        values, vectors = torch.linalg.eigh(self.sigma)
        rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
        return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T


class Moments(ExactSum):
    """Sums of the first and second moments of features [n, dim]; memory does not grow with n."""

    def __init__(self, dim: int, device: torch.device):
        super().__init__((dim + 1, dim + 1), device)

    def update(self, features: Tensor) -> None:
        """Add features [n, dim]."""
        ones = torch.ones(len(features), 1, dtype=torch.float64, device=features.device)
        extended = torch.cat([features.double(), ones], 1)
        self.add(extended.T @ extended)

    @staticmethod
    def gaussian(parts: Tensor) -> Gaussian:
        """Return the Gaussian of the `parts`, summed over ranks.

        Raises:
            ValueError: there are fewer than two images.
        """
        total = parts.sum(0).cpu()
        n = int(total[-1, -1])
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 images; got {n}")
        mu = total[-1, :-1] / n
        return Gaussian(mu, (total[:-1, :-1] - n * torch.outer(mu, mu)) / (n - 1), n)


class FeatureStatistics(NamedTuple):
    """Statistics of a set of images, over all ranks."""

    gaussian: Gaussian
    features: Tensor | None  # float32 [kept, D], in the order of `places`; None if no features were kept
    sharpness: float  # mean variance of the images' Laplacian
    inception_score: tuple[float, float] | None  # mean and standard deviation over splits; None if not requested


@dataclass
class ReferenceStatistics:
    """Statistics of a set of real images, and what is computed from them once for all comparisons."""

    gaussian: Gaussian
    meta: dict[str, Any]  # what the statistics depend on: images, extractor and preprocessing; plain data
    sharpness: float | None = None  # mean variance of the images' Laplacian; None if unknown
    features: Tensor | None = None  # float32 [kept, D]; None if no features were kept
    radii: Tensor | None = None  # float64 [kept, 2], `prdc.radii` of the features; None until they are needed
    # By the number of fake images and the subset, `kid.kernel_sum` of the features.
    kernel_sums: dict[tuple[int, int], float] = field(default_factory=dict)

    @cached_property
    def root(self) -> Tensor:
        """The square root of the covariance."""
        return self.gaussian.root()

    def to(self, device: torch.device) -> "ReferenceStatistics":
        """Return the statistics with the features on a device; the Gaussian stays on the host."""
        return replace(self, features=None if self.features is None else self.features.to(device))


class MetricRanks(Protocol):
    """The ranks of an evaluation, which divide the work of a metric; `trainer.evaluate.ranks` has them."""

    device: torch.device

    def own(self, items: Sequence[T]) -> Sequence[T]: ...
    def rows(self, count: int) -> Sequence[slice]: ...
    def sum(self, value: Tensor) -> Tensor: ...
    def run(self, work: Callable[[], T]) -> T: ...


def short(n: int) -> str:
    """Return a number of images as the names of scores have it: 2000 is 2k."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)
