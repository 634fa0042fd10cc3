"""Files and folders that appear whole or not at all, also after a crash of the machine."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PIECE = 4 << 20  # bytes that are written at once
UNFINISHED = ".unfinished."  # prefix of temporary names
Pause = Callable[[float], None]


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A context that yields a temporary path for a file or folder, which gets the name `path` at its end.

    After an error nothing is left behind. Processes may write the same file at once: the last one wins.
    """
    unfinished = path.with_name(f"{UNFINISHED}{path.name}.{os.getpid()}")
    _remove(unfinished)
    try:
        yield unfinished
        _sync(unfinished)
        unfinished.rename(path)
    except BaseException:
        _remove(unfinished)
        raise
    _sync(path.parent)


def write_atomically(path: Path, content: str) -> None:
    with atomically(path) as unfinished:
        unfinished.write_bytes(content.encode())


def write_pieces(path: Path, *parts: Any, pause: Pause | None = None) -> str:
    """Write bytes to the disk itself and return their sha256.

    Args:
        path: the file
        parts: bytes-like objects
        pause: is called after each piece with the seconds that the piece took
    """
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            for start in range(0, len(part), PIECE):
                began = time.monotonic()
                piece = part[start : start + PIECE]
                file.write(piece)
                digest.update(piece)
                if pause is not None:
                    pause(time.monotonic() - began)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
