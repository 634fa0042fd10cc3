"""Folders of images, whose sub-folders are the classes."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data.errors import DataError
from data.images import LIMITS
from data.sources.paths import ENDINGS, SPLITS, is_image, list_files, safe_parts
from data.sources.source import Item, Request, Source, number_classes, read_file


class File(NamedTuple):
    """A file of a folder or an archive."""

    path: str
    where: Any
    size: int
    stamp: int


def open_folder(request: Request) -> Source | None:
    """Open a folder of images: sub-folders are the classes, below `train` and `test` sub-folders if it has those."""
    if not request.path.is_dir():
        return None
    names, ignored = request.listed
    read = partial(_read, request.path, request.bounds.image.bytes)
    files = (_file(request.path, name) for name in names)
    return image_folder(files, read, request.name, request.splits, ignored)


def find(folder: Path) -> list[Item]:
    """Return all images below a folder in order of their paths, which are their names.

    Raises:
        DataError: There are none.
    """
    names, ignored = list_files(folder)
    files = (File(name, name, 0, 0) for name in names)
    return image_folder(files, partial(_read, folder, LIMITS.bytes), str(folder), False, ignored).items


def image_folder(
    files: Iterable[File],
    read: Callable[[Item], tuple[bytes, int]],
    name: str,
    splits: bool = True,
    ignored: Counter[str] | None = None,
) -> Source:
    """Return the source of a folder's or an archive's files.

    A class's label is the rank of its name among the classes of all splits.

    Raises:
        DataError: None of the files is an image.
    """
    images, ignored = [], Counter(ignored)
    for file in files:
        if is_image(file.path):
            images.append((safe_parts(file.path), file))
        else:
            ignored[os.path.splitext(file.path)[1].lower() or "without ending"] += 1
    split_folders = {parts[0] for parts, _ in images if len(parts) > 1 and parts[0].lower() in SPLITS and splits}
    found = {SPLITS[one.lower()] for one in split_folders}
    if "train" not in found or len(found) < 2:
        split_folders = set()
    items, classes = list[Item](), list[str | None]()
    for parts, file in sorted(images):
        split = None
        if split_folders:
            if parts[0] not in split_folders:
                ignored["outside of " + ", ".join(sorted(split_folders))] += 1
                continue
            split, parts = SPLITS[parts[0].lower()], parts[1:]
        key = str(PurePosixPath(*parts).with_suffix(""))
        items.append(Item(key, file.path, file.where, file.size, file.stamp, split))
        classes.append(parts[0] if len(parts) > 1 else None)
    if not items:
        others = ", ".join(f"{count} {ending}" for ending, count in ignored.most_common(5)) or "nothing"
        raise DataError(f"{name} holds no images ({ENDINGS}), but {others}: name a folder or file that has some")
    labels, names = number_classes(classes)
    items = [item._replace(label=label) for item, label in zip(items, labels, strict=True)]
    return Source(items, read, names, ignored=ignored)


def _file(folder: Path, name: str) -> File:
    try:
        stat = (folder / name).stat()
    except OSError:  # a broken link, or a link to itself, fails when it is read
        stat = (folder / name).lstat()
    return File(name, name, stat.st_size, stat.st_mtime_ns)


def _read(folder: Path, max_bytes: int, item: Item) -> tuple[bytes, int]:
    return read_file(folder / item.where, max_bytes), item.label
