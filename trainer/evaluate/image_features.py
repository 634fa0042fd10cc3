"""The images that are scored: how they are read and rounded, and the statistics of their features."""

from pathlib import Path

import torch
from torch import Tensor

from data.loader import Images, Samples, read
from trainer.batch import to_pixels
from trainer.config.settings import DataConfig
from trainer.evaluate import reference
from trainer.evaluate.accumulators import ImagesByIndex, extract_statistics
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.ranks import EvaluationRanks
from trainer.exact_sum import ExactSum
from trainer.metrics.statistics import FeatureStatistics, ReferenceStatistics


class ImageFeatures:
    """Images of one size and depth, and their features by one extractor, of which each rank computes its part.

    Args:
        extractor: feature extractor, in eval mode and on the device
        data: image size, channels and bits
        ranks: ranks of the evaluation
    """

    def __init__(self, extractor: Extractor, data: DataConfig, ranks: EvaluationRanks):
        self.extractor, self.data, self.ranks = extractor, data, ranks
        self.device = ranks.accelerator.device

    def read(self, images: Samples, index: Tensor) -> Images:
        """Return the images with these indices [n], on the device."""
        found = read(images, index.numpy(), *self.data.format)
        return found._replace(image=found.image.to(self.device), label=found.label.to(self.device))

    def pixels(self, image: Tensor) -> Tensor:
        """Return images in [-1, 1], [n, c, h, w], in the data's depth, as they would be saved."""
        return to_pixels(image, self.data.bits)

    def sum(self) -> ExactSum:
        """Return a sum of scalars over this rank's images, 0 as yet."""
        return ExactSum((), self.ranks.device)

    def statistics(
        self, images: ImagesByIndex, num: int, kept: int = 0, inception_score: bool = False
    ) -> FeatureStatistics:
        """Return the statistics of `num` images, with the features of the first `kept` of them."""
        places = torch.arange(num).where(torch.arange(num) < kept, -1)
        return extract_statistics(self.extractor, images, places, self.ranks, inception_score)

    def reference(self, images: Samples | ReferenceStatistics, kept: int, location: Path | None) -> ReferenceStatistics:
        """Return the statistics of real images, as `load_or_compute` does; those that are given as such stay."""
        if isinstance(images, ReferenceStatistics):
            return images.to(self.ranks.device)
        return reference.load_or_compute(
            images,
            lambda index: self.read(images, index).image,
            extractor=self.extractor,
            data=self.data,
            kept=kept,
            location=location,
            ranks=self.ranks,
        )
