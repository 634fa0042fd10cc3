"""Evaluations while a run trains."""

import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from trainer.build import check_held_out
from trainer.evaluate.hints import hints
from trainer.log.metrics_file import read_metrics
from trainer.parts import RunParts


class PeriodicEvaluator:
    """Scores the averaged networks of a run.

    Raises:
        ValueError, DataError, OSError: there are no held-out images, or the extractor or the reference statistics
            cannot be made.
    """

    def __init__(self, parts: RunParts, folder: Path, accelerator: Accelerator):
        self.parts, self.folder, self.accelerator = parts, folder, accelerator
        config, settings = parts.config, parts.config.evaluate
        check_held_out(parts.tests)
        if accelerator.is_main_process:
            held_out = sum(len(shards) for shards in parts.tests)
            print(f"preparing {settings.extractor} and {held_out:,} held-out images", file=sys.stderr, flush=True)
        from trainer.evaluate.evaluator import Evaluator  # torchmetrics takes seconds to import
        from trainer.evaluate.extractors.build import build_extractor
        from trainer.evaluate.extractors.lpips import LPIPS

        self.evaluator = Evaluator(
            accelerator,
            build_extractor(settings, config.data, folder, parts.trains, parts.tests, accelerator),
            parts.tests,
            config.data,
            num=settings.num,
            seed=config.trainer.seed,
            system=parts.system,
            metrics=settings.metrics,
            statistics=Path(settings.statistics or folder / "statistics"),
            lpips=LPIPS(settings.lpips, accelerator.device) if settings.lpips else None,
        )
        self.evaluator.budget.resume(self._past())

    @property
    def measured(self) -> set[str]:
        """What is scored, as `chart_layout` has it."""
        system, evaluator = self.parts.system, self.evaluator
        measured = {use for use in ("sample", "reconstruct", "translate") if system.can(use)}
        if "sample" in measured:
            measured |= {*evaluator.sample_metrics}
        return measured

    @property
    def comparable(self) -> dict[str, Any]:
        """What two evaluations must share for their scores to be comparable."""
        return self.evaluator.facts

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
