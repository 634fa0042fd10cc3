"""When a run stops early: on a signal, at its time limit, or after its launcher is gone.

trainer/main.py imports this module before the heavy ones, so it imports none of those itself.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from trainer.distributed.launcher import has_launcher, is_local_main

EXIT_STOPPED = 75  # EX_TEMPFAIL: the checkpoint is saved, and the same command resumes
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS_TO_SAVE = 60  # for a process whose launcher is gone


class StopSignal:
    """Whether this process should stop early, and why.

    A thread notes signals, because a Python handler waits for as long as the main thread waits for a device or another
    process. The second Ctrl-C ends the process at once.

    Attributes:
        reason: the first signal's name ("Ctrl-C" for SIGINT), "trainer.time_limit", or None
        limit: seconds that this process may live
        run_began: whether there may be anything to save
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.limit = math.inf
        self.run_began = False
        self._interrupted = False
        self._launcher = os.getppid()
        self._process_start = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._longest_step, self._last_call = 0.0, math.inf

    def should_stop(self, save_seconds: float) -> bool:
        """Return whether to stop now; to be called once a step.

        The time limit counts as reached when two more steps, as long as the longest so far with its evaluation, could
        pass it: one step goes by until all processes know.

        Args:
            save_seconds: how long a checkpoint takes to save
        """
        now = time.monotonic()
        self._longest_step, self._last_call = max(self._longest_step, now - self._last_call), now
        if now - self._process_start + 2 * (self._longest_step + save_seconds) + 1 > self.limit:
            self.reason = self.reason or "trainer.time_limit"
        return self.reason is not None

    def listen(self) -> None:
        """Note signals from now on, instead of letting them end the process."""
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._descriptor = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._read_signals, args=(reading,), daemon=True).start()

    def close(self) -> None:
        """Restore the signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor)
        os.close(self._writing)

    def _read_signals(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in SIGNALS:
                    self._note(signal.Signals(number[0]))

    def _note(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                _print_at_once("Exited at once: steps since the last checkpoint are lost")
                os._exit(128 + number)
            _print_at_once(
                "Stopping after a checkpoint is saved, and an evaluation that has begun is finished; press Ctrl-C "
                "again to exit at once"
            )
            self._interrupted = True
        self.reason = self.reason or ("Ctrl-C" if number == signal.SIGINT else number.name)
        if has_launcher() and os.getppid() != self._launcher:
            if not self.run_began:
                os._exit(EXIT_STOPPED)
            timer = threading.Timer(SECONDS_TO_SAVE, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()


_early: StopSignal | None = None


def listen_early() -> None:
    """Note signals for the run to come, which would otherwise end the process during its imports."""
    global _early
    _early = StopSignal()
    _early.listen()


@contextmanager
def listening(time_limit: str | None = None) -> Iterator[StopSignal]:
    """A context that yields the stop signal of a run: the one of `listen_early`, or a new one.

    Args:
        time_limit: of the process's life, as `parse_time_limit` reads it; None: none
    """
    stop = _early or StopSignal()
    if stop is not _early:
        stop.listen()
    stop.limit = math.inf if time_limit is None else parse_time_limit(time_limit)
    stop.run_began = True
    try:
        yield stop
    finally:
        if stop is not _early:
            stop.close()


def _print_at_once(text: str) -> None:
    """Print without a lock, which the main thread may hold."""
    if is_local_main():
        os.write(2, f"\n{text}\n".encode())


def exit_code(left_early: bool) -> int:
    """Return the exit code of a run without errors."""
    # A launcher that may restart its processes would restart one with a code other than 0.
    restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return EXIT_STOPPED if left_early and not restarted else 0


def parse_time_limit(limit: str) -> float:
    """Return the seconds of a time as SLURM writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        ValueError: it is not such a time.
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
            f"trainer.time_limit must be minutes, MM:SS, HH:MM:SS or D-HH:MM:SS, such as 23:30:00; got {limit!r}"
        ) from None
