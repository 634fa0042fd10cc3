"""When a run is to leave early: a signal, a time limit, its launcher's death."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from trainer import launcher
from trainer.launcher import LEFT_EARLY, Signals


class Leaving:
    """Whether this process has been asked to leave.

    Args:
        time_limit: of the process's life, as SLURM writes it; None: none

    Raises:
        ValueError: the limit is no time.
    """

    def __init__(self, time_limit: str | None = None):
        self.seconds = None if time_limit is None else parse(time_limit)
        self._signals: Signals | None = None
        self._late = False
        self._began = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._longest, self._last = 0.0, math.inf

    def asked(self, saving: float) -> bool:
        """Whether to leave now; to be called once a step.

        A limit is met where two steps as long as the longest so far, its evaluation included, for it takes one more
        until all have heard, and the time that a save takes might pass it.

        Args:
            saving: seconds
        """
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        if self.seconds is not None and now - self._began + 2 * (self._longest + saving) + 1 > self.seconds:
            self._late = True
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        return (self._signals and self._signals.reason) or ("trainer.time_limit" if self._late else None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Leave for the signals, too, that have come since the program began, or come now; see `Signals`."""
        with launcher.listening() as self._signals:
            yield


def exit_code(left_early: bool) -> int:
    """Of a run that ended well."""
    # A launcher that may restart its processes would restart one that leaves with another code.
    restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return LEFT_EARLY if left_early and not restarted else 0


def parse(limit: str) -> float:
    """Seconds of a time as SLURM writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        ValueError: it is none.
    """
    days, dash, clock = limit.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        if dash:
            hours, minutes, seconds = parts + [0] * (3 - len(parts))
        else:
            hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    except (ValueError, KeyError):
        raise ValueError(
            f"trainer.time_limit is {limit!r}, expected minutes, MM:SS, HH:MM:SS or D-HH:MM:SS, such as 23:30:00"
        ) from None
