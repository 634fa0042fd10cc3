"""Scores of a run, the same on any number of processes: of samples, reconstructions, codes and translations.

`python -m trainer.evaluate --help` scores a checkpoint, or images, by the same means: command.py.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from data.errors import DataError
from data.loader import Samples, read
from data.order import permutation
from models import System
from trainer.batch import normalize, prior, strict_fp32, to_uint8
from trainer.config.settings import METRICS, DataConfig
from trainer.evaluate import metrics, reference
from trainer.evaluate.accumulators import Distance, FeatureAccumulator, FeatureStatistics
from trainer.evaluate.extractors.extractor import BATCH, Extractor
from trainer.evaluate.metrics import Codes, ExactSum, Gaussian, InceptionScore, psnr
from trainer.evaluate.reference import ReferenceStatistics

BLOCK = BATCH  # images dealt to a process at once
KEPT = 10_000  # images whose features are kept, for KID and precision; the other scores are sums
# What other processes raise when one fails; whatever else it was, they raise RuntimeError.
ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (FloatingPointError, DataError, ValueError, OSError)
}
T = TypeVar("T")


class Evaluator:
    """Scores a system against the held-out images, in what it can do.

    Samples and images are dealt to processes in fixed blocks, and sample i is drawn by a generator of its own. Blocks'
    features, codes and scores are added up by `ExactSum`, within its range the same in any order, so that no score
    depends on the number of processes; some of the blocks, or none, may be a process's. An error of one process is an
    error of all.

    Args:
        accelerator: gives device and processes
        extractor: in eval mode, on the device
        tests: held-out images of each data set; or their statistics, where no reconstructions are scored
        data: size and channels
        num: samples from the prior
        seed: of the samples
        system: whose abilities are scored; None where `score` is given images
        wanted: which of METRICS samples are scored by
        cache: folder where statistics of the held-out images are kept, or the one file that has them
        distance: LPIPS, for reconstructions
        kept: at most so many images' features are compared one by one, for KID and precision

    Raises:
        ValueError: there are too few samples or held-out images to compare, kept statistics are of others, or processes
            have other extractors.
        DataError: a held-out image is damaged.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        extractor: Extractor,
        tests: Sequence[Samples | ReferenceStatistics],
        data: DataConfig,
        num: int,
        seed: int,
        system: System | None = None,
        wanted: Sequence[str] = METRICS,
        cache: Path | None = None,
        distance: Distance | None = None,
        kept: int = KEPT,
    ):
        self.accelerator, self.extractor, self.tests, self.data = accelerator, extractor, tests, data
        self.num, self.seed, self.wanted, self.distance, self.kept = num, seed, wanted, distance, kept
        # Sums are float64, which Apple's GPUs lack.
        self.device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
        self._check_eval(None)
        self._check_alike()
        if cache and cache.suffix == ".npz" and len(tests) > 1:
            raise ValueError(f"evaluate.statistics names one file, {cache}, for two sets of images: name a folder")
        for test in tests:
            if not isinstance(test, ReferenceStatistics) and len(test) < 2:
                raise ValueError(
                    f"data.test holds {len(test)} image, and a covariance needs two: bring more, say a thousand"
                )
        self.scored = "is" in wanted and extractor.classes > 0
        if system is None or system.can("sample"):
            if num < 2:
                raise ValueError(f"evaluate.num is {num}, and a covariance needs two samples: raise it")
            if self.scored:
                InceptionScore(num, extractor.classes)  # refuses too few
        # A new thread would take as many threads for its arithmetic as there are cores, and round otherwise.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self.pending = list[tuple[str, Future[float] | None]]()
        self.kernel_sums: dict[int, float] = {}  # of real images' subsets, which do not change
        self.references = [self._reference(test, cache) for test in tests]
        self.spent = self.last = 0.0
        self.began = time.monotonic()

    @property
    def facts(self) -> dict[str, str | int]:
        """What makes two scores of a name comparable: the extractor's weights and the held-out images."""
        return {
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "held_out": " ".join(str(reference.meta.get("images", "unknown")) for reference in self.references),
            "held_out_images": sum(reference.gaussian.n for reference in self.references),
        }

    @property
    def recipe(self) -> dict[str, Any]:
        """What else it takes to measure the same again."""
        libraries = ("torch", "torch-fidelity", "torchmetrics", "numpy", "pillow", "simplejpeg")
        return {
            "num": self.num,
            "metrics": [*self.wanted],
            "kept": self.kept,
            "resize": self.extractor.resize,
            **({"lpips_sha256": self.distance.sha256} if self.distance else {}),
            "image_size": self.data.size,
            "channels": self.data.channels,
            "block": BLOCK,
            "versions": {name: version(name) for name in libraries},
        }

    @torch.no_grad()
    def __call__(self, system: System) -> dict[str, float]:
        """Scores by name: measure and count of images / extractor.

        Raises:
            FloatingPointError: an image is not finite.
            RuntimeError: a network is not in eval mode, or something failed on another process.
        """
        self._check_eval(system)
        with self._timed() as scores:
            if system.can("sample"):
                scores |= self._samples(system)
            if system.can("reconstruct") and not isinstance(self.tests[0], ReferenceStatistics):
                scores |= self._reconstructions(system)
            if system.can("translate"):
                scores |= self._translations(system, "a2b", self._images_of(0), self.references[1])
                scores |= self._translations(system, "b2a", self._images_of(1), self.references[0])
            scores |= self._distances()
        return scores

    @torch.no_grad()
    def score(self, images: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Scores of `num` images, which `images` gives by their indices [n] as uint8 [n, c, h, w]."""
        self._check_eval(None)
        with self._timed() as scores:
            scores |= self._against(self._extract_statistics(self.num, images), self.references[0], self.num)
            scores |= self._distances()
        return scores

    def go_on(self, past: Sequence[dict[str, Any]]) -> None:
        """Count what a run's earlier processes spent, by the lines of their evaluations."""
        scored = [line for line in past if "eval/seconds" in line and line.get("eval/seconds_share", 0) > 0]
        if scored:
            self.last = scored[-1]["eval/seconds"]
            self.spent = sum(line["eval/seconds"] for line in scored)
            self.began = time.monotonic() - self.spent / scored[-1]["eval/seconds_share"]

    def affordable(self, share: float) -> bool:
        """Whether another evaluation as long as the last one leaves at most this share of the time to evaluations.

        The main process decides for all.
        """
        elapsed = time.monotonic() - self.began
        (fits,) = broadcast_object_list([self.spent + self.last <= share * (elapsed + self.last)])
        return fits

    @contextmanager
    def _timed(self) -> Iterator[dict[str, float]]:
        """Adds to the scores how long they took, and the share of the time since the start that evaluations took."""
        scores: dict[str, float] = {}
        began = time.monotonic()
        try:
            yield scores
        finally:
            self.pending.clear()
        self.last = time.monotonic() - began
        self.spent += self.last
        scores["eval/seconds"] = self.last
        scores["eval/seconds_share"] = self.spent / (time.monotonic() - self.began)

    @torch.no_grad()
    def samples(self, system: System, index: Tensor) -> Tensor:
        """The images that are scored, uint8 [n, c, h, w], of a block of indices [n]."""
        with strict_fp32(self.accelerator.device):
            return to_uint8(system.sample(self._draw(system, index)))

    def blocks(self, count: int) -> Iterator[Tensor]:
        """Indices of this process's images of `count`, in blocks of BLOCK, of which the last may be smaller."""
        blocks = torch.arange(count).split(BLOCK)
        return iter(blocks[self.accelerator.process_index :: self.accelerator.num_processes])

    def _draw(self, system: System, index: Tensor) -> Tensor:
        return prior(self.seed, index, system.latent_shape).to(self.accelerator.device)

    # ---- of what

    def _samples(self, system: System) -> dict[str, float]:
        """FID, IS, KID and the like of samples, their sharpness beside real images', and how well z is read back."""
        count = _count(self.num)
        missed, size = self._zero(), self._zero()

        def images(index: Tensor) -> Tensor:
            z = self._draw(system, index)
            image = system.sample(z)
            pixels = to_uint8(image)
            if system.can("posterior"):
                missed.add((system.posterior(image)[0] - z).to(self.device).double().square().sum())
                size.add(z.to(self.device).double().square().sum())
            return pixels

        statistics = self._extract_statistics(self.num, images)
        scores = self._against(statistics, self.references[0], self.num)
        if self.references[0].sharpness:
            scores[f"eval/sharpness{count}"] = statistics.sharpness / self.references[0].sharpness
        if system.can("posterior"):
            scores[f"eval/z_recovered{count}"] = 1 - self._sum(missed) / self._sum(size)
        return scores

    def _reconstructions(self, system: System) -> dict[str, float]:
        """rFID, PSNR, SSIM and sharpness of held-out images' reconstructions, and how their codes fit the prior."""
        test, reference = self._images_of(0), self.references[0]
        names = ["psnr", "ssim", *([self.distance.name] if self.distance else [])]
        sums = {name: self._zero() for name in names}
        codes = Codes(system.latent_shape[0], self.device)

        def images(index: Tensor) -> Tensor:
            image = self._read(test, index)
            reconstructed = to_uint8(system.reconstruct(normalize(image)))
            seen, made = image.to(self.device), reconstructed.to(self.device)
            # Its variances are squares less squared means: float32 has too few digits for that.
            similarity = structural_similarity_index_measure(
                made.double(), seen.double(), data_range=255.0, reduction="none"
            )
            assert isinstance(similarity, Tensor)
            values = {"psnr": psnr(seen, made), "ssim": similarity}
            if self.distance:
                values[self.distance.name] = self.distance(image, reconstructed)
            for name, value in values.items():
                sums[name].add(value.to(self.device).double().sum())
            codes.update(*(part.to(self.device) for part in system.posterior(normalize(image))))
            return reconstructed

        statistics = self._extract_statistics(len(test), images, scored=False, kept=0)
        count = _count(len(test))
        gap, active = codes.compute(self.accelerator.reduce(codes.parts, "sum"))
        return {
            **self._distance_of(statistics.gaussian, reference, f"eval/rfid{count}/{self.extractor.name}"),
            **{f"eval/{name}{count}": self._sum(value) / len(test) for name, value in sums.items()},
            f"eval/sharpness_reconstructed{count}": statistics.sharpness / (reference.sharpness or float("nan")),
            f"eval/prior_gap{count}": gap,
            f"eval/active_units{count}": active,
        }

    def _translations(
        self, system: System, direction: Literal["a2b", "b2a"], source: Samples, reference: ReferenceStatistics
    ) -> dict[str, float]:
        """FID of translated images against the other domain's, and PSNR of the way there and back."""
        cycle = self._zero()

        def images(index: Tensor) -> Tensor:
            image = self._read(source, index)
            translated = system.translate(normalize(image), direction)
            back = system.translate(translated, "b2a" if direction == "a2b" else "a2b")
            cycle.add(psnr(image.to(self.device), to_uint8(back).to(self.device)).sum())
            return to_uint8(translated)

        statistics = self._extract_statistics(len(source), images, scored=False, kept=0)
        count = _count(len(source))
        return {
            **self._distance_of(statistics.gaussian, reference, f"eval/fid{count}/{direction}/{self.extractor.name}"),
            f"eval/cycle_psnr{count}/{direction}": self._sum(cycle) / len(source),
        }

    # ---- by what

    def _against(self, statistics: FeatureStatistics, reference: ReferenceStatistics, num: int) -> dict[str, float]:
        """The scores that are wanted, of images against real ones."""
        scores: dict[str, float] = {}
        count, name = _count(num), self.extractor.name
        if "fid" in self.wanted:
            scores |= self._distance_of(statistics.gaussian, reference, f"eval/fid{count}/{name}")
        if statistics.inception_score:
            scores[f"eval/is{count}/{name}"], scores[f"eval/is_std{count}/{name}"] = statistics.inception_score
        if statistics.features is None or reference.features is None:
            return scores
        count = _count(len(statistics.features))
        if "kid" in self.wanted:
            values = self._kernel_distances(statistics.features, reference.features)
            scores[f"eval/kid{count}/{name}"] = values.mean().item()
            if len(values) > 1:
                scores[f"eval/kid_std{count}/{name}"] = values.std(correction=0).item()
        if "prdc" in self.wanted:
            found = self._neighbours(statistics.features, reference)
            scores |= {f"eval/{measure}{count}/{name}": value for measure, value in found.items()}
        return scores

    def _distance_of(self, gaussian: Gaussian, reference: ReferenceStatistics, name: str) -> dict[str, float]:
        """Begin to compute a Frechet distance, on one process and beside what else it does; `_distances` awaits it."""
        mine = len(self.pending) % self.accelerator.num_processes == self.accelerator.process_index
        future = (
            self.pool.submit(lambda: metrics.frechet(gaussian, reference.gaussian, reference.root)) if mine else None
        )
        self.pending.append((name, future))
        return {name: float("nan")}  # keeps its place

    def _distances(self) -> dict[str, float]:
        """The Frechet distances that were begun."""
        found = self.raise_on_all_ranks(lambda: [future.result() if future else 0.0 for _, future in self.pending])
        values = torch.tensor(found, dtype=torch.float64, device=self.device)
        names = [name for name, _ in self.pending]
        return dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    def _kernel_distances(self, fake: Tensor, real: Tensor) -> Tensor:
        """The MMD of each of KID's subsets, float64 [subsets]; subsets are dealt to processes."""
        drawn = metrics.subsets(len(fake), len(real))
        values = torch.zeros(len(drawn), dtype=torch.float64, device=self.device)

        def work() -> None:
            for i in range(self.accelerator.process_index, len(drawn), self.accelerator.num_processes):
                of_fake, of_real = (torch.from_numpy(part).to(self.device) for part in drawn[i])
                if i not in self.kernel_sums:
                    self.kernel_sums[i] = metrics.kernel_sum(real[of_real])
                values[i] = metrics.mmd(fake[of_fake], real[of_real], self.kernel_sums[i])

        self.raise_on_all_ranks(work)
        return self.accelerator.reduce(values, "sum")

    def _neighbours(self, fake: Tensor, reference: ReferenceStatistics) -> dict[str, float]:
        """Precision, recall, density and coverage; rows of the distances are dealt to processes."""
        assert reference.features is not None
        real, parts = reference.features, self._rows(len(fake))
        if reference.radii is None:
            reference.radii = self._radii(real)
        real_radii, fake_radii = reference.radii, self._radii(fake)
        counts = self.raise_on_all_ranks(lambda: metrics.neighbours(fake, real, fake_radii, real_radii, parts))
        added = metrics.Neighbours(*(self.accelerator.reduce(count.double(), "sum") for count in counts))
        return metrics.manifold_scores(added, len(fake))

    def _radii(self, features: Tensor) -> Tensor:
        own = self.raise_on_all_ranks(lambda: metrics.radii(features, self._rows(len(features))))
        return self.accelerator.reduce(own, "sum")

    # ---- the real images

    def _reference(self, test: Samples | ReferenceStatistics, cache: Path | None) -> ReferenceStatistics:
        """ReferenceStatistics of held-out images: kept ones, or made by all processes, then kept."""
        if isinstance(test, ReferenceStatistics):
            return test.to(self.device)
        meta = self.meta(test)
        path = cache if cache is None or cache.suffix == ".npz" else self._kept_at(cache, meta)
        (kept,) = broadcast_object_list([path is not None and path.exists()])
        if path and kept:
            return self.raise_on_all_ranks(lambda: reference.load(path, meta)).to(self.device)
        statistics = self._extract_statistics(
            len(test), lambda index: self._read(test, index), scored=False, places=self._places(test)
        )
        made = ReferenceStatistics(statistics.gaussian, meta, statistics.sharpness, statistics.features)
        if path and self.accelerator.is_main_process:
            _keep(made, path)
        return made

    def _kept_at(self, folder: Path, meta: dict[str, Any]) -> Path:
        return folder / f"{self.extractor.name}-{reference.key(meta)}.npz"

    def meta(self, test: Samples) -> dict[str, Any]:
        """What statistics of some images depend on."""
        return {
            "format": reference.FORMAT,
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "resize": self.extractor.resize,
            "size": self.data.size,
            "channels": self.data.channels,
            "images": test.fingerprint(),
            "count": len(test),
            "kept": min(self.kept, len(test)),
        }

    def _images_of(self, which: int) -> Samples:
        test = self.tests[which]
        assert not isinstance(test, ReferenceStatistics)
        return test

    # ---- over processes

    def _extract_statistics(
        self,
        num: int,
        images: Callable[[Tensor], Tensor],
        scored: bool | None = None,
        kept: int | None = None,
        places: Tensor | None = None,
    ) -> FeatureStatistics:
        """Extract the features of this process's blocks of `num` images, and add up all processes'."""
        if places is None:
            most = self.kept if kept is None else kept
            if not {"kid", "prdc"} & {*self.wanted}:
                most = 0
            places = torch.arange(num).where(torch.arange(num) < most, -1)
        tally = FeatureAccumulator(self.extractor, num, places, self.scored if scored is None else scored, self.device)

        def work() -> None:
            with strict_fp32(self.accelerator.device):
                for index in self.blocks(num):
                    tally.update(index, images(index))

        self.raise_on_all_ranks(work)
        return tally.close(lambda value: self.accelerator.reduce(value, "sum"))

    def _places(self, test: Samples) -> Tensor:
        """Which images' features are kept: all, or a choice that is the same for the same number of images."""
        places = np.full(len(test), -1)
        chosen = np.sort(permutation(len(test), 0)[: self.kept]) if len(test) > self.kept else np.arange(len(test))
        places[chosen] = np.arange(len(chosen))
        return torch.from_numpy(places)

    def raise_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Do this process's part of something; where it fails on one process, it fails on all, with that error."""
        trouble: Exception | None = None
        try:
            done = work()
        except Exception as error:
            trouble = error
        kinds = [name for name, kind in ERRORS.items() if isinstance(trouble, kind)]
        told = gather_object([None if trouble is None else ((*kinds, "")[0], str(trouble) or type(trouble).__name__)])
        if trouble is not None:
            raise trouble
        for rank, failed in enumerate(told):
            if failed:
                kind, text = failed
                raise ERRORS.get(kind, RuntimeError)(f"process {rank}: {text}")
        return done

    def _check_alike(self) -> None:
        """Processes whose extractors differ would add up features that have nothing to do with each other."""
        own = {self.extractor.name: self.extractor.sha256}
        if self.distance:
            own[self.distance.name] = self.distance.sha256
        found = gather_object([own])
        for rank, theirs in enumerate(found):
            if theirs != found[0]:
                raise ValueError(
                    f"the scores' networks differ between processes: {found[0]} on process 0, {theirs} on process "
                    f"{rank}. Give all of them the same files (evaluate.weights, evaluate.lpips, TORCH_HOME)"
                )

    def _check_eval(self, system: System | None) -> None:
        for what, network in (("the averaged system", system), ("the extractor", self.extractor)):
            if not isinstance(network, nn.Module):
                continue
            training = [name for name, module in network.named_modules() if module.training]
            if training:
                raise RuntimeError(f"{what} is scored in eval mode, and {training[0] or 'it'} is in training mode")

    def _zero(self) -> ExactSum:
        return ExactSum((), self.device)

    def _sum(self, value: ExactSum) -> float:
        return self.accelerator.reduce(value.parts, "sum").sum().item()

    def _rows(self, count: int) -> list[slice]:
        """This process's share of the rows of a matrix of distances; a share's arithmetic is the same on any."""
        parts = [slice(i, min(i + metrics.ROWS, count)) for i in range(0, count, metrics.ROWS)]
        return parts[self.accelerator.process_index :: self.accelerator.num_processes]

    def _read(self, test: Samples, index: Tensor) -> Tensor:
        return read(test, index.numpy(), self.data.size, self.data.channels).image.to(self.accelerator.device)


def _keep(made: ReferenceStatistics, path: Path) -> None:
    """Keep statistics; where that cannot be, say so: they are made anew each time."""
    try:
        made.save(path)
    except OSError as error:
        print(f"statistics of the real images are not kept: {error}", file=sys.stderr, flush=True)


def _count(n: int) -> str:
    """2000 -> 2k, as in the names of scores."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)
