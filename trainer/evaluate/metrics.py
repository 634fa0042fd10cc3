"""Measures of images and of their features: sums and matrices in, numbers out, all in float64, without processes.

What is summed over images can be added up over processes, by whoever has some, before it becomes a number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SEED = 2020  # of torch-fidelity's shuffles and subsets, so that its numbers are ours
# Adding and taking away such a number rounds to multiples of 2^-20, or of 2^-60: its last place's.
HIGH, LOW = 1.5 * 2.0**32, 1.5 * 2.0**-8
ROWS = 128  # of a matrix of distances at once: few enough to stay in a processor's cache


class ExactSum:
    """A float64 sum that is the same to the bit in whatever order its terms come, as on any number of processes.

    A term is split into a multiple of 2^-20 and a rest that is rounded to multiples of 2^-60, and sums of either have
    no rounding while they stay below 2^31 (pre-rounding: Demmel & Nguyen 2013, with bins that are fixed). The square
    root in a Frechet distance of few images would blow a difference in the last place up to one in the eighth digit.

    Args:
        shape: of a term
        device: of the sum
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.parts = torch.zeros(2, *shape, dtype=torch.float64, device=device)

    def add(self, term: Tensor) -> None:
        """Add a float64 tensor."""
        high = (term + HIGH) - HIGH
        self.parts[0] += high
        self.parts[1] += (term - high + LOW) - LOW


class Gaussian(NamedTuple):
    """Of features: mean [D], covariance [D, D] (divided by n - 1), both float64, and the number of images."""

    mu: Tensor
    sigma: Tensor
    n: int


class Moments(ExactSum):
    """First and second moments of features, from sums over images: memory does not grow with their number.

    Args:
        dim: D, numbers of a feature
        device: of the sums
    """

    def __init__(self, dim: int, device: torch.device):
        super().__init__((dim + 1, dim + 1), device)

    def update(self, features: Tensor) -> None:
        """Features [n, D]."""
        ones = torch.ones(len(features), 1, dtype=torch.float64, device=features.device)
        extended = torch.cat([features.double(), ones], 1)
        self.add(extended.T @ extended)

    @staticmethod
    def gaussian(parts: Tensor) -> Gaussian:
        """The Gaussian of all `parts`, added up.

        Raises:
            ValueError: there are fewer than two images, which have no covariance.
        """
        total = parts.sum(0).cpu()
        n = int(total[-1, -1])
        if n < 2:
            raise ValueError(f"a covariance needs two images or more, found {n}")
        mu = total[-1, :-1] / n
        return Gaussian(mu, (total[:-1, :-1] - n * torch.outer(mu, mu)) / (n - 1), n)


def root(sigma: Tensor) -> Tensor:
    """The symmetric square root of a covariance.

    Eigenvalues that are nothing but rounding count as 0: their roots would be a thousand times as large, and another
    number of threads would give others.
    """
    values, vectors = torch.linalg.eigh(sigma)
    rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T


def frechet(a: Gaussian, b: Gaussian, root_b: Tensor | None = None) -> float:
    """The Frechet distance between two Gaussians, squared as FID is (Heusel et al. 2017, eq. 6), never below 0.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)); the last trace is the sum of singular values of B^(1/2) A^(1/2). Those
    of B^(1/2) A B^(1/2) are their squares, and of the small ones rounding would leave nothing. `root_b` is the root of
    B, where it is known.
    """
    trace = torch.linalg.svdvals((root(b.sigma) if root_b is None else root_b) @ root(a.sigma)).sum()
    difference = a.mu - b.mu
    return max(0.0, (difference @ difference + a.sigma.trace() + b.sigma.trace() - 2 * trace).item())


class InceptionScore(ExactSum):
    """exp E KL(p(y|x) || p(y)), over ten splits (Salimans et al. 2016), shuffled as torch-fidelity does.

    Args:
        num: images in all
        classes: logits of an image
        splits: the images are dealt into
        device: of the sums

    Raises:
        ValueError: there are fewer images than splits.
    """

    def __init__(self, num: int, classes: int, splits: int = 10, device: torch.device | str = "cpu"):
        if num < splits:
            raise ValueError(
                f"the inception score is a mean over {splits} splits, expected that many images or more, found {num}: "
                "raise evaluate.num"
            )
        order = np.random.RandomState(SEED).permutation(num)
        edges = [i * num // splits for i in range(splits + 1)]
        self.split = torch.empty(num, dtype=torch.int64)
        for i in range(splits):
            self.split[order[edges[i] : edges[i + 1]]] = i
        # Of each split: the number of images, the sum of their negative entropies, the sums of their probabilities.
        super().__init__((splits, classes + 2), torch.device(device))

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Logits [n, classes] of the images with some indices [n]."""
        logits = logits.double()
        p = logits.softmax(1)
        terms = torch.cat([torch.ones_like(p[:, :1]), (p * logits.log_softmax(1)).sum(1, keepdim=True), p], 1)
        # A product and no index_add_, which on a GPU adds in whatever order threads come.
        dealt = self.split[index] == torch.arange(self.parts.shape[1])[:, None]
        self.add(dealt.to(terms) @ terms)

    @staticmethod
    def compute(parts: Tensor) -> tuple[float, float]:
        """Mean and standard deviation over the splits, from all `parts`, added up."""
        total = parts.sum(0)
        count, entropy, marginal = total[:, 0], total[:, 1] / total[:, 0], total[:, 2:] / total[:, :1]
        scores = (entropy - torch.xlogy(marginal, marginal).sum(1)).exp()
        assert count.min() > 0
        return scores.mean().item(), scores.std(correction=0).item()


# ---- kernel inception distance


def subsets(num_fake: int, num_real: int, count: int = 100, most: int = 1000) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which fake and real images each of KID's subsets has: the smaller of `most` and what there is, as torch-fidelity
    draws them. There is one alone where it has all images."""
    random, size = np.random.RandomState(SEED), min(most, num_fake, num_real)
    count = 1 if size == num_fake == num_real else count
    return [
        (random.choice(num_fake, size, replace=False), random.choice(num_real, size, replace=False))
        for _ in range(count)
    ]


def kernel_sum(a: Tensor, b: Tensor | None = None) -> float:
    """The sum of (x y / D + 1)^3 over all pairs of features of `a` [n, D] and `b` [m, D]; without `b`, over all pairs
    of different rows of `a`."""
    x, y = (
        torch.cat([one.double() / one.shape[1] ** 0.5, one.new_ones(len(one), 1, dtype=torch.float64)], 1)
        for one in (a, a if b is None else b)
    )
    total = 0.0
    for first in range(0, len(x), ROWS):
        part = x[first : first + ROWS]
        if b is not None:
            total += _cubes(part @ y.T)
        else:  # of pairs of one set, each once, then twice; those within the part are already there both ways
            total += 2 * _cubes(part @ y[first + ROWS :].T) + _cubes(part @ part.T)
    return total if b is not None else total - (x * x).sum(1).pow(3).sum().item()


def _cubes(kernel: Tensor) -> float:
    return torch.dot((kernel * kernel).flatten(), kernel.flatten()).item()


def mmd(fake: Tensor, real: Tensor, real_sum: float | None = None) -> float:
    """KID of one subset: the unbiased estimate of the squared maximum mean discrepancy (Binkowski et al. 2018).

    Args:
        fake, real: features [m, D] of either, as many
        real_sum: kernel_sum(real), where it is known
    """
    m = len(fake)
    known = kernel_sum(real) if real_sum is None else real_sum
    return (kernel_sum(fake) + known) / (m * (m - 1)) - 2 * kernel_sum(fake, real) / m**2


# ---- precision, recall, density, coverage

NEAREST = (3, 5)  # neighbours: of precision and recall (Kynkaanniemi et al. 2019), of density and coverage (Naeem 2020)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[n, m] between the rows of a [n, D] and b [m, D], float64."""
    squares = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    squares += a.square().sum(1)[:, None]
    return squares.clamp_(min=0)


def radii(features: Tensor, parts: Sequence[slice], nearest: Sequence[int] = NEAREST) -> Tensor:
    """Squared distances [n, len(nearest)] to the so-manieth nearest other one among features [n, D], in the rows of
    `parts`; 0 in others."""
    features = features.double()
    found = torch.zeros(len(features), len(nearest), dtype=torch.float64, device=features.device)
    for rows in parts:
        most = min(max(nearest) + 1, len(features))
        nearby = squared_distances(features[rows], features).topk(most, largest=False).values
        found[rows] = nearby[:, [min(k, most - 1) for k in nearest]]
    return found


class Neighbours(NamedTuple):
    """Counts over some fake images, that can be added up over processes.

    Args:
        precise: fake images inside some real one's ball of 3 neighbours
        dense: balls of 5 neighbours of real images that fake ones are inside of
        recalled: [real images] fake balls of 3 neighbours that each is inside of
        covered: [real images] fake images inside each one's ball of 5 neighbours
    """

    precise: Tensor
    dense: Tensor
    recalled: Tensor
    covered: Tensor


def neighbours(
    fake: Tensor, real: Tensor, fake_radii: Tensor, real_radii: Tensor, parts: Sequence[slice]
) -> Neighbours:
    """Who lies in whose balls, of the fake images in the rows of `parts`.

    Args:
        fake, real: features [n, D], [m, D]
        fake_radii, real_radii: as `radii` gives them
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
    """Precision, recall, density and coverage from counts over all fake images."""
    return {
        "precision": (counts.precise / num_fake).item(),
        "recall": (counts.recalled > 0).double().mean().item(),
        "density": (counts.dense / (NEAREST[1] * num_fake)).item(),
        "coverage": (counts.covered > 0).double().mean().item(),
    }


# ---- codes and pixels


class Codes(ExactSum):
    """How codes of images fit the prior N(0, I), from sums over images (or over images and positions, of maps).

    Args:
        dim: numbers of a code, or of one position of it
        device: of the sums
    """

    def __init__(self, dim: int, device: torch.device):
        super().__init__((dim + 2, dim + 1), device)
        self.dim = dim

    def update(self, mean: Tensor, log_variance: Tensor) -> None:
        """Posteriors' means and log-variances [n, dim, ...]."""
        mean, variance = (
            x.double().flatten(2).transpose(1, 2).reshape(-1, self.dim) if x.dim() > 2 else x.double()
            for x in (mean, log_variance.exp())
        )
        extended = torch.cat([mean, torch.ones_like(mean[:, :1])], 1)
        self.add(torch.cat([extended.T @ extended, nn.functional.pad(variance.sum(0, keepdim=True), (0, 1))]))

    def compute(self, parts: Tensor) -> tuple[float, float]:
        """Prior gap and active units, from all `parts`, added up.

        The gap is the Frechet distance of the codes' N(m, C) and N(0, I): |m|^2 + tr(C + I - 2 C^(1/2)), where C is
        the covariance of draws from the posteriors in closed form. A unit is active where its mean varies by more
        than 0.01 between images (Burda et al. 2016, section 5.2).
        """
        total = parts.sum(0).cpu()
        count = total[-2, -1]
        mean, variance = total[-2, :-1] / count, total[-1, :-1] / count
        between = total[:-2, :-1] / count - mean[:, None] * mean
        roots = torch.linalg.eigvalsh(between + variance.diag()).clamp(min=0).sqrt()
        gap = mean.square().sum() + (roots - 1).square().sum()
        return gap.item(), (between.diag() > 0.01).double().sum().item()


def laplacian_variance(image: Tensor) -> Tensor:
    """Sharpness [n] of uint8 images [n, c, h, w]: the variance of the Laplacian of their grey values."""
    grey = image.float().sum(1)  # whole numbers, as all are up to the sums below, which so are exact
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    values = laplacian.double().flatten(1)
    n = values.shape[1]
    return (values.square().sum(1) - values.sum(1).square() / n) / (n - 1) / image.shape[1] ** 2


def psnr(image: Tensor, other: Tensor) -> Tensor:
    """[n], of uint8 images [n, c, h, w]: 10 log10(255^2 / mean squared error), in decibels, at most 148."""
    error = (image.double() - other.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=1e-10))
