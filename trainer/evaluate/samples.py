"""The samples of a system that are scored, and their scores."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models import System
from trainer.classes import in_turn
from trainer.evaluate.accumulators import ImagesByIndex
from trainer.evaluate.feature_scores import FeatureScores
from trainer.evaluate.image_features import ImageFeatures
from trainer.metrics import OF_SUMS
from trainer.metrics.statistics import FeatureStatistics, ReferenceStatistics, short
from trainer.precision import strict_fp32
from trainer.samplers import Sampler


class SampleScores:
    """Draws samples, each by a generator of its own, and scores them against real images.

    Args:
        images: gives images and features
        scores: computes the scores of features
        num: number of samples
        seed: seed of the samples
        metrics: metrics of samples, of METRICS
        kept: number of samples whose features are kept for KID and precision
        sampler: what z is drawn from (default: N(0, I)); the scores are named after it
        labels: classes that samples take in turn, of a system with classes (default: all of the system's)
    """

    def __init__(
        self,
        images: ImageFeatures,
        scores: FeatureScores,
        *,
        num: int,
        seed: int,
        metrics: Sequence[str],
        kept: int,
        sampler: Sampler | None,
        labels: np.ndarray | None,
    ):
        self.images, self.feature_scores, self.num, self.seed = images, scores, num, seed
        self.metrics, self.kept = metrics, kept if {*metrics} - OF_SUMS else 0
        self.sampler, self.labels = sampler, labels
        self.of = f"/{sampler.name}" if sampler and sampler.name else ""

    @torch.no_grad()
    def draw(self, system: System, index: Tensor) -> Tensor:
        """Return the samples with these indices [n], [n, c, h, w] in the data's depth."""
        with strict_fp32(self.images.device):
            return self.images.pixels(self._sample(system, index, self._codes(system, index)))

    def statistics(self, images: ImagesByIndex) -> FeatureStatistics:
        """Return the statistics of `num` images, with what the metrics of samples need."""
        return self.images.statistics(images, self.num, self.kept, "is" in self.metrics)

    def compare(self, statistics: FeatureStatistics, reference: ReferenceStatistics) -> dict[str, float]:
        """Return the scores of samples by the metrics, as `FeatureScores.compare` does."""
        return self.feature_scores.compare(statistics, reference, self.of)

    def __call__(self, system: System, reference: ReferenceStatistics) -> dict[str, float]:
        """Return the scores by the metrics, the samples' sharpness, and how well the encoder recovers z of the prior.

        Its R² takes it that z has the mean 0, which other samplers' does not have.
        """
        error, size = self.images.sum(), self.images.sum()
        device, total = self.images.ranks.device, self.images.ranks.total
        recovers = system.can("posterior") and not self.of

        def images(index: Tensor) -> Tensor:
            z = self._codes(system, index)
            image = self._sample(system, index, z)
            pixels = self.images.pixels(image)
            if recovers:
                error.add((system.posterior(image)[0] - z).to(device).double().square().sum())
                size.add(z.to(device).double().square().sum())
            return pixels

        statistics = self.statistics(images)
        scores = self.compare(statistics, reference)
        if reference.sharpness:
            scores[f"eval/sharpness{short(self.num)}{self.of}"] = statistics.sharpness / reference.sharpness
        if recovers:
            scores[f"eval/z_recovered{short(self.num)}"] = 1 - total(error) / total(size)
        return scores

    def _codes(self, system: System, index: Tensor) -> Tensor:
        draw = self.sampler or Sampler("prior", system.latent_shape)
        return draw(self.seed, index).to(self.images.device)

    def _sample(self, system: System, index: Tensor, z: Tensor) -> Tensor:
        return system.sample(z, *in_turn(system, index.to(z.device), self.labels))
