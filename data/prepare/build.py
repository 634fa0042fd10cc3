"""A data set made in `.OUT.unfinished`, which becomes OUT when it is complete."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data.dataset import Dataset, Split, dataset_fingerprint
from data.errors import DataError
from data.inspect.summary import DatasetSummary
from data.inspect.verify import describe_split
from data.prepare.plan import PrepareSettings, Task, check_range, plan, share_held_out
from data.prepare.writer import Writer, write_shards
from data.shards.names import names_path
from data.sources import MAX_RATIO, Bounds, open_source
from data.unfinished import begin, complete, locked

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
    with locked(out) as unfinished:
        opened = open_source(source, unfinished / "source", root, download, bounds=Bounds(max_ratio, chosen.limits))
        if chosen.test_fraction is None:
            chosen = replace(chosen, test_fraction=share_held_out(len(opened.items)))
        tasks = plan(opened, chosen, source)
        files = hashlib.sha256("".join(map(repr, opened.items)).encode()).hexdigest()[:16]
        begin(unfinished, {"source": source, **asdict(chosen), "images": len(opened.items), "files": files})
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
        complete(unfinished, out, dataset)
    return {name: split.images for name, split in splits.items()}


def _describe(tasks: list[Task], writer: Writer) -> dict[str, Split]:
    """Return the splits of dataset.json; remove shards none of whose images could be read."""
    shards: dict[str, list[tuple[Path, DatasetSummary]]] = {task.split: [] for task in tasks}
    for task in tasks:
        summary, path = writer.report(task)[0], writer.unfinished / "out" / task.tar
        if summary.images:
            shards[task.split].append((path, summary))
        else:
            path.unlink()
            names_path(path).unlink(missing_ok=True)
    if empty := [split for split, parts in shards.items() if not parts]:
        raise DataError(f"none of the {empty[0]} split's images could be read: see the reasons in {writer.unfinished}")
    return {split: describe_split(parts) for split, parts in shards.items()}
