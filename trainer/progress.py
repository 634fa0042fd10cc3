"""How far a command of `trainer.generate` is."""

import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SILENCE = 30  # seconds without a line, where standard error is no terminal


def progress(items: Collection[Item]) -> Iterator[Item]:
    """Yield items, with a bar in a terminal and a line each half minute elsewhere, on standard error."""
    if sys.stderr.isatty():
        yield from tqdm(items)
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said >= SILENCE:
            print(f"{done / len(items):.0%} done", file=sys.stderr, flush=True)
            said = time.monotonic()
        yield item
