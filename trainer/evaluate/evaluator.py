"""Scores of a system's samples, reconstructions, codes and translations, the same on any number of processes."""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from data.images import plain
from data.loader import Samples
from models import System
from trainer.classes import shuffled_labels
from trainer.config.settings import DataConfig
from trainer.evaluate.accumulators import ImagesByIndex
from trainer.evaluate.budget import Budget
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.extractors.lpips import LPIPS
from trainer.evaluate.feature_scores import FeatureScores
from trainer.evaluate.image_features import ImageFeatures
from trainer.evaluate.ranks import BLOCK, EvaluationRanks
from trainer.evaluate.reconstructions import reconstruction_scores
from trainer.evaluate.samples import SampleScores
from trainer.evaluate.translations import translation_scores
from trainer.metrics import METRICS
from trainer.metrics.inception_score import InceptionScore
from trainer.metrics.statistics import ReferenceStatistics
from trainer.samplers import Sampler

KEPT = 10_000  # images whose features are kept for KID and precision; all other scores are computed from sums


class Evaluator:
    """An evaluator that scores a system against held-out images.

    Samples of a system with classes take the labels of the held-out images in turn, in an order that the seed shuffles,
    so that both have the same shares of classes; without images, the classes themselves.

    Images are dealt to ranks in blocks, and sample i is drawn by a generator of its own. Results of blocks are added
    by `ExactSum`, so no score depends on the number of ranks. If one rank fails, all ranks fail.

    Args:
        accelerator: gives device and ranks
        extractor: feature extractor, in eval mode and on the device
        held_out: held-out images of each data set, or their statistics if no reconstructions are scored
        data: image size and channels
        num: number of samples drawn from the prior, at least 2
        seed: seed of the samples
        system: a system of the kind that is scored; None if only `score` is used
        metrics: metrics of samples, of METRICS
        statistics: folder that keeps the statistics of the held-out images, or one .npz file
        lpips: the network that scores reconstructions by LPIPS; None for no such score
        kept: number of images whose features are kept for KID and precision
        sampler: what z is drawn from (default: N(0, I)); the scores of samples are named after it

    Raises:
        ValueError: there are too few samples or held-out images, kept statistics are of other images, or ranks have
            different extractors.
        DataError: a held-out image is damaged, or has none of the system's classes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        extractor: Extractor,
        held_out: Sequence[Samples | ReferenceStatistics],
        data: DataConfig,
        *,
        num: int,
        seed: int,
        system: System | None = None,
        metrics: Sequence[str] = tuple(METRICS),
        statistics: Path | None = None,
        lpips: LPIPS | None = None,
        kept: int = KEPT,
        sampler: Sampler | None = None,
    ):
        self.accelerator, self.extractor, self.held_out, self.data = accelerator, extractor, held_out, data
        self.num, self.seed, self.metrics, self.lpips, self.kept = num, seed, [*metrics], lpips, kept
        self.sampler, self.ranks = sampler, EvaluationRanks(accelerator)
        _check_eval_mode("the extractor", extractor)
        _check_same_networks({network.name: network.sha256 for network in (extractor, lpips) if network})
        _check_held_out(held_out, statistics)
        self.draws = num > 0 and (system is None or system.can("sample"))
        if "is" in self.sample_metrics and self.draws:
            InceptionScore(num, extractor.classes)  # raises if there are too few samples
        labels = None
        if system and not isinstance(held_out[0], ReferenceStatistics):
            labels = shuffled_labels(system, held_out[0], seed)
        self.images = ImageFeatures(extractor, data, self.ranks)
        self.scores = FeatureScores(extractor.name, metrics, self.ranks)
        self.samples = SampleScores(
            self.images,
            self.scores,
            num=num,
            seed=seed,
            metrics=self.sample_metrics,
            kept=kept,
            sampler=sampler,
            labels=labels,
        )
        self.references = [self.images.reference(images, kept, statistics) for images in held_out]
        self.budget = Budget()

    @property
    def sample_metrics(self) -> list[str]:
        """The metrics of samples, without the inception score if the extractor has no classes."""
        return [name for name in self.metrics if name != "is" or self.extractor.classes]

    @property
    def held_out_images(self) -> int:
        """The number of held-out images, of the smallest of several data sets; 0 if statistics do not tell it."""
        return min(reference.gaussian.n for reference in self.references)

    @property
    def missing(self) -> str | None:
        """Why samples get no inception score although it is among the metrics; None if that is not so."""
        if self.metrics == self.sample_metrics or not self.draws:
            return None
        return (
            f"no inception score (is): {self.extractor.name} is no classifier, as are inception and, for images with "
            "labels, demo-cnn"
        )

    @property
    def facts(self) -> dict[str, str | int]:
        """What makes two scores of the same name comparable: the extractor's weights and the held-out images."""
        return {
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "held_out": " ".join(str(reference.meta.get("images", "unknown")) for reference in self.references),
            "held_out_images": self.held_out_images,
        }

    @property
    def recipe(self) -> dict[str, Any]:
        """The other settings that are needed to repeat the evaluation."""
        libraries = ("torch", "torch-fidelity", "torchmetrics", "numpy", "pillow", "simplejpeg")
        return {
            "num": self.num,
            "metrics": [*self.metrics],
            "kept": self.kept,
            "resize": self.extractor.resize,
            **({"lpips_sha256": self.lpips.sha256} if self.lpips else {}),
            **({"sampler": self.sampler.recipe} if self.sampler else {}),
            "image_size": plain(self.data.size),
            "channels": self.data.channels,
            "bits": self.data.bits,
            "block": BLOCK,
            "versions": {name: version(name) for name in libraries},
        }

    @torch.no_grad()
    def __call__(self, system: System) -> dict[str, float]:
        """Return the scores of a system by name: measure and number of images / extractor.

        Raises:
            FloatingPointError: an image is not finite.
            RuntimeError: a network is not in eval mode, or another rank failed.
        """
        _check_eval_mode("the averaged system", system)
        real = [images for images in self.held_out if not isinstance(images, ReferenceStatistics)]

        def score() -> dict[str, float]:
            scores: dict[str, float] = {}
            common = self.images, self.scores
            if self.draws and system.can("sample"):
                scores |= self.samples(system, self.references[0])
            if system.can("reconstruct") and real:
                scores |= reconstruction_scores(system, real[0], self.references[0], *common, self.lpips)
            if system.can("translate"):
                scores |= translation_scores(system, "a2b", real[0], self.references[1], *common)
                scores |= translation_scores(system, "b2a", real[1], self.references[0], *common)
            return scores

        return self._timed(score)

    @torch.no_grad()
    def score(self, images: ImagesByIndex) -> dict[str, float]:
        """Return the scores of `num` images, which `images` gives by their indices."""
        return self._timed(lambda: self.samples.compare(self.samples.statistics(images), self.references[0]))

    def _timed(self, score: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The scores, with the seconds that they took and the share of the run's time that all evaluations took."""
        _check_eval_mode("the extractor", self.extractor)
        began = time.monotonic()
        try:
            scores = score()
            scores |= self.scores.finish()
        finally:
            self.scores.pending.clear()
        self.budget.add(time.monotonic() - began)
        return scores | {"eval/seconds": self.budget.last, "eval/seconds_share": self.budget.share}


def _check_held_out(held_out: Sequence[Samples | ReferenceStatistics], statistics: Path | None) -> None:
    if statistics and statistics.suffix == ".npz" and len(held_out) > 1:
        raise ValueError(f"the statistics of {len(held_out)} sets of images need a folder; {statistics} is one file")
    for images in held_out:
        if not isinstance(images, ReferenceStatistics) and len(images) < 2:
            raise ValueError(f"FID needs at least 2 real images, better a thousand; the set has {len(images)}")


def _check_same_networks(own: dict[str, str]) -> None:
    """Ranks with different networks would add up features that are not comparable."""
    found = gather_object([own])
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"the scores' networks differ between processes: {found[0]} on process 0, {other} on process {rank}. "
                "Give all processes the same files of weights, and the same TORCH_HOME"
            )


def _check_eval_mode(name: str, network: object) -> None:
    modules = network.named_modules() if isinstance(network, nn.Module) else ()
    if training := [module_name for module_name, module in modules if module.training]:
        raise RuntimeError(f"{name} must be in eval mode, but {training[0] or 'it'} is in training mode")
