"""What a user is told of data."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from data.redact import printable, redacted


class DataError(RuntimeError):
    """The data is missing or damaged; the message says where, what was found and what to do, without credentials."""

    def __str__(self) -> str:
        return redacted(super().__str__())


@contextmanager
def command_errors(parser: argparse.ArgumentParser, stopped: str = "stopped") -> Iterator[None]:
    """Within a command: a mistake or a fault of the data ends it with one block of text and code 2, Ctrl-C with 130."""
    try:
        yield
    except (DataError, ValueError, OSError) as error:
        parser.exit(2, printable(f"error: {error}\n"))
    except KeyboardInterrupt:
        parser.exit(130, f"{stopped}\n")
