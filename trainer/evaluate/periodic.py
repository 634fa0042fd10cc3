"""Evaluations while a run trains."""

import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from trainer.build import check_held_out
from trainer.errors import RunError
from trainer.evaluate.hints import hints
from trainer.log.metrics_file import read_metrics
from trainer.metrics import METRICS
from trainer.parts import RunParts

if TYPE_CHECKING:
    from trainer.evaluate.evaluator import Evaluator


class PeriodicEvaluator:
    """Scores the averaged networks of a run.

    A demo-cnn without weights is trained by a process beside the run's first steps; all else is prepared at once.

    Raises:
        ValueError, DataError, OSError: there are no held-out images, or the extractor or the reference statistics
            cannot be made.
    """

    def __init__(self, parts: RunParts, folder: Path, accelerator: Accelerator):
        self.parts, self.folder, self.accelerator, self.began = parts, folder, accelerator, time.monotonic()
        self._made: Evaluator | None = None
        self._fitting: BaseProcess | None = None
        settings, sets = parts.config.evaluate, (parts.trains, parts.tests)
        check_held_out(parts.tests)
        if settings.extractor != "demo-cnn" or settings.weights:
            self._made = self._make()
            return
        from trainer.evaluate.extractors import demo_cnn

        demo_cnn.check_labels(*sets)
        path = folder / demo_cnn.FILE
        if accelerator.is_main_process and not demo_cnn.is_fit(path, *sets, parts.config.data):
            self._fitting = demo_cnn.start_fit(*sets, parts.config.data, path)

    @property
    def evaluator(self) -> "Evaluator":
        """The evaluator, once its extractor is there; all processes wait for it.

        Raises:
            RunError: a demo-cnn cannot be trained.
        """
        if self._made is None:
            if self._fitting is not None:
                self._fitting.join()
            try:
                self._made = self._make()
            except ValueError as error:
                raise RunError(f"{error}. Run the same command with another evaluate.extractor to resume") from error
        return self._made

    def close(self) -> None:
        """End the process that trains a demo-cnn, if it still does."""
        if self._fitting is not None:
            self._fitting.kill()
            self._fitting.join()

    def _make(self) -> "Evaluator":
        parts, accelerator, folder, config = self.parts, self.accelerator, self.folder, self.parts.config
        settings = config.evaluate
        if accelerator.is_main_process:
            held_out = sum(len(shards) for shards in parts.tests)
            print(f"preparing {settings.extractor} and {held_out:,} held-out images", file=sys.stderr, flush=True)
        from trainer.evaluate.evaluator import Evaluator  # torchmetrics takes seconds to import
        from trainer.evaluate.extractors.build import build_extractor
        from trainer.evaluate.extractors.lpips import LPIPS

        evaluator = Evaluator(
            accelerator,
            build_extractor(settings, config.data, folder, parts.trains, parts.tests, accelerator),
            parts.tests,
            config.data,
            num=settings.num or 0,
            seed=config.trainer.seed,
            system=parts.system,
            metrics=settings.metrics,
            statistics=Path(settings.statistics or folder / "statistics"),
            lpips=LPIPS(settings.lpips, accelerator.device) if settings.lpips else None,
        )
        # By default the inception score is there wherever the extractor can give it.
        if accelerator.is_main_process and evaluator.missing and {*settings.metrics} != {*METRICS}:
            print(evaluator.missing, file=sys.stderr, flush=True)
        ignored = not settings.num and parts.system.can("sample") and {*settings.metrics} != {*METRICS}
        if accelerator.is_main_process and ignored:
            unused = "evaluate.metrics has no effect, as evaluate.num is 0: set it to the number of samples to score"
            print(unused, file=sys.stderr, flush=True)
        evaluator.budget.began = self.began  # not now: a demo-cnn was trained beside the first steps
        evaluator.budget.resume(self._past())
        return evaluator

    @property
    def comparable(self) -> dict[str, Any]:
        """What two evaluations must share for their scores to be comparable."""
        return self.evaluator.facts | {"judged_by": self.parts.system.judged_by}

    def affordable(self) -> bool:
        """Return whether another evaluation fits into evaluate.budget. Only scores depend on it, never a step."""
        budget = self.parts.config.evaluate.budget
        return budget == 1 or self.evaluator.budget.affordable(budget)

    def __call__(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the averaged networks' scores by name, and how they were measured, with any hints at a collapse.

        Raises:
            FloatingPointError: an image is not finite.
        """
        scores = self.evaluator(self.parts.ema.system)
        facts = self.comparable | {"weights": "ema", "seed": self.parts.config.trainer.seed}
        facts |= {"world_size": self.accelerator.num_processes, **self.evaluator.recipe}
        if found := hints(self._past(), scores, self.comparable):
            facts["hints"] = found
        return scores, facts

    def _past(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder) if self.accelerator.is_main_process else []
