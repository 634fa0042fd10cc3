"""Scores that compare the features of two sets of images: FID, inception score, KID, precision, recall and the like."""

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from trainer.evaluate import metrics
from trainer.evaluate.accumulators import FeatureStatistics
from trainer.evaluate.metrics import Gaussian
from trainer.evaluate.ranks import EvaluationRanks, raise_on_all_ranks
from trainer.evaluate.reference import ReferenceStatistics


class FeatureScores:
    """Scores of feature statistics, whose work the ranks divide.

    Args:
        extractor: name of the extractor, which every score's name carries
        requested: metrics to compute, of METRICS
        ranks: ranks of the evaluation
    """

    def __init__(self, extractor: str, requested: Collection[str], ranks: EvaluationRanks):
        self.extractor, self.requested, self.ranks = extractor, requested, ranks
        # A new thread would use as many threads for its arithmetic as there are cores, and round differently.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self.pending: list[tuple[str, Future[float] | None]] = []
        self.kernel_sums: dict[int, float] = {}  # by KID's subset of the real images, which never change

    def compare(self, statistics: FeatureStatistics, reference: ReferenceStatistics, num: int) -> dict[str, float]:
        """Return the requested scores of `num` images against real ones; `finish_fids` fills in the FID."""
        scores: dict[str, float] = {}
        if "fid" in self.requested:
            scores |= self.start_fid(f"eval/fid{short(num)}/{self.extractor}", statistics.gaussian, reference)
        values = dict(zip(("is", "is_std"), statistics.inception_score or (), strict=False))
        scores |= {f"eval/{name}{short(num)}/{self.extractor}": value for name, value in values.items()}
        if statistics.features is None or reference.features is None:
            return scores
        values = {}
        if "kid" in self.requested:
            distances = self._kernel_distances(statistics.features, reference.features)
            values["kid"] = distances.mean().item()
            if len(distances) > 1:
                values["kid_std"] = distances.std(correction=0).item()
        if "prdc" in self.requested:
            values |= self._manifold_scores(statistics.features, reference)
        count = short(len(statistics.features))
        return scores | {f"eval/{name}{count}/{self.extractor}": value for name, value in values.items()}

    def start_fid(self, name: str, gaussian: Gaussian, reference: ReferenceStatistics) -> dict[str, float]:
        """Start to compute a FID in the background, on one rank; return its name with a NaN as a placeholder."""
        accelerator, future = self.ranks.accelerator, None
        if len(self.pending) % accelerator.num_processes == accelerator.process_index:
            future = self.pool.submit(lambda: metrics.frechet(gaussian, reference.gaussian, reference.root))
        self.pending.append((name, future))
        return {name: float("nan")}

    def finish_fids(self) -> dict[str, float]:
        """Wait for the FIDs that were started, and return them by name on all ranks."""
        found = raise_on_all_ranks(lambda: [future.result() if future else 0.0 for _, future in self.pending])
        values = torch.tensor(found, dtype=torch.float64, device=self.ranks.device)
        return dict(zip([name for name, _ in self.pending], self.ranks.sum(values).tolist(), strict=True))

    def _kernel_distances(self, fake: Tensor, real: Tensor) -> Tensor:
        """The MMD of each of KID's subsets, float64 [subsets]."""
        subsets, device = metrics.subsets(len(fake), len(real)), self.ranks.device
        values = torch.zeros(len(subsets), dtype=torch.float64, device=device)

        def compute() -> None:
            for i in self.ranks.own(range(len(subsets))):
                fake_part, real_part = (torch.from_numpy(part).to(device) for part in subsets[i])
                if i not in self.kernel_sums:
                    self.kernel_sums[i] = metrics.kernel_sum(real[real_part])
                values[i] = metrics.mmd(fake[fake_part], real[real_part], self.kernel_sums[i])

        raise_on_all_ranks(compute)
        return self.ranks.sum(values)

    def _manifold_scores(self, fake: Tensor, reference: ReferenceStatistics) -> dict[str, float]:
        """Precision, recall, density and coverage."""
        assert reference.features is not None
        real, parts = reference.features, self.ranks.rows(len(fake))
        if reference.radii is None:
            reference.radii = self._radii(real)
        real_radii, fake_radii = reference.radii, self._radii(fake)
        counts = raise_on_all_ranks(lambda: metrics.neighbours(fake, real, fake_radii, real_radii, parts))
        total = metrics.Neighbours(*(self.ranks.sum(count.double()) for count in counts))
        return metrics.manifold_scores(total, len(fake))

    def _radii(self, features: Tensor) -> Tensor:
        return self.ranks.sum(raise_on_all_ranks(lambda: metrics.radii(features, self.ranks.rows(len(features)))))


def short(n: int) -> str:
    """Return a number of images as the names of scores have it: 2000 is 2k."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)
