"""Files that are written whole or not at all."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIECE = 4 << 20  # bytes that are written at once
Pause = Callable[[float], None]


def no_pause(seconds: float) -> None:
    """The rest of a writer that nobody is slowed down by."""


def write_atomically(path: Path, content: str) -> None:
    """Write a small file that is there as a whole or not at all, and still after a crash of the machine."""
    unfinished = path.with_name(f".unfinished.{path.name}")
    write_pieces(unfinished, content.encode())
    os.replace(unfinished, path)
    sync_folder(path.parent)


def write_pieces(path: Path, *parts: Any, rest: Pause = no_pause) -> str:
    """Write bytes to the disk itself, with a rest after each piece; returns their sha256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            for start in range(0, len(part), PIECE):
                began = time.monotonic()
                piece = part[start : start + PIECE]
                file.write(piece)
                digest.update(piece)
                rest(time.monotonic() - began)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
