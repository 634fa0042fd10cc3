"""The time that evaluations take out of a run."""

import time
from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list


class Budget:
    """The seconds that evaluations took so far, as a share of the time since the run began."""

    def __init__(self) -> None:
        self.spent = self.last = 0.0
        self.began = time.monotonic()

    @property
    def share(self) -> float:
        """The share of the run's time, in [0, 1], that evaluations took."""
        return self.spent / (time.monotonic() - self.began)

    def add(self, seconds: float) -> None:
        """Count one evaluation."""
        self.last = seconds
        self.spent += seconds

    def resume(self, lines: Sequence[dict[str, Any]]) -> None:
        """Count the evaluations of a resumed run, given the lines of its metrics.jsonl."""
        scored = [line for line in lines if "eval/seconds" in line and line.get("eval/seconds_share", 0) > 0]
        if scored:
            self.last = scored[-1]["eval/seconds"]
            self.spent = sum(line["eval/seconds"] for line in scored)
            self.began = time.monotonic() - self.spent / scored[-1]["eval/seconds_share"]

    def affordable(self, share: float) -> bool:
        """Return whether evaluations stay within `share` of the run's time if the next takes as long as the last.

        The main process decides for all ranks.
        """
        elapsed = time.monotonic() - self.began
        (fits,) = broadcast_object_list([self.spent + self.last <= share * (elapsed + self.last)])
        return fits
