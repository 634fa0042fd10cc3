"""Sums over the images that one process sees, and the statistics they become."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.batch import strict_fp32
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.metrics import ExactSum, Gaussian, InceptionScore, Moments, laplacian_variance


class Distance(Protocol):
    """LPIPS, or the like: uint8 images [n, c, h, w], twice, to [n]."""

    name: str
    sha256: str  # of its weights

    def __call__(self, image: Tensor, other: Tensor) -> Tensor: ...


class FeatureStatistics(NamedTuple):
    """What is known of a set of images once all processes' sums are added up.

    Args:
        gaussian: of their features
        features: float32 [kept, D], in order of their images, None where none were kept
        sharpness: mean variance of their Laplacian
        inception_score: mean and standard deviation over its splits, None where it was not asked for
    """

    gaussian: Gaussian
    features: Tensor | None
    sharpness: float
    inception_score: tuple[float, float] | None


class FeatureAccumulator:
    """Sums over a set of images, of the blocks that this process sees.

    Args:
        extractor: of their features
        num: images of the set
        places: int64 [num], of each image among the features that are kept, -1 for those that are not
        scored: whether an inception score is wanted
        device: of the sums
    """

    def __init__(self, extractor: Extractor, num: int, places: Tensor, scored: bool, device: torch.device):
        self.extractor, self.num, self.places, self.device = extractor, num, places, device
        self.moments = Moments(extractor.dim, device)
        self.score = InceptionScore(num, extractor.classes, device=device) if scored else None
        self.kept = torch.zeros(int(places.max()) + 1, extractor.dim, device=device)
        self.sharpness = ExactSum((), device)

    def update(self, index: Tensor, pixels: Tensor) -> None:
        """Images with some indices [n], uint8 [n, c, h, w].

        Raises:
            FloatingPointError: a feature is not finite.
            ValueError: what the images are like is not what the extractor takes.
        """
        features, logits = extract_features(self.extractor, pixels)
        features = features.to(self.device)
        self.moments.update(features)
        places = self.places[index]
        self.kept[places[places >= 0].to(self.device)] = features[(places >= 0).to(self.device)]
        if self.score:
            self.score.update(logits.to(self.device), index)
        # At most 62 an image, or the sum of many would leave the range in which it is exact.
        self.sharpness.add(laplacian_variance(pixels.to(self.device)).sum() / 2**16)

    def close(self, add_up: Callable[[Tensor], Tensor]) -> FeatureStatistics:
        """Add up all processes' sums."""
        score = InceptionScore.compute(add_up(self.score.parts)) if self.score else None
        features = add_up(self.kept) if len(self.kept) else None
        gaussian = Moments.gaussian(add_up(self.moments.parts))
        sharpness = add_up(self.sharpness.parts).sum().item() * 2**16 / self.num
        return FeatureStatistics(gaussian, features, sharpness, score)


@torch.no_grad()
def extract_features(extractor: Extractor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """An extractor's float32 features [n, D] and logits of images, uint8 [n, 1 or 3, h, w].

    Raises:
        ValueError: these are no such images.
        FloatingPointError: a feature is not finite.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"expected images as uint8 [n, 1 or 3, h, w], found {pixels.dtype} {list(pixels.shape)}")
    # A grey image's strides may say channels first or last, and a convolution rounds otherwise in either.
    laid_out = pixels.clone(memory_format=torch.contiguous_format)
    with strict_fp32(pixels.device):
        features, logits = extractor(laid_out)
    if features.shape != (len(pixels), extractor.dim):
        raise ValueError(
            f"{extractor.name} gives features {list(features.shape)} of {len(pixels)} images, expected "
            f"[{len(pixels)}, {extractor.dim}]"
        )
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).sum())
        raise FloatingPointError(f"{extractor.name}'s features of {bad} of {len(pixels)} images are not finite")
    return features.float(), logits
