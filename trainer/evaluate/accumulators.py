"""Sums over the features of images, and the statistics that they become."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.batch import visible_pixels
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.ranks import EvaluationRanks, raise_on_all_ranks
from trainer.exact_sum import ExactSum
from trainer.metrics.images import laplacian_variance
from trainer.metrics.inception_score import InceptionScore
from trainer.metrics.statistics import FeatureStatistics, Moments
from trainer.precision import strict_fp32

ImagesByIndex = Callable[[Tensor], Tensor]  # maps indices [n] to images, uint8 [n, channels, h, w]


class FeatureAccumulator:
    """Sums over the images of this rank's blocks.

    Args:
        places: int64 [images of the set], the row of each image among the kept features, or -1 for those not kept
    """

    def __init__(self, extractor: Extractor, places: Tensor, ranks: EvaluationRanks, inception_score: bool):
        self.extractor, self.places, self.ranks, self.device = extractor, places, ranks, ranks.device
        device = ranks.device
        self.moments = Moments(extractor.dim, device)
        self.score = InceptionScore(len(places), extractor.classes, device=device) if inception_score else None
        self.kept = torch.zeros(int(places.max()) + 1, extractor.dim, device=device)
        self.sharpness = ExactSum((), device)

    def update(self, index: Tensor, pixels: Tensor) -> None:
        """Add images [n, channels, h, w], as `visible_pixels` shows them, whose indices in the set are `index` [n].

        Raises:
            FloatingPointError: a feature is not finite.
            ValueError: the images have another type or shape.
        """
        pixels = visible_pixels(pixels)
        features, logits = extract_features(self.extractor, pixels)
        features = features.to(self.device)
        self.moments.update(features)
        places = self.places[index]
        self.kept[places[places >= 0].to(self.device)] = features[(places >= 0).to(self.device)]
        if self.score:
            self.score.update(logits.to(self.device), index)
        # Scaled to at most 62 an image; the sum over many images would leave the range in which it is exact otherwise.
        self.sharpness.add(laplacian_variance(pixels.to(self.device)).sum() / 2**16)

    def compute(self) -> FeatureStatistics:
        """Return the statistics over all ranks."""
        ranks = self.ranks
        score = InceptionScore.compute(ranks.sum(self.score.parts)) if self.score else None
        features = ranks.sum(self.kept) if len(self.kept) else None
        gaussian = Moments.gaussian(ranks.sum(self.moments.parts))
        return FeatureStatistics(gaussian, features, ranks.total(self.sharpness) * 2**16 / len(self.places), score)


@torch.no_grad()
def extract_statistics(
    extractor: Extractor, images: ImagesByIndex, places: Tensor, ranks: EvaluationRanks, inception_score: bool = False
) -> FeatureStatistics:
    """Return the statistics of a set of images, of which each rank makes or reads its own blocks by their indices."""
    accumulator = FeatureAccumulator(extractor, places, ranks, inception_score)

    def extract() -> None:
        with strict_fp32(ranks.accelerator.device):
            for index in ranks.blocks(len(places)):
                accumulator.update(index, images(index))

    raise_on_all_ranks(extract)
    return accumulator.compute()


@torch.no_grad()
def extract_features(extractor: Extractor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 features [n, D] and logits [n, K] of images, uint8 [n, 1 or 3, h, w].

    Raises:
        ValueError: the images or the features have another type or shape.
        FloatingPointError: a feature is not finite.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"expected images as uint8 [n, 1 or 3, h, w]; got {pixels.dtype} {list(pixels.shape)}")
    # A grey image's strides fit both memory formats, and a convolution rounds differently in each.
    laid_out = pixels.clone(memory_format=torch.contiguous_format)
    with strict_fp32(pixels.device):
        features, logits = extractor(laid_out)
    if features.shape != (expected := (len(pixels), extractor.dim)):
        raise ValueError(f"expected features {[*expected]} from {extractor.name}; got {[*features.shape]}")
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).sum())
        raise FloatingPointError(f"{extractor.name}'s features of {bad} of {len(pixels)} images are not finite")
    return features.float(), logits
