"""When a run stops early: a signal, a time limit, the death of its launcher."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from trainer.distributed.launcher import is_local_main

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: all is saved, and the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE = 60  # seconds that a process whose launcher is gone has to save


class Signals:
    """Notes signals from now on, in place of dying of them; the second Ctrl-C ends the process at once.

    A thread notes them: handlers would wait as long as the main one waits for a device or for another process.
    """

    def __init__(self) -> None:
        self.reason: str | None = None  # the first one's name
        self.begun = False  # whether there may be anything to save
        self._interrupted = False
        self._launcher = os.getppid()
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._descriptor = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()

    def close(self) -> None:
        """Have signals do again what they did before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor)
        os.close(self._writing)

    def _listen(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as arriving:
            while number := arriving.read(1):
                if number[0] in SIGNALS:
                    self._note(signal.Signals(number[0]))

    def _note(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                _tell("left at once: what was done since the last checkpoint is lost")
                os._exit(128 + number)
            _tell("saving, then leaving; once more leaves at once")
            self._interrupted = True
        self.reason = self.reason or number.name
        if os.getppid() != self._launcher:
            if not self.begun:
                os._exit(EXIT_PREEMPTED)
            timer = threading.Timer(GRACE, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()


_early: Signals | None = None


def listen() -> Signals:
    """Note signals from now on, for the run that is to begin: they would end the process before it has imported all."""
    global _early
    _early = Signals()
    return _early


@contextmanager
def listening() -> Iterator[Signals]:
    """The signals that `listen` notes, or where it was not called, those that come in this context."""
    signals = _early or Signals()
    signals.begun = True
    try:
        yield signals
    finally:
        if signals is not _early:
            signals.close()


def _tell(text: str) -> None:
    """Say something at once, whatever the main thread holds."""
    if is_local_main():
        os.write(2, f"\n{text}\n".encode())


class StopSignal:
    """Whether this process has been asked to leave.

    Args:
        time_limit: of the process's life, as SLURM writes it; None: none

    Raises:
        ValueError: the limit is no time.
    """

    def __init__(self, time_limit: str | None = None):
        self.seconds = None if time_limit is None else parse_time_limit(time_limit)
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
        with listening() as self._signals:
            yield


def exit_code(left_early: bool) -> int:
    """Of a run that ended well."""
    # A launcher that may restart its processes would restart one that leaves with another code.
    restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return EXIT_PREEMPTED if left_early and not restarted else 0


def parse_time_limit(limit: str) -> float:
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
