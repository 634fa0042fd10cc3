"""The names of images before data.prepare wrote them into a shard: `NAME.tar.names.json` beside it."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import msgspec

from data.files import atomically, parse, read


class Names(msgspec.Struct):
    """The names of a shard's images, in the shard's order."""

    filesize: int  # bytes of the shard, which tell whether they are its own
    names: list[str]


def save_names(shard: Path, filesize: int, names: Sequence[str], temporary: Path | None = None) -> None:
    """Write the names of the images of a shard of so many bytes; `temporary` is as for `atomically`."""
    with atomically(names_path(shard), temporary) as path:
        path.write_text(json.dumps({"filesize": filesize, "names": [*names]}, indent=0))


def load_names(shard: Path, filesize: int) -> list[str]:
    """Return the names of a shard's images; none if they are unknown, as those of another program's shard."""
    try:
        found = _load(names_path(shard), names_path(shard).stat().st_mtime_ns)
    except (OSError, ValueError):
        return []
    return found.names if found.filesize == filesize else []


def names_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.names.json")


@lru_cache(4)
def _load(path: Path, mtime_ns: int) -> Names:
    return parse(read(path), Names)
