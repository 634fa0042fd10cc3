"""Comparison of shards with their index and with dataset.json."""

import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.arrays import is_pixels
from data.dataset import Dataset, ShardEntry, Split, dataset_fingerprint, read_dataset
from data.errors import DataError
from data.files import escaped, regular_file
from data.images import LIMITS, Limits
from data.inspect.summary import DatasetSummary
from data.processes import run_in_parallel
from data.shards import index
from data.shards.tars import Sample, checksum, samples


class ShardFile(NamedTuple):
    split: str
    path: Path
    entry: index.Shard | None  # as it was last indexed


class Measured(NamedTuple):
    """What a shard holds, and what is wrong with it."""

    shard: ShardFile
    summary: DatasetSummary
    problems: list[str]


def inspect(folder: Path, workers: int = 1, verify: bool = False, limits: Limits = LIMITS) -> tuple[Dataset, list[str]]:
    """Return what a folder holds, and what is wrong with it.

    Args:
        folder: of shards, or of such folders
        verify: decode every sample even if a dataset.json says what there should be

    Raises:
        DataError: There are no shards, or dataset.json cannot be read.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder: name one that `python -m data.prepare` made, or a folder of shards (*.tar)"
        )
    dataset = read_dataset(folder)
    shards = _shards(folder, dataset)
    if dataset and not verify:
        return dataset, []
    measured: list[Measured] = []
    total = sum(split.images for split in dataset.splits.values()) if dataset else None
    run_in_parallel(partial(measure, limits=limits), shards, workers, measured.append, "verifying", total)
    measured.sort(key=lambda one: one.shard)
    problems = [problem for one in measured for problem in one.problems]
    splits = {}
    for name in dict.fromkeys(shard.split for shard in shards):
        parts = [one for one in measured if one.shard.split == name]
        splits[name] = describe_split([(one.shard.path, one.summary) for one in parts])
    if not dataset:
        return Dataset(fingerprint=dataset_fingerprint([], splits), classes=[], splits=splits, rejected=[]), problems
    problems += _differences(folder, dataset.splits, splits)
    if not problems and dataset.fingerprint != dataset_fingerprint(dataset.classes, splits):
        problems = [f"{folder / 'dataset.json'}: its classes or its fingerprint were changed"]
    return dataset, problems


def measure(shard: ShardFile, advance: Callable[[int], Any], limits: Limits = LIMITS) -> Measured:
    """Decode every sample of a shard; each problem names shard, member and reason."""
    summary, problems, keys, checksums = DatasetSummary(), list[str](), set[str](), list[int]()
    table = None if shard.entry is None else index.load_table(shard.path, shard.entry)

    def add(file: int, sample: Sample) -> None:
        content = os.pread(file, min(sample.size, limits.bytes + 1), sample.offset)
        if sample.key in keys:
            raise ValueError("another sample of this shard has the same key")
        if not content:
            raise ValueError("it has no image")
        keys.add(sample.key)
        checksums.append(checksum(file, sample.offset, sample.size))
        if sample.images or is_pixels(content):
            summary.add(sample.key, content, sample.label, limits)
        else:
            summary.add_latents(sample.key, content, sample.label)
        row = len(checksums) - 1
        if table is not None and (row >= len(table) or checksums[row] != table[row, 3]):
            raise ValueError("its bytes are not those that were indexed")

    try:
        with open(regular_file(shard.path), "rb") as file:
            for sample in samples(shard.path):
                advance(1)
                try:
                    add(file.fileno(), sample)
                except ValueError as error:
                    problems.append(f"{shard.path}, member {escaped(sample.name or sample.key)}: {error}")
    except (tarfile.TarError, OSError, ValueError) as error:
        problems.append(f"{shard.path}: it is damaged, cut short or no tar: {error}")
    expected = shard.entry.checksum if shard.entry else ""
    if expected and not problems and expected != index.digest(np.array(checksums, np.int64)):
        problems.append(f"{shard.path}: its images are not those that were indexed")
    return Measured(shard, summary, problems)


def describe_split(shards: list[tuple[Path, DatasetSummary]]) -> Split:
    """Return the entry in dataset.json of some shards that make a split."""
    whole, entries = DatasetSummary(), []
    for path, summary in shards:
        whole += summary
        entries.append(ShardEntry(path.name, path.stat().st_size, summary.images, summary.fingerprint))
    return whole.split(entries)


def _shards(folder: Path, dataset: Dataset | None) -> list[ShardFile]:
    folders = [folder / split for split in dataset.splits] if dataset else [folder, *sorted(folder.glob("*/"))]
    entries = {one: index.own_index(one)[1] for one in folders}
    shards = [
        ShardFile(one.name, path, entries[one].get(path.name)) for one in folders for path in sorted(one.glob("*.tar"))
    ]
    if not shards and not dataset:
        raise DataError(f"{folder} holds no shards (*.tar), nor do its sub-folders: name a folder that does")
    return shards


def _differences(folder: Path, expected: dict[str, Split], found: dict[str, Split]) -> list[str]:
    """Return the shards that differ from dataset.json; where none does, the other figures that differ."""
    problems = []
    for name, want in expected.items():
        have = found.get(name, describe_split([]))
        then, now = ({entry.name: entry for entry in split.shards} for split in (want, have))
        differing = sorted(shard for shard in then.keys() | now.keys() if then.get(shard) != now.get(shard))
        for shard in differing:
            was, is_ = _text(then.get(shard)), _text(now.get(shard))
            problems.append(f"{folder / name / shard}: dataset.json has {was}, the folder has {is_}")
        for field in () if differing else {*Split.__struct_fields__} - {"latents"}:  # known to who made them alone
            was, is_ = getattr(want, field), getattr(have, field)
            if was != is_:
                problems.append(f"{name}: {field} is {is_}, dataset.json says {was}")
    return problems


def _text(entry: ShardEntry | None) -> str:
    if entry is None:
        return "no such shard"
    return f"{entry.images:,} images, {entry.bytes:,} bytes, fingerprint of the samples {entry.fingerprint}"
