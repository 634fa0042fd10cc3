"""Scores of a system's samples, reconstructions, codes and translations, the same on any number of processes."""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from data.images import plain
from data.loader import Images, Samples, read
from models import System
from trainer.batch import normalize, to_pixels
from trainer.classes import in_turn, shuffled_labels
from trainer.config.settings import DataConfig
from trainer.evaluate import reference
from trainer.evaluate.accumulators import ImagesByIndex, extract_statistics, first_places
from trainer.evaluate.budget import Budget
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.extractors.lpips import LPIPS
from trainer.evaluate.feature_scores import FeatureScores
from trainer.evaluate.ranks import BLOCK, EvaluationRanks
from trainer.exact_sum import ExactSum
from trainer.metrics import METRICS, OF_SUMS
from trainer.metrics.fid import frechet
from trainer.metrics.images import Codes, Spectrum, psnr, ssim
from trainer.metrics.inception_score import InceptionScore
from trainer.metrics.statistics import FeatureStatistics, ReferenceStatistics, short
from trainer.precision import strict_fp32
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
        self.sampler, self.of = sampler, f"/{sampler.name}" if sampler and sampler.name else ""
        self.ranks = EvaluationRanks(accelerator)
        _check_eval_mode("the extractor", extractor)
        _check_same_networks({network.name: network.sha256 for network in (extractor, lpips) if network})
        if statistics and statistics.suffix == ".npz" and len(held_out) > 1:
            raise ValueError(
                f"the statistics of {len(held_out)} sets of images need a folder; {statistics} is one file"
            )
        for images in held_out:
            if not isinstance(images, ReferenceStatistics) and len(images) < 2:
                raise ValueError(f"FID needs at least 2 real images, better a thousand; the set has {len(images)}")
        self.draws = system is None or system.can("sample")
        if "is" in self.sample_metrics and self.draws:
            InceptionScore(num, extractor.classes)  # raises if there are too few samples
        self.labels = None
        if system and not isinstance(held_out[0], ReferenceStatistics):
            self.labels = shuffled_labels(system, held_out[0], seed)
        self.features = FeatureScores(f"{self.of}/{extractor.name}"[1:], metrics, self.ranks)
        self.references = [self._reference(images, statistics) for images in held_out]
        self.budget = Budget()

    @property
    def sample_metrics(self) -> list[str]:
        """The metrics of samples, without the inception score if the extractor has no classes."""
        return [name for name in self.metrics if name != "is" or self.extractor.classes]

    @property
    def held_out_images(self) -> int:
        """The number of held-out images of all data sets."""
        return sum(reference.gaussian.n for reference in self.references)

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

        def score() -> dict[str, float]:
            scores: dict[str, float] = {}
            if system.can("sample"):
                scores |= self._samples(system)
            if system.can("reconstruct") and not isinstance(self.held_out[0], ReferenceStatistics):
                scores |= self._reconstructions(system, self.held_out[0])
            if system.can("translate"):
                scores |= self._translations(system, "a2b", self.held_out[0], self.references[1])
                scores |= self._translations(system, "b2a", self.held_out[1], self.references[0])
            return scores

        return self._timed(score)

    @torch.no_grad()
    def score(self, images: ImagesByIndex) -> dict[str, float]:
        """Return the scores of `num` images, which `images` gives by their indices."""
        return self._timed(lambda: self.features.compare(self._sample_statistics(images), self.references[0]))

    def _timed(self, score: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The scores, with the seconds that they took and the share of the run's time that all evaluations took."""
        _check_eval_mode("the extractor", self.extractor)
        began = time.monotonic()
        try:
            scores = score()
            scores |= self.features.finish()
        finally:
            self.features.pending.clear()
        self.budget.add(time.monotonic() - began)
        return scores | {"eval/seconds": self.budget.last, "eval/seconds_share": self.budget.share}

    @torch.no_grad()
    def samples(self, system: System, index: Tensor) -> Tensor:
        """Return the samples that are scored, [n, c, h, w] in the data's depth, given the indices [n] of a block."""
        with strict_fp32(self.accelerator.device):
            return self._pixels(self._sample(system, index, self._draw(system, index)))

    def _draw(self, system: System, index: Tensor) -> Tensor:
        draw = self.sampler or Sampler("prior", system.latent_shape)
        return draw(self.seed, index).to(self.accelerator.device)

    def _sample(self, system: System, index: Tensor, z: Tensor) -> Tensor:
        return system.sample(z, *in_turn(system, index.to(z.device), self.labels))

    def _samples(self, system: System) -> dict[str, float]:
        """FID, IS, KID and the like of samples, their sharpness, and how well the encoder recovers their z."""
        error, size = self._sum(), self._sum()

        def images(index: Tensor) -> Tensor:
            z = self._draw(system, index)
            image = self._sample(system, index, z)
            pixels = self._pixels(image)
            if system.can("posterior"):
                error.add((system.posterior(image)[0] - z).to(self.ranks.device).double().square().sum())
                size.add(z.to(self.ranks.device).double().square().sum())
            return pixels

        statistics = self._sample_statistics(images)
        scores = self.features.compare(statistics, self.references[0])
        if self.references[0].sharpness:
            scores[f"eval/sharpness{short(self.num)}{self.of}"] = statistics.sharpness / self.references[0].sharpness
        if system.can("posterior"):
            scores[f"eval/z_recovered{short(self.num)}{self.of}"] = 1 - self.ranks.total(error) / self.ranks.total(size)
        return scores

    def _reconstructions(self, system: System, held_out: Samples) -> dict[str, float]:
        """FID, PSNR, SSIM and sharpness of held-out images' reconstructions, and how their codes fit the prior."""
        device, reference = self.ranks.device, self.references[0]
        sums = {name: self._sum() for name in ("psnr", "ssim", *([self.lpips.name] if self.lpips else []))}
        codes, spectrum = Codes(system.latent_shape[0], device), Spectrum(device)
        maps = len(system.latent_shape) == 3 and min(system.latent_shape[1:]) > 1

        def images(index: Tensor) -> Tensor:
            image, label, *_ = self._read(held_out, index)
            reconstructed = self._pixels(system.reconstruct(normalize(image), *system.told(label)))
            original, made = image.to(device), reconstructed.to(device)
            values = {"psnr": psnr(original, made), "ssim": ssim(made, original)}
            if self.lpips:
                values[self.lpips.name] = self.lpips(image, reconstructed)
            for name, value in values.items():
                sums[name].add(value.to(device).double().sum())
            posterior = [part.to(device) for part in system.posterior(normalize(image))]
            for sums_of_codes in (codes, spectrum) if maps else (codes,):
                sums_of_codes.update(*posterior)
            return reconstructed

        statistics, count = self._statistics(images, len(held_out)), short(len(held_out))
        gap, active = codes.compute(self.ranks.sum(codes.parts))
        high = (
            {f"eval/spectrum{count}": spectrum.compute(self.ranks.sum(spectrum.parts), len(held_out))} if maps else {}
        )
        return {
            **self._start_fid(f"rfid{count}", statistics, reference),
            **{f"eval/{name}{count}": self.ranks.total(value) / len(held_out) for name, value in sums.items()},
            f"eval/sharpness_reconstructed{count}": statistics.sharpness / (reference.sharpness or float("nan")),
            f"eval/prior_gap{count}": gap,
            f"eval/active_units{count}": active,
            **high,
        }

    def _translations(
        self,
        system: System,
        direction: Literal["a2b", "b2a"],
        source: Samples | ReferenceStatistics,
        target: ReferenceStatistics,
    ) -> dict[str, float]:
        """FID of translated images to the target domain, and PSNR after the translation there and back."""
        assert not isinstance(source, ReferenceStatistics)
        cycle = self._sum()

        def images(index: Tensor) -> Tensor:
            image = self._read(source, index).image
            translated = system.translate(normalize(image), direction)
            back = system.translate(translated, "b2a" if direction == "a2b" else "a2b")
            cycle.add(psnr(image.to(self.ranks.device), self._pixels(back).to(self.ranks.device)).sum())
            return self._pixels(translated)

        statistics, count = self._statistics(images, len(source)), short(len(source))
        return {
            **self._start_fid(f"fid{count}/{direction}", statistics, target),
            f"eval/cycle_psnr{count}/{direction}": self.ranks.total(cycle) / len(source),
        }

    def _sample_statistics(self, images: ImagesByIndex) -> FeatureStatistics:
        kept = self.kept if {*self.metrics} - OF_SUMS else 0
        places, inception_score = first_places(self.num, kept), "is" in self.sample_metrics
        return extract_statistics(self.extractor, images, places, self.ranks, inception_score)

    def _statistics(self, images: ImagesByIndex, num: int) -> FeatureStatistics:
        return extract_statistics(self.extractor, images, first_places(num, 0), self.ranks)

    def _start_fid(self, name: str, fake: FeatureStatistics, real: ReferenceStatistics) -> dict[str, float]:
        name = f"eval/{name}/{self.extractor.name}"
        return self.features.start(name, lambda: frechet(fake.gaussian, real.gaussian, real.root))

    def _reference(self, images: Samples | ReferenceStatistics, location: Path | None) -> ReferenceStatistics:
        if isinstance(images, ReferenceStatistics):
            return images.to(self.ranks.device)
        return reference.load_or_compute(
            images,
            lambda index: self._read(images, index).image,
            extractor=self.extractor,
            data=self.data,
            kept=self.kept,
            location=location,
            ranks=self.ranks,
        )

    def _pixels(self, image: Tensor) -> Tensor:
        return to_pixels(image, self.data.bits)

    def _sum(self) -> ExactSum:
        return ExactSum((), self.ranks.device)

    def _read(self, images: Samples, index: Tensor) -> Images:
        found = read(images, index.numpy(), *self.data.format)
        device = self.accelerator.device
        return found._replace(image=found.image.to(device), label=found.label.to(device))


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
