"""Scores of a system's translations from one domain to another."""

from typing import Literal

from torch import Tensor

from data.loader import Samples
from models import System
from trainer.batch import normalize
from trainer.evaluate.feature_scores import FeatureScores
from trainer.evaluate.image_features import ImageFeatures
from trainer.metrics.images import psnr
from trainer.metrics.statistics import ReferenceStatistics, short


def translation_scores(
    system: System,
    direction: Literal["a2b", "b2a"],
    source: Samples,
    target: ReferenceStatistics,
    images: ImageFeatures,
    scores: FeatureScores,
) -> dict[str, float]:
    """Return the FID of translated images to the target domain, and their PSNR after the translation there and back.

    Args:
        system: a system that can translate, in eval mode
        direction: of the translation
        source: images of the domain that is translated
        target: statistics of images of the other domain
        images: reads the images, and gives features
        scores: computes the FID in the background
    """
    cycle = images.sum()

    def translated(index: Tensor) -> Tensor:
        image = images.read(source, index).image
        there = system.translate(normalize(image), direction)
        back = system.translate(there, "b2a" if direction == "a2b" else "a2b")
        device = images.ranks.device
        cycle.add(psnr(image.to(device), images.pixels(back).to(device)).sum())
        return images.pixels(there)

    statistics, count = images.statistics(translated, len(source)), short(len(source))
    return {
        **scores.start_fid(f"fid{count}/{direction}", statistics, target),
        f"eval/cycle_psnr{count}/{direction}": images.ranks.total(cycle) / len(source),
    }
