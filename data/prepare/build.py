"""A data set made in `.OUT.unfinished`, which becomes OUT when it is complete."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.dataset import Dataset, Split, dataset_fingerprint
from data.errors import DataError
from data.files import atomically
from data.inspect.summary import DatasetSummary
from data.inspect.verify import describe_split
from data.prepare.plan import PrepareSettings, Task, check_range, plan
from data.prepare.writer import Writer, write_shards
from data.shards.reader import Shards
from data.sources import MAX_RATIO, Bounds, open_source

TORCHVISION = Path("datasets/torchvision")


def prepare(
    source: str,
    out: Path,
    workers: int = 1,
    max_rejected: float = 0.01,
    max_ratio: float = MAX_RATIO,
    root: Path = TORCHVISION,
    download: bool = False,
    **settings: Any,
) -> dict[str, int]:
    """Write a source's shards, a folder a split, and dataset.json; return the number of images of each split.

    The arguments are the options of `python -m data.prepare`; `settings` are those of `PrepareSettings`. The number of
    workers does not change a byte.

    Raises:
        DataError: The source has no images or is damaged, too many cannot be read, or `out` exists.
        ValueError: An option is out of its range.
        OSError: A file cannot be read or written.
    """
    chosen = PrepareSettings(**settings)
    check_range("max_rejected", max_rejected, 0 <= max_rejected <= 1, "a share from 0 to 1")
    check_range("workers", workers, workers >= 1, "at least 1")
    unfinished = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    with lock(unfinished):
        if out.exists():
            raise DataError(f"{out} exists already: name a new folder, or remove it first")
        opened = open_source(source, unfinished / "source", root, download, bounds=Bounds(max_ratio, chosen.limits))
        tasks = plan(opened, chosen, source)
        files = hashlib.sha256("".join(map(repr, opened.items)).encode()).hexdigest()[:16]
        _begin(unfinished, {"source": source, **asdict(chosen), "images": len(opened.items), "files": files})
        writer = Writer(opened.read, chosen, unfinished)
        rejected = write_shards(tasks, writer, workers, max_rejected)
        splits = _describe(tasks, writer)
        dataset = Dataset(
            source=source,
            settings=asdict(chosen),
            fingerprint=dataset_fingerprint(opened.classes, splits),
            classes=opened.classes,
            splits=splits,
            ignored=dict(sorted(opened.ignored.items())),
            rejected=rejected,
        )
        for split in splits:
            Shards(unfinished / "out" / split)  # writes the index
        with atomically(unfinished / "out" / "dataset.json", unfinished / "dataset.json") as path:
            path.write_text(dataset.to_json())
        os.rename(unfinished / "out", out)
        shutil.rmtree(unfinished)
    return {name: split.images for name, split in splits.items()}


@contextmanager
def lock(unfinished: Path) -> Iterator[None]:
    """Let one process alone work in the unfinished folder, which is removed if it fails before there is a plan."""
    unfinished.mkdir(parents=True, exist_ok=True)
    with open(unfinished / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is at work in {unfinished}: wait for it, or end it") from error
        try:
            yield
        except BaseException:
            if not (unfinished / "plan.json").exists():
                shutil.rmtree(unfinished)
            raise


def _begin(unfinished: Path, planned: dict[str, Any]) -> None:
    """Continue what the same plan began, or begin if no shard is finished."""
    path = unfinished / "plan.json"
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


def _describe(tasks: list[Task], writer: Writer) -> dict[str, Split]:
    """Return the splits of dataset.json; remove shards none of whose images could be read."""
    shards: dict[str, list[tuple[Path, DatasetSummary]]] = {task.split: [] for task in tasks}
    for task in tasks:
        summary, path = writer.report(task)[0], writer.unfinished / "out" / task.tar
        if summary.images:
            shards[task.split].append((path, summary))
        else:
            path.unlink()
    if empty := [split for split, parts in shards.items() if not parts]:
        raise DataError(f"none of the {empty[0]} split's images could be read: see the reasons in {writer.unfinished}")
    return {split: describe_split(parts) for split, parts in shards.items()}
