"""Scores of a run, the same on any number of processes: FID and IS of samples, rFID and PSNR of reconstructions."""

import time
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from data.loader import read
from data.shards import Shards
from models import System
from trainer.batch import key, normalize, to_uint8
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
    """Scores a system against the held-out images.

    Samples and images are dealt to processes in fixed blocks, and sample i is drawn by a generator of its own, so a
    score does not depend on the number of processes. Features are summed in float64, never gathered.

    Args:
        accelerator: gives device and processes
        extractor: in eval mode, on the device
        test: held-out shards
        data: size and channels
        num: samples from the prior
        seed: of the samples

    Raises:
        ValueError: there are too few samples or held-out images to compare.
    """

    def __init__(self, accelerator: Accelerator, extractor: Extractor, test: Shards, data: Data, num: int, seed: int):
        self.accelerator, self.extractor, self.test, self.data = accelerator, extractor, test, data
        self.num, self.seed = num, seed
        if len(test) < 2:
            raise ValueError(
                f"data.test holds {len(test)} image, and a covariance needs two: bring more, say a thousand"
            )
        self.fid, self.rfid = self._fid(extractor.dim), self._fid(extractor.dim)
        self.inception_score = self._shared(InceptionScore(num, extractor.classes))
        for index in self._blocks(len(test)):
            features, _ = self._features(self._read(index))
            self.fid.update(features, real=True)
            self.rfid.update(features, real=True)

    @property
    def facts(self) -> dict[str, str | int]:
        """What makes two scores of a name comparable: the extractor's weights and the held-out images."""
        return {
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "held_out": self.test.fingerprint(),
            "held_out_images": len(self.test),
        }

    @torch.no_grad()
    def __call__(self, system: System) -> dict[str, float]:
        """Scores by name: measure and count of images / extractor.

        Raises:
            FloatingPointError: an image is not finite.
        """
        began = time.monotonic()
        assert not system.training, "evaluate the averaged system, in eval mode"
        for metric in (self.fid, self.rfid, self.inception_score):
            metric.reset()
        for index in self._blocks(self.num):
            features, logits = self._features(to_uint8(system.sample(self._prior(index, system.latent_dim))))
            self.fid.update(features, real=False)
            self.inception_score.update(logits, index)
        psnr = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for index in self._blocks(len(self.test)):
            image = self._read(index)
            reconstructed = to_uint8(system.reconstruct(normalize(image)))
            self.rfid.update(self._features(reconstructed)[0], real=False)
            error = (image.double() - reconstructed.double()).square().flatten(1).mean(1)
            psnr += (10 * torch.log10(255**2 / error.clamp(min=1e-10))).sum()
        tested, name = _count(len(self.test)), self.extractor.name
        return {
            f"eval/fid{_count(self.num)}/{name}": max(self.fid.compute().item(), 0.0),
            f"eval/is{_count(self.num)}/{name}": self.inception_score.compute().item(),
            f"eval/rfid{tested}/{name}": max(self.rfid.compute().item(), 0.0),
            f"eval/psnr{tested}": self.accelerator.reduce(psnr, "sum").item() / len(self.test),
            "eval/seconds": time.monotonic() - began,
        }

    def _blocks(self, count: int) -> Iterator[Tensor]:
        blocks = torch.arange(count).split(BLOCK)
        return iter(blocks[self.accelerator.process_index :: self.accelerator.num_processes])

    def _read(self, index: Tensor) -> Tensor:
        return read(self.test, index.numpy(), self.data.size, self.data.channels).image.to(self.accelerator.device)

    def _prior(self, index: Tensor, latent_dim: int) -> Tensor:
        generator = torch.Generator()
        draws = [
            torch.randn(latent_dim, generator=generator.manual_seed(key(self.seed, "evaluate", i)))
            for i in index.tolist()
        ]
        return torch.stack(draws).to(self.accelerator.device)

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


def _count(n: int) -> str:
    """2000 -> 2k, as in the names of scores."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)
