"""How a process ends with an error: one block of text, from one rank alone, and an exit code."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed

from data.errors import DataError
from data.redact import printable
from trainer.distributed.launcher import is_local_main
from trainer.distributed.store import STORE_TIMEOUT, ask_store
from trainer.errors import RunError


def _is_first_to_tell() -> bool:
    """Whether no other process has told of an error: all may meet the same one, or one alone its own."""
    if not torch.distributed.is_initialized():
        return is_local_main()
    told = ask_store(lambda store: store.add("errors told", 1), STORE_TIMEOUT)
    return told is None or told == 1  # None: whoever else is left cannot be asked


def exit_with_error(message: str, code: int = 2) -> NoReturn:
    """Say an error in one block, on one process alone, and exit."""
    if _is_first_to_tell():
        print(printable(f"error: {message}"), file=sys.stderr, flush=True)
        if torch.distributed.is_initialized():
            time.sleep(1)  # this process may host the store in which others look whether it has been told
    raise SystemExit(code)


@contextmanager
def user_errors() -> Iterator[None]:
    """Before any training: a setting or the data that cannot be is said without a traceback, exit code 2."""
    try:
        yield
    except (ValueError, DataError, OSError) as error:
        exit_with_error(str(error))
    except RunError as error:  # a process is missing: the same command may do
        exit_with_error(str(error), code=1)


@contextmanager
def run_errors() -> Iterator[None]:
    """During training: why a run stopped is said without a traceback, exit code 1."""
    try:
        yield
    except (DataError, RunError, OSError) as error:
        exit_with_error(str(error), code=1)


class CommandParser(argparse.ArgumentParser):
    """Says a user's mistake in one block and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        exit_with_error(f"{message}\nSee {self.prog} --help")
