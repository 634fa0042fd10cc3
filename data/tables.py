"""Tables, times and amounts as text for a terminal."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

NUMBER = re.compile(r"[\d.,e-]+( [kMGT]?B)?")


def table(rows: Iterable[Sequence[object]]) -> list[str]:
    """Return rows of equally many cells as lines of aligned columns.

    A column that has only numbers or amounts below its head is aligned to the right, any other one to the left.
    Integers get thousands separators, and None is an empty cell.
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    columns = []
    for column in zip(*cells, strict=True):
        width, numbers = max(map(len, column)), all(NUMBER.fullmatch(cell) for cell in column[1:] if cell)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


def _text(cell: object) -> str:
    return "" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell)


def duration(seconds: float) -> str:
    """Return a time in its two largest units, such as "1 h 22 min"."""
    left = round(seconds)
    for (name, size), (smaller, part) in pairwise({"d": 86400, "h": 3600, "min": 60, "s": 1}.items()):
        if left >= size:
            rest = left % size // part
            return f"{left // size} {name}" + f" {rest} {smaller}" * bool(rest)
    return f"{left} s"


def amount(size: float) -> str:
    """Return a number of bytes with three digits and a decimal unit, such as "2.95 MB"."""
    for unit, factor in {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
