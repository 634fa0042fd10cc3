"""Scores that compare the features of two sets of images: FID, inception score, KID, precision, recall and the like."""

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from trainer.evaluate.ranks import EvaluationRanks
from trainer.metrics import METRICS
from trainer.metrics.fid import frechet
from trainer.metrics.statistics import FeatureStatistics, ReferenceStatistics


class FeatureScores:
    """Scores of feature statistics, whose work the ranks divide: those of METRICS that are requested."""

    def __init__(self, extractor: str, requested: Collection[str], ranks: EvaluationRanks):
        self.extractor, self.requested, self.ranks = extractor, requested, ranks
        # A new thread would use as many threads for its arithmetic as there are cores, and round differently.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self.pending: list[tuple[str, Future[float] | None]] = []

    def compare(self, statistics: FeatureStatistics, reference: ReferenceStatistics, of: str = "") -> dict[str, float]:
        """Return the requested scores of images against real ones; `finish` fills in those of the background.

        Args:
            of: what the names have before the extractor's, such as "/mixture"
        """
        scores: dict[str, float] = {}
        for metric in (metric for name, metric in METRICS.items() if name in self.requested):
            for name, value in metric(statistics, reference, self.ranks).items():
                name = f"eval/{name}{of}/{self.extractor}"
                scores |= self.start(name, value) if callable(value) else {name: value}
        return scores

    def start_fid(self, name: str, fake: FeatureStatistics, real: ReferenceStatistics) -> dict[str, float]:
        """Start to compute the FID of images to real ones, which becomes the score eval/NAME/EXTRACTOR."""
        return self.start(f"eval/{name}/{self.extractor}", lambda: frechet(fake.gaussian, real.gaussian, real.root))

    def start(self, name: str, work: Callable[[], float]) -> dict[str, float]:
        """Start to compute a score in the background, on one rank; return its name with a NaN as a placeholder."""
        accelerator, future = self.ranks.accelerator, None
        if len(self.pending) % accelerator.num_processes == accelerator.process_index:
            future = self.pool.submit(work)
        self.pending.append((name, future))
        return {name: float("nan")}

    def finish(self) -> dict[str, float]:
        """Wait for the scores that were started, and return them by name on all ranks."""
        found = self.ranks.run(lambda: [future.result() if future else 0.0 for _, future in self.pending])
        values = torch.tensor(found, dtype=torch.float64, device=self.ranks.device)
        return dict(zip([name for name, _ in self.pending], self.ranks.sum(values).tolist(), strict=True))
