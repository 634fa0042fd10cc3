"""Inception score (Salimans et al. 2016)."""

import numpy as np
import torch
from torch import Tensor

from trainer.exact_sum import ExactSum
from trainer.metrics.statistics import SEED, FeatureStatistics, MetricRanks, ReferenceStatistics, short


def inception_score(fake: FeatureStatistics, real: ReferenceStatistics, ranks: MetricRanks) -> dict[str, float]:
    """Return the mean and the standard deviation over the splits, if the extractor has classes."""
    if fake.inception_score is None:
        return {}
    mean, std = fake.inception_score
    return {f"is{short(fake.gaussian.n)}": mean, f"is_std{short(fake.gaussian.n)}": std}


class InceptionScore(ExactSum):
    """Sums for exp E KL(p(y|x) || p(y)) over splits of images (Salimans et al. 2016), shuffled as by torch-fidelity.

    Args:
        num: number of images
        classes: number of logits of an image
        splits: number of splits
        device: device of the sums

    Raises:
        ValueError: there are fewer images than splits.
    """

    def __init__(self, num: int, classes: int, splits: int = 10, device: torch.device | str = "cpu"):
        if num < splits:
            raise ValueError(
                f"the inception score is a mean over {splits} splits and needs at least {splits} images; got {num}. "
                "Use more images, or leave out the metric is"
            )
        order = np.random.RandomState(SEED).permutation(num)
        edges = [i * num // splits for i in range(splits + 1)]
        self.split = torch.empty(num, dtype=torch.int64)
        for i in range(splits):
            self.split[order[edges[i] : edges[i + 1]]] = i
        # Per split: the number of images, the sum of their negative entropies, the sums of their probabilities.
        super().__init__((splits, classes + 2), torch.device(device))

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Add the logits [n, classes] of the images with some indices [n]."""
        logits = logits.double()
        p = logits.softmax(1)
        terms = torch.cat([torch.ones_like(p[:, :1]), (p * logits.log_softmax(1)).sum(1, keepdim=True), p], 1)
        # A matrix product, since index_add_ on a GPU adds in an order that depends on its threads.
        dealt = self.split[index] == torch.arange(self.parts.shape[1])[:, None]
        self.add(dealt.to(terms) @ terms)

    @staticmethod
    def compute(parts: Tensor) -> tuple[float, float]:
        """Return the mean and standard deviation over the splits, from `parts` summed over ranks."""
        total = parts.sum(0)
        count, entropy, marginal = total[:, 0], total[:, 1] / total[:, 0], total[:, 2:] / total[:, :1]
        scores = (entropy - torch.xlogy(marginal, marginal).sum(1)).exp()
        assert count.min() > 0
        return scores.mean().item(), scores.std(correction=0).item()
