"""A data set that is made in `.OUT.unfinished`, which becomes OUT when it is complete."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from data.errors import DataError
from data.files import atomically
from data.shards.index import LOCK
from data.shards.reader import Shards


def unfinished_of(out: Path) -> Path:
    """Return the folder in which a data set is made; its shards are in `out` therein."""
    return out.absolute().with_name(f".{out.absolute().name}.unfinished")


@contextmanager
def locked(out: Path) -> Iterator[Path]:
    """Let one process alone work in the unfinished folder, which is removed if it fails before there is a plan.

    Raises:
        DataError: `out` exists, or another process is at work.
    """
    unfinished = unfinished_of(out)
    unfinished.mkdir(parents=True, exist_ok=True)
    with open(unfinished / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is at work in {unfinished}: wait for it, or end it") from error
        try:
            if out.exists():
                raise DataError(f"{out} exists already: name a new folder, or remove it first")
            yield unfinished
        except BaseException:
            if not (unfinished / "plan.json").exists():
                shutil.rmtree(unfinished)
            raise


def begin(unfinished: Path, planned: dict[str, Any]) -> None:
    """Continue what the same plan began, or begin if no shard is finished.

    Raises:
        DataError: Another plan has begun.
    """
    path, planned = unfinished / "plan.json", json.loads(json.dumps(planned))  # as it is read again
    if not (path.exists() and any((unfinished / "out").glob("*/*.tar"))):
        shutil.rmtree(unfinished / "out", ignore_errors=True)
        with atomically(path) as temporary:
            temporary.write_text(json.dumps(planned))
    before = json.loads(path.read_text())
    if before != planned:
        raise DataError(
            f"{unfinished} holds the beginning of another plan:"
            + "".join(f"\n  {k}: {before.get(k)} then, {v} now" for k, v in planned.items() if before.get(k) != v)
            + f"\nUse its options and its source to continue, or remove {unfinished} to begin again"
        )


def complete(unfinished: Path, out: Path, dataset: Dataset) -> None:
    """Index the shards, write dataset.json, and give the folder its name."""
    for split in dataset.splits:
        Shards(unfinished / "out" / split)  # writes the index
        (unfinished / "out" / split / LOCK).unlink(missing_ok=True)  # `locked` keeps others out of the folder
    with atomically(unfinished / "out" / "dataset.json", unfinished / "dataset.json") as path:
        path.write_text(dataset.to_json())
    os.rename(unfinished / "out", out)
    shutil.rmtree(unfinished)
