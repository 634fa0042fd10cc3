"""What the commands of data/ share: their parser, options, and how they end."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data.errors import DataError
from data.images import LIMITS, Size, one_size
from data.redact import printable

UNITS = {"pixels": "pixels that an image may have", "bytes": "encoded bytes that an image may have"}
UNITS |= {"scans": "scans that a JPEG may have; each decodes all of its pixels again"}


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m MODULE`, whose help begins with the description as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def size_of(text: str) -> Size:
    """Return the size of an option: PIXELS, or [HEIGHT, WIDTH] as in data.size."""
    pair = re.fullmatch(r"\[ *(\d+) *, *(\d+) *\]", text)
    if not pair and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'must be PIXELS or "[HEIGHT, WIDTH]"; got {text}')
    return one_size((int(pair[1]), int(pair[2]))) if pair else int(text)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add --max_pixels, --max_bytes and --max_scans, which bound an image, to a parser."""
    for name, default in LIMITS._asdict().items():
        help_ = f"{UNITS[name]}; one with more is refused before it is decoded (default: %(default)s)"
        parser.add_argument(f"--max_{name}", type=int, default=default, metavar="N", help=help_)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers, the number of processes, to a parser."""
    cores = len(os.sched_getaffinity(0))
    help_ = "processes; the result does not depend on them (default: the cores, here %(default)s)"
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=help_)


@contextmanager
def command_errors(parser: argparse.ArgumentParser, interrupted: str = "stopped") -> Iterator[None]:
    """Exit with one block of text: code 2 after an error of the user or the data, 130 after Ctrl-C."""
    try:
        yield
    except (DataError, ValueError, OSError) as error:
        parser.exit(2, printable(f"error: {error}\n"))
    except KeyboardInterrupt:
        parser.exit(130, f"{interrupted}\n")


def say(text: str) -> None:
    """Print a text on standard output; it is lost if the reader, such as head, has closed the pipe."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's exit flushes it again
