"""How a process ends with an error: one block of text, from one process alone, and an exit code."""

import argparse
import difflib
import errno
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.distributed

from data.errors import DataError, UnreachableError
from data.files import FULL
from data.redact import printable
from trainer.distributed.launcher import is_local_main
from trainer.distributed.rendezvous import STORE_TIMEOUT, query_store
from trainer.errors import RunError, needed

TEMPORARY = (UnreachableError, ConnectionError, TimeoutError)
TEMPORARY_ERRNOS = (
    *(*FULL, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EAGAIN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
NO_ROOM = "the GPU has too little free memory: end other programs that take some (nvidia-smi shows them)"


def exit_with_error(message: str, code: int = 2) -> NoReturn:
    """Print an error in one block, unless another process has printed one, and exit."""
    started = torch.distributed.is_initialized()
    if started:
        printed = query_store(lambda store: store.add("errors printed", 1), STORE_TIMEOUT)
        first = printed is None or printed == 1  # None: the store is gone, and other processes may be too
    else:
        first = is_local_main()
    if first:
        print(printable(f"error: {message}"), file=sys.stderr, flush=True)
        if started:
            time.sleep(1)  # this process may hold the store that the others query
    raise SystemExit(code)


def is_temporary(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, may not occur again when the same command is started later."""
    while error is not None:
        if isinstance(error, TEMPORARY) or getattr(error, "errno", None) in TEMPORARY_ERRNOS:
            return True
        error = error.__cause__
    return False


@contextmanager
def user_errors() -> Iterator[None]:
    """A context before training: exits without a traceback, with code 2 if settings or data are wrong.

    The code is 1 if the same command may succeed later: a network, a disk or memory fails, or another run is writing.
    """
    try:
        yield
    except (ValueError, DataError, OSError) as error:
        exit_with_error(str(error), code=1 if is_temporary(error) else 2)
    except RunError as error:  # a process is lost, or memory is short
        exit_with_error(str(error), code=1)
    except torch.OutOfMemoryError as error:
        exit_with_error(
            f"{NO_ROOM}, or compute on the CPU by CUDA_VISIBLE_DEVICES= before the command. {needed(error)}",
            code=1,
        )


@contextmanager
def run_errors() -> Iterator[None]:
    """A context during training: exits with code 1 and no traceback if the run cannot continue."""
    try:
        yield
    except (DataError, RunError, OSError) as error:
        exit_with_error(str(error), code=1)
    except torch.OutOfMemoryError as error:  # outside a step: in an evaluation, or for pictures
        exit_with_error(f"{NO_ROOM}, and run the same command again, which resumes. {needed(error)}", code=1)


class CommandParser(argparse.ArgumentParser):
    """Prints a user's mistake in one block and exits with code 2."""

    words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = [*(sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        exit_with_error(f"{message}{self._meant(message)}\nSee {self.prog} --help")

    def _meant(self, message: str) -> str:
        """Return which option or command was perhaps meant by one that there is not."""
        commands = next((one.choices for one in self._actions if isinstance(one, argparse._SubParsersAction)), {})
        chosen = [self, *(commands[word] for word in self.words if word in commands)]
        options = [option for parser in chosen for option in parser._option_string_actions]
        if wrong := re.search(r"unrecognized arguments:.*?(--\w+)", message):
            close = difflib.get_close_matches(wrong[1], options, 1)
        elif wrong := re.search(r"argument COMMAND: invalid choice: '(\w+)'", message):
            close = difflib.get_close_matches(wrong[1], commands, 1)
        else:
            close = []
        return f" (did you mean {close[0]}?)" if close else ""
