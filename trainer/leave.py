"""When a run is to leave early: a signal, a time limit, its launcher's death."""

import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from trainer.config import is_first_on_machine

LEFT_EARLY = 75  # EX_TEMPFAIL: all is saved, and the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE = 60  # seconds that a process whose launcher is gone has to save
PR_SET_PDEATHSIG = 1


class Leaving:
    """Whether this process has been asked to leave.

    Args:
        time_limit: of the process's life, as SLURM writes it; None: none

    Raises:
        ValueError: the limit is no time.
    """

    def __init__(self, time_limit: str | None = None):
        self.reason: str | None = None
        self.seconds = None if time_limit is None else parse(time_limit)
        self._launcher = os.getppid()
        self._began = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._longest, self._last = 0.0, math.inf

    def asked(self, saving: float) -> bool:
        """Whether to leave now; to be called once a step.

        A limit is met where a step as long as the longest so far, its evaluation included, and the time that a save
        takes might pass it.

        Args:
            saving: seconds
        """
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        if self.seconds is not None and now - self._began + 1.5 * (self._longest + saving) + 1 > self.seconds:
            self.reason = self.reason or "trainer.time_limit"
        return self.reason is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of dying of them; the second Ctrl-C ends the process at once."""
        self._follow_launcher()
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            if self.reason == name:
                _tell("left at once: what was done since the last checkpoint is lost")
                os._exit(128 + number)
            _tell("saving, then leaving; once more leaves at once")
        self.reason = name
        if os.getppid() != self._launcher:
            timer = threading.Timer(GRACE, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

    def _follow_launcher(self) -> None:
        """Have the kernel send SIGTERM when the launcher is gone, so that no rank outlives it."""
        if "LOCAL_RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
            return  # started from a shell, which it may outlive
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != self._launcher:
            self.reason = "the launcher's death"


def _tell(text: str) -> None:
    """Say something in a signal's handler, where no buffered file may be used."""
    if is_first_on_machine():
        os.write(2, f"\n{text}\n".encode())


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
