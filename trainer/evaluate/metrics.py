"""Metrics of images and of their features, in float64.

They are our own rather than torchmetrics' or torch-fidelity's, because their sums must be the same to the bit however
the images are dealt to ranks; the tests compare them with torch-fidelity's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.exact_sum import ExactSum

SEED = 2020  # torch-fidelity's seed of shuffles and subsets, so that both compute the same numbers
ROWS = 128  # rows of a matrix of distances that are computed at once, few enough for a processor's cache


class Gaussian(NamedTuple):
    """Mean [D] and covariance [D, D] (divided by n - 1) of features, both float64, and the number of images n."""

    mu: Tensor
    sigma: Tensor
    n: int


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


def root(sigma: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance.

    Eigenvalues that are only rounding count as 0: their roots would be a thousand times as large, and would differ
    between numbers of threads.
    """
    values, vectors = torch.linalg.eigh(sigma)
    rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T


def frechet(a: Gaussian, b: Gaussian, root_b: Tensor | None = None) -> float:
    """Return the squared Frechet distance between two Gaussians, as FID is (Heusel et al. 2017, eq. 6), at least 0.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)); the last trace is the sum of the singular values of B^(1/2) A^(1/2).
    Those of B^(1/2) A B^(1/2) are their squares, of which rounding would destroy the small ones. `root_b` is the square
    root of B if it is known.
    """
    trace = torch.linalg.svdvals((root(b.sigma) if root_b is None else root_b) @ root(a.sigma)).sum()
    difference = a.mu - b.mu
    return max(0.0, (difference @ difference + a.sigma.trace() + b.sigma.trace() - 2 * trace).item())


class InceptionScore(ExactSum):
    """Sums for exp E KL(p(y|x) || p(y)) over splits of images (Salimans et al. 2016), shuffled as by torch-fidelity.

    Args:
        num: number of images
        classes: number of logits of an image
        splits: number of splits
        device: device of the sums

    Raises:
        ValueError: there are fewer images than splits.
    """

    def __init__(self, num: int, classes: int, splits: int = 10, device: torch.device | str = "cpu"):
        if num < splits:
            raise ValueError(
                f"the inception score is a mean over {splits} splits and needs at least {splits} images; got {num}. "
                "Use more images, or leave out the metric is"
            )
        order = np.random.RandomState(SEED).permutation(num)
        edges = [i * num // splits for i in range(splits + 1)]
        self.split = torch.empty(num, dtype=torch.int64)
        for i in range(splits):
            self.split[order[edges[i] : edges[i + 1]]] = i
        # Per split: the number of images, the sum of their negative entropies, the sums of their probabilities.
        super().__init__((splits, classes + 2), torch.device(device))

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Add the logits [n, classes] of the images with some indices [n]."""
        logits = logits.double()
        p = logits.softmax(1)
        terms = torch.cat([torch.ones_like(p[:, :1]), (p * logits.log_softmax(1)).sum(1, keepdim=True), p], 1)
        # A matrix product, since index_add_ on a GPU adds in an order that depends on its threads.
        dealt = self.split[index] == torch.arange(self.parts.shape[1])[:, None]
        self.add(dealt.to(terms) @ terms)

    @staticmethod
    def compute(parts: Tensor) -> tuple[float, float]:
        """Return the mean and standard deviation over the splits, from `parts` summed over ranks."""
        total = parts.sum(0)
        count, entropy, marginal = total[:, 0], total[:, 1] / total[:, 0], total[:, 2:] / total[:, :1]
        scores = (entropy - torch.xlogy(marginal, marginal).sum(1)).exp()
        assert count.min() > 0
        return scores.mean().item(), scores.std(correction=0).item()


# ---- kernel inception distance


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


# ---- precision, recall, density, coverage

# Neighbours in a ball: of precision and recall (Kynkaanniemi et al. 2019), of density and coverage (Naeem et al. 2020).
NEAREST = (3, 5)


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


# ---- codes and pixels


class Codes(ExactSum):
    """Sums for how codes fit the prior N(0, I): codes [n, dim], or maps of codes [n, dim, ...]."""

    def __init__(self, dim: int, device: torch.device):
        super().__init__((dim + 2, dim + 1), device)
        self.dim = dim

    def update(self, mean: Tensor, log_variance: Tensor) -> None:
        """Add the means and log-variances [n, dim, ...] of posteriors."""
        mean, variance = (
            x.double().flatten(2).transpose(1, 2).reshape(-1, self.dim) if x.dim() > 2 else x.double()
            for x in (mean, log_variance.exp())
        )
        extended = torch.cat([mean, torch.ones_like(mean[:, :1])], 1)
        self.add(torch.cat([extended.T @ extended, nn.functional.pad(variance.sum(0, keepdim=True), (0, 1))]))

    def compute(self, parts: Tensor) -> tuple[float, float]:
        """Return the prior gap and the number of active units, from `parts` summed over ranks.

        The gap is the Frechet distance between the codes' N(m, C) and N(0, I): |m|^2 + tr(C + I - 2 C^(1/2)), where C
        is the covariance of draws from the posteriors, in closed form. A unit is active if the variance of its mean
        over the images is above 0.01 (Burda et al. 2016, section 5.2).
        """
        total = parts.sum(0).cpu()
        count = total[-2, -1]
        mean, variance = total[-2, :-1] / count, total[-1, :-1] / count
        between = total[:-2, :-1] / count - mean[:, None] * mean
        roots = torch.linalg.eigvalsh(between + variance.diag()).clamp(min=0).sqrt()
        gap = mean.square().sum() + (roots - 1).square().sum()
        return gap.item(), (between.diag() > 0.01).double().sum().item()


def laplacian_variance(image: Tensor) -> Tensor:
    """Return the sharpness [n] of uint8 images [n, c, h, w]: the variance of the Laplacian of their grey values."""
    grey = image.float().sum(1)  # integers, as is everything up to the sums below, which are therefore exact
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    values = laplacian.double().flatten(1)
    n = values.shape[1]
    return (values.square().sum(1) - values.sum(1).square() / n) / (n - 1) / image.shape[1] ** 2


def psnr(image: Tensor, other: Tensor) -> Tensor:
    """Return 10 log10(255^2 / mean squared error) [n] of uint8 images [n, c, h, w], in decibels, at most 148."""
    error = (image.double() - other.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=1e-10))
