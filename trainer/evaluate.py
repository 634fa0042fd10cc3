"""Scores of a run, the same on any number of processes: of samples, reconstructions, codes and translations."""

import time
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from data.loader import read
from data.shards import Shards
from models import System
from trainer.batch import normalize, prior, to_uint8
from trainer.config import Data
from trainer.extractor import Extractor

BLOCK = 64


class PassThrough(nn.Module):
    """For torchmetrics: features instead of images."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_features = dim

    def forward(self, features: Tensor) -> Tensor:
        return features


class InceptionScore(Metric):
    """exp E KL(p(y|x) || p(y)), mean over ten splits (Salimans et al. 2016), shuffled as torch-fidelity does.

    A sum over images, so that processes need exchange no logits. torchmetrics' own gathers them, shuffles by each
    process's own randomness and changes the training's.

    Args:
        num: images in all
        classes: logits of an image
        splits: the images are dealt into, by torch-fidelity's permutation
    """

    higher_is_better = True
    full_state_update = False
    count: Tensor
    negative_entropy: Tensor
    probabilities: Tensor

    def __init__(self, num: int, classes: int, splits: int = 10):
        super().__init__()
        if num < splits:
            raise ValueError(
                f"evaluate.num is {num}, expected at least {splits} for the inception score's {splits} splits"
            )
        order = np.random.RandomState(2020).permutation(num)
        edges = [i * num // splits for i in range(splits + 1)]
        self.split = torch.empty(num, dtype=torch.int64)
        for i in range(splits):
            self.split[order[edges[i] : edges[i + 1]]] = i
        self.add_state("count", torch.zeros(splits, dtype=torch.float64), "sum")
        self.add_state("negative_entropy", torch.zeros(splits, dtype=torch.float64), "sum")
        self.add_state("probabilities", torch.zeros(splits, classes, dtype=torch.float64), "sum")

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Logits [n, K] of the images with some indices [n]."""
        logits, split = logits.double(), self.split[index].to(logits.device)
        p = logits.softmax(1)
        self.count.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))
        self.negative_entropy.index_add_(0, split, (p * logits.log_softmax(1)).sum(1))
        self.probabilities.index_add_(0, split, p)

    def compute(self) -> Tensor:
        marginal = self.probabilities / self.count[:, None]
        return (self.negative_entropy / self.count - torch.xlogy(marginal, marginal).sum(1)).exp().mean()


class Evaluator:
    """Scores a system against the held-out images, in what it can do.

    Samples and images are dealt to processes in fixed blocks, and sample i is drawn by a generator of its own, so a
    score does not depend on the number of processes. Features are summed in float64, never gathered.

    Args:
        accelerator: gives device and processes
        extractor: in eval mode, on the device
        tests: held-out shards of each data set
        data: size and channels
        num: samples from the prior
        seed: of the samples
        system: whose abilities are scored

    Raises:
        ValueError: there are too few samples or held-out images to compare.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        extractor: Extractor,
        tests: list[Shards],
        data: Data,
        num: int,
        seed: int,
        system: System,
    ):
        self.accelerator, self.extractor, self.tests, self.data = accelerator, extractor, tests, data
        self.num, self.seed = num, seed
        for test in tests:
            if len(test) < 2:
                raise ValueError(
                    f"data.test holds {len(test)} image, and a covariance needs two: bring more, say a thousand"
                )
        self.inception_score = None
        if system.can("sample") and extractor.classes:
            self.inception_score = self._shared(InceptionScore(num, extractor.classes))
        self.fids = [self._fid(extractor.dim) for _ in tests]
        sharpness = self._zero()
        for test, fid in zip(tests, self.fids, strict=True):
            for index in self._blocks(len(test)):
                image = self._read(test, index)
                fid.update(self._features(image)[0], real=True)
                sharpness += laplacian_variance(image).sum()
        self.real_sharpness = self._sum(sharpness) / sum(len(test) for test in tests)

    @property
    def facts(self) -> dict[str, str | int]:
        """What makes two scores of a name comparable: the extractor's weights and the held-out images."""
        return {
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "held_out": " ".join(test.fingerprint() for test in self.tests),
            "held_out_images": sum(len(test) for test in self.tests),
        }

    @torch.no_grad()
    def __call__(self, system: System) -> dict[str, float]:
        """Scores by name: measure and count of images / extractor.

        Raises:
            FloatingPointError: an image is not finite.
        """
        began = time.monotonic()
        assert not system.training, "evaluate the averaged system, in eval mode"
        scores: dict[str, float] = {}
        if system.can("sample"):
            scores |= self._samples(system)
        if system.can("reconstruct"):
            scores |= self._reconstructions(system)
        if system.can("translate"):
            scores |= self._translations(system, "a2b", self.tests[0], self.fids[1])
            scores |= self._translations(system, "b2a", self.tests[1], self.fids[0])
        return scores | {"eval/seconds": time.monotonic() - began}

    def _samples(self, system: System) -> dict[str, float]:
        """FID and IS of samples, their sharpness beside real images', and how well z is read back from them."""
        fid, count = self.fids[0], _count(self.num)
        fid.reset()
        if self.inception_score:
            self.inception_score.reset()
        sharpness, missed, size = self._zero(), self._zero(), self._zero()
        for index in self._blocks(self.num):
            z = self._prior(index, system.latent_shape)
            image = system.sample(z)
            pixels = to_uint8(image)
            features, logits = self._features(pixels)
            fid.update(features, real=False)
            if self.inception_score:
                self.inception_score.update(logits, index)
            sharpness += laplacian_variance(pixels).sum()
            if system.can("posterior"):
                missed += (system.posterior(image)[0] - z).double().square().sum()
                size += z.double().square().sum()
        scores = {
            f"eval/fid{count}/{self.extractor.name}": max(fid.compute().item(), 0.0),
            f"eval/sharpness{count}": self._sum(sharpness) / self.num / self.real_sharpness,
        }
        if self.inception_score:
            scores[f"eval/is{count}/{self.extractor.name}"] = self.inception_score.compute().item()
        if system.can("posterior"):
            scores[f"eval/z_recovered{count}"] = 1 - self._sum(missed) / self._sum(size)
        return scores

    def _reconstructions(self, system: System) -> dict[str, float]:
        """rFID, PSNR, SSIM and sharpness of held-out images' reconstructions, and how their codes fit the prior."""
        (test,), (fid,) = self.tests, self.fids
        fid.reset()
        psnr, ssim, sharpness = self._zero(), self._zero(), self._zero()
        codes = Codes(system.latent_shape[0], self.accelerator.device)
        for index in self._blocks(len(test)):
            image = self._read(test, index)
            reconstructed = to_uint8(system.reconstruct(normalize(image)))
            fid.update(self._features(reconstructed)[0], real=False)
            psnr += _psnr(image, reconstructed)
            similarity = structural_similarity_index_measure(
                reconstructed.float(), image.float(), data_range=255.0, reduction="none"
            )
            assert isinstance(similarity, Tensor)
            ssim += similarity.sum()
            sharpness += laplacian_variance(reconstructed).sum()
            codes.update(*system.posterior(normalize(image)))
        count = _count(len(test))
        gap, active = codes.compute(self.accelerator)
        return {
            f"eval/rfid{count}/{self.extractor.name}": max(fid.compute().item(), 0.0),
            f"eval/psnr{count}": self._sum(psnr) / len(test),
            f"eval/ssim{count}": self._sum(ssim) / len(test),
            f"eval/sharpness_reconstructed{count}": self._sum(sharpness) / len(test) / self.real_sharpness,
            f"eval/prior_gap{count}": gap,
            f"eval/active_units{count}": active,
        }

    def _translations(
        self, system: System, direction: Literal["a2b", "b2a"], source: Shards, fid: Metric
    ) -> dict[str, float]:
        """FID of translated images against the other domain's, and PSNR of the way there and back."""
        fid.reset()
        psnr = self._zero()
        for index in self._blocks(len(source)):
            image = self._read(source, index)
            translated = system.translate(normalize(image), direction)
            fid.update(self._features(to_uint8(translated))[0], real=False)
            back = system.translate(translated, "b2a" if direction == "a2b" else "a2b")
            psnr += _psnr(image, to_uint8(back))
        count = _count(len(source))
        return {
            f"eval/fid{count}/{direction}/{self.extractor.name}": max(fid.compute().item(), 0.0),
            f"eval/cycle_psnr{count}/{direction}": self._sum(psnr) / len(source),
        }

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.accelerator.device)

    def _sum(self, value: Tensor) -> float:
        return self.accelerator.reduce(value, "sum").item()

    def _blocks(self, count: int) -> Iterator[Tensor]:
        blocks = torch.arange(count).split(BLOCK)
        return iter(blocks[self.accelerator.process_index :: self.accelerator.num_processes])

    def _read(self, test: Shards, index: Tensor) -> Tensor:
        return read(test, index.numpy(), self.data.size, self.data.channels).image.to(self.accelerator.device)

    def _prior(self, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        return prior(self.seed, index, shape).to(self.accelerator.device)

    @torch.no_grad()
    def _features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            features, logits = self.extractor(image)
        return features.double(), logits

    def _fid(self, dim: int) -> Metric:
        fid = FrechetInceptionDistance(PassThrough(dim), reset_real_features=False)
        fid.orig_dtype = torch.float64  # a process that got no block would not know it
        return self._shared(fid.set_dtype(torch.float64))

    def _shared(self, metric: Metric) -> Metric:
        metric.dist_sync_fn = lambda state, group=None: [self.accelerator.reduce(state.clone(), "sum")]
        return metric.to(self.accelerator.device)


class Codes:
    """How codes of images fit the prior N(0, I), from sums over images (or over images and positions, of maps).

    Args:
        dim: numbers of a code, or of one position of it
        device: of the sums
    """

    def __init__(self, dim: int, device: torch.device):
        self.sums = torch.zeros(dim * dim + 2 * dim + 1, dtype=torch.float64, device=device)
        self.dim = dim

    def update(self, mean: Tensor, log_variance: Tensor) -> None:
        """Posteriors' means and log-variances [n, dim, ...]."""
        mean, variance = (
            x.double().flatten(2).transpose(1, 2).reshape(-1, self.dim) if x.dim() > 2 else x.double()
            for x in (mean, log_variance.exp())
        )
        parts = [mean.T @ mean, mean.sum(0), variance.sum(0), torch.tensor([len(mean)]).to(mean)]
        self.sums += torch.cat([part.flatten() for part in parts])

    def compute(self, accelerator: Accelerator) -> tuple[float, float]:
        """(prior gap, active units).

        The gap is the Frechet distance of the codes' N(m, C) and N(0, I): |m|^2 + tr(C + I - 2 C^(1/2)), where C is
        the covariance of draws from the posteriors in closed form. A unit is active where its mean varies by more
        than 0.01 between images (Burda et al. 2016, section 5.2).
        """
        total = accelerator.reduce(self.sums, "sum").cpu()
        products, mean, variance, count = total.split([self.dim**2, self.dim, self.dim, 1])
        mean = mean / count
        between = (products / count).view(self.dim, self.dim) - mean[:, None] * mean
        roots = torch.linalg.eigvalsh(between + (variance / count).diag()).clamp(min=0).sqrt()
        gap = mean.square().sum() + (roots - 1).square().sum()
        return gap.item(), (between.diag() > 0.01).double().sum().item()


def laplacian_variance(image: Tensor) -> Tensor:
    """Sharpness [n] of uint8 images [n, c, h, w]: the variance of the Laplacian of their grey values."""
    grey = image.double().mean(1)
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    return laplacian.flatten(1).var(1)


def _psnr(image: Tensor, other: Tensor) -> Tensor:
    """The sum over uint8 images of 10 log10(255^2 / mean squared error)."""
    error = (image.double() - other.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error.clamp(min=1e-10))).sum()


def _count(n: int) -> str:
    """2000 -> 2k, as in the names of scores."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)
