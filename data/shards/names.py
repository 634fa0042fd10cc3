"""The names of images before data.prepare wrote them into a shard: `NAME.tar.names.json` beside it, a list of texts."""

import json
from collections.abc import Sequence
from pathlib import Path

from data.files import atomically, parse, read


def save_names(shard: Path, names: Sequence[str], temporary: Path | None = None) -> None:
    """Write the names of a shard's images, in the shard's order; `temporary` is as for `atomically`."""
    with atomically(names_path(shard), temporary) as path:
        path.write_text(json.dumps([*names], indent=0))


def load_names(shard: Path) -> list[str]:
    """Return the names of a shard's images; nothing if they are unknown, as those of another program's shard."""
    try:
        return parse(read(names_path(shard)), list[str])
    except (OSError, ValueError):
        return []


def names_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.names.json")
