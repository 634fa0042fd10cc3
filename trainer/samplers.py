"""Samplers: the distributions of z from which images are drawn, the prior or one that is fitted to training images.

An autoencoder has no prior, and the codes of a VAE or a VAE-GAN seldom fit theirs. A distribution that is fitted to the
codes after training gives better images (Ghosh et al. 2020, "From variational to deterministic autoencoders").
"""

import argparse
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from data.errors import DataError
from data.loader import Samples, read
from data.order import permutation
from data.shards.reader import Shards
from models import System
from trainer.config.settings import DataConfig
from trainer.draws import key, prior
from trainer.latents import LatentEncoder

KINDS = {
    "prior": "N(0, I)",
    "mixture": "a Gaussian mixture fitted to the codes of training images",
    "resample": "the posterior of a training image that is drawn at random",
}
COMPONENTS, TRAIN_NUM = 10, 10_000  # as Ghosh et al. have it; the codes of more images change a mixture little
MAX_DIM = 1024  # numbers of a code of which a mixture has full covariances


@dataclass(frozen=True)
class Sampler:
    """A distribution of z; draw i depends on (seed, i) alone.

    Args:
        kind: of KINDS
        shape: of z
        truncation: what deviations from a mean are scaled by. z = truncation * N(0, I) of the prior is StyleGAN's
            truncation trick (Karras et al. 2019, appendix B) in z, and Glow's temperature (Kingma & Dhariwal
            2018): below 1, images are better, and less diverse
        facts: what it was fitted to, as plain data
    """

    kind: str
    shape: tuple[int, ...]
    truncation: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> dict[str, Any]:
        """What the draws depend on beside the system, as plain data."""
        return {"kind": self.kind, "truncation": self.truncation, **self.facts}

    @property
    def name(self) -> str:
        """The part of a score's name that tells the sampler; empty for N(0, I)."""
        truncated = f"-{self.truncation:g}" if self.truncation != 1 else ""
        return f"{self.kind}{truncated}" if self.kind != "prior" or truncated else ""

    def __call__(self, seed: int, index: Tensor) -> Tensor:
        """Return z [n, *shape], float32, of the samples with these indices [n]."""
        return prior(seed, index, self.shape) * self.truncation


@dataclass(frozen=True)
class Mixture(Sampler):
    """A mixture of Gaussians N(means[k], factors[k] factors[k]^T).

    Args:
        bounds: [components], cumulative weights of the components; the last is 1
        means: [components, dim]
        factors: [components, dim, dim], or the square roots of diagonal covariances, [components, dim]
    """

    bounds: Tensor = field(kw_only=True)
    means: Tensor = field(kw_only=True)
    factors: Tensor = field(kw_only=True)

    def __call__(self, seed: int, index: Tensor) -> Tensor:
        return torch.stack([self._draw(seed, i) for i in index.tolist()]).view(-1, *self.shape).float()

    def _draw(self, seed: int, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(key(seed, self.kind, i))
        chosen = torch.rand((), dtype=torch.float64, generator=generator)
        k = min(int(torch.searchsorted(self.bounds, chosen, right=True)), len(self.bounds) - 1)
        noise = torch.randn(self.means.shape[1], dtype=torch.float64, generator=generator)
        factor, mean = self.factors[k].double(), self.means[k].double()
        # numpy's sum of a row does not depend on the number of threads, as a product of matrices may.
        deviation = factor * noise if factor.dim() == 1 else torch.from_numpy((factor * noise).numpy().sum(1))
        return mean + self.truncation * deviation


def chosen(images: Samples, num: int | None) -> np.ndarray:
    """Return the positions of `num` images in order, which a fixed permutation chooses; None stands for all."""
    return np.sort(permutation(len(images), 0)[:num])


def fit(
    kind: str, encoder: LatentEncoder, images: Samples, num: int = TRAIN_NUM, components: int = COMPONENTS
) -> Mixture:
    """Return a sampler that is fitted to the codes of `num` images, which a fixed permutation chooses.

    `resample` draws from these images' aggregate posterior, the mean over images of q(z|x). `mixture` is fitted to one
    draw from each posterior by expectation maximization, with full covariances.

    Args:
        kind: mixture or resample
        encoder: gives the codes
        images: training images by position
        num: number of images; all if there are fewer
        components: of a mixture

    Raises:
        ValueError: there are too few images, or a code has too many numbers for full covariances.
        DataError: an image is damaged.
    """
    positions = chosen(images, num)
    shape, facts = encoder.system.latent_shape, {"images": len(positions), "fingerprint": images.fingerprint()}
    dim = int(np.prod(shape))
    if kind == "mixture" and (dim > MAX_DIM or len(positions) <= dim + components):
        raise ValueError(
            f"--sampler mixture fits covariances of codes of {dim:,} numbers, at most {MAX_DIM:,}, and needs more "
            f"images than {dim + components:,}; there are {len(positions):,}. Use --sampler resample, or more images"
        )
    mean, deviation = _codes(encoder, images, positions)
    if kind == "resample":
        bounds = torch.arange(1, len(mean) + 1, dtype=torch.float64) / len(mean)
        return Mixture(kind, shape, facts=facts, bounds=bounds, means=mean, factors=deviation)
    noise = [torch.randn(dim, generator=torch.Generator().manual_seed(key("fit", i))) for i in positions.tolist()]
    bounds, means, factors = _mixture(mean + deviation * torch.stack(noise), components)
    facts["components"] = components
    return Mixture(kind, shape, facts=facts, bounds=bounds, means=means, factors=factors)


def _codes(encoder: LatentEncoder, images: Samples, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    """Means and standard deviations [n, dim] of the posteriors of images."""
    parts = []
    for rows in encoder.rows(len(positions)):
        some = read(images, positions[rows.start : rows.stop], *encoder.format)
        parts.append(torch.stack(encoder(some.image)))
    mean, log_variance = torch.cat(parts, 1).flatten(2)
    return mean, (log_variance / 2).exp()


def _mixture(codes: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cumulative weights, means and factors of a mixture fitted to codes [n, dim], on any number of threads."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after 100 rounds, more change little
        found = GaussianMixture(components, random_state=0).fit(codes.double().numpy())
        factors = np.linalg.cholesky(found.covariances_)
    bounds = found.weights_.cumsum()
    return torch.from_numpy(bounds / bounds[-1]), torch.from_numpy(found.means_), torch.from_numpy(factors)


# ---- on the command line


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a sampler to a command."""
    kinds = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    add = parser.add_argument
    add("--sampler", choices=[*KINDS], help=f"what z is drawn from (default: prior). {kinds}")
    add("--truncation", type=PositiveFloat, help="scale of the noise in z; below 1: better images, less diverse")
    add("--components", type=PositiveInt, help=f"Gaussians of --sampler mixture (default: {COMPONENTS})")
    add("--train", metavar="SHARDS", help="training images (default: the run's data.train)")
    usual = f"default: {TRAIN_NUM} for a sampler, else all"
    add("--train_num", type=PositiveInt, help=f"number of training images that are encoded ({usual})")


def open_sampler(
    settings: argparse.Namespace, system: System, data: DataConfig, device: str, train_used: bool = False
) -> Sampler:
    """Return the sampler of the command line, fitted if it is not the prior.

    Args:
        settings: parsed by `add_sampler_options`
        system: the system that decodes z
        data: the run's data, whose training images it is fitted to unless --train names others
        device: computes the codes
        train_used: whether --train and --train_num have an effect without a sampler, too

    Raises:
        ValueError: an option has no effect, the system has no encoder, or `fit` refuses.
        DataError: the training images cannot be read.
    """
    kind, truncation = settings.sampler or "prior", settings.truncation or 1.0
    fitted = [*KINDS] if train_used else [name for name in KINDS if name != "prior"]
    for option, users in ("components", ["mixture"]), ("train", fitted), ("train_num", fitted):
        if getattr(settings, option) and kind not in users:
            raise ValueError(f"--{option} has no effect on --sampler {kind}; leave it out")
    if kind == "prior":
        return Sampler(kind, system.latent_shape, truncation)
    if not system.can("posterior"):
        raise ValueError(
            f"--sampler {kind} is fitted to codes, and {type(system).__name__} has no encoder; leave it out"
        )
    encoder = LatentEncoder(system, data.size, data.channels, device, data.bits)
    images = training_images(settings.train, data)
    made = fit(kind, encoder, images, settings.train_num or TRAIN_NUM, settings.components or COMPONENTS)
    return replace(made, truncation=truncation)


def training_images(given: str | None, data: DataConfig) -> Shards:
    """Return the shards that the user names, or else those that a run was trained on.

    Raises:
        DataError: they cannot be read.
    """
    if given:
        return data.open([given])[0]
    try:
        return data.open(data.trains, data.on_error, by_user=False)[0]  # a checkpoint's manifest names them
    except DataError as error:
        raise DataError(f"the run's data.train: {error}. Name a copy of the training images with --train") from error
