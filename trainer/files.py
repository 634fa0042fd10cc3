"""Files that are written to the disk itself, at once or piece by piece."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import atomically

PIECE = 4 << 20  # bytes that are written at once
Pause = Callable[[float], None]


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
