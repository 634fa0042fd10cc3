"""What a process owes its launcher and its user before the imports that take seconds: imported first, and light."""

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1
LEFT_EARLY = 75  # EX_TEMPFAIL: all is saved, and the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE = 60  # seconds that a process whose launcher is gone has to save


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher is gone, so that none of its ranks outlives it.

    Until the run has begun, this process ends then; later it saves and leaves.
    """
    if "LOCAL_RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return  # started from a shell, which it may outlive
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def is_first_on_machine() -> bool:
    """Whether this process is the launcher's local rank 0, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def on_one_machine() -> bool:
    """Whether all processes of this one's world are here."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "1")


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
                os._exit(LEFT_EARLY)
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
    if is_first_on_machine():
        os.write(2, f"\n{text}\n".encode())
