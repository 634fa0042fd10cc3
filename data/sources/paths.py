"""Paths in folders and archives: which are images, and which split their words name."""

import os
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from data.shards.tars import IMAGE_FILES

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val"), "validation")
CONTACT_SHEET = "contact_sheet.png"  # which data.inspect writes beside shards
ENDINGS = ", ".join(sorted(IMAGE_FILES))


def list_files(folder: Path) -> tuple[list[str], Counter[str]]:
    """Return the paths of all files below a folder, relative to it, and how many entries were ignored, by reason.

    Hidden sub-folders are skipped. Each real folder is listed once, whatever links lead to it, and under its own path
    if that lies below `folder`: so links are followed last.
    """
    files, ignored, seen, starts = list[str](), Counter[str](), set[tuple[int, int]](), [""]

    def on_error(error: OSError) -> None:
        if not isinstance(error, PermissionError) or Path(error.filename) == folder:
            raise error
        ignored["folders that this user may not read"] += 1  # such as lost+found

    while starts:
        for parent, folders, names in os.walk(folder / starts.pop(0), onerror=on_error):
            stat = os.stat(parent)
            if (stat.st_dev, stat.st_ino) in seen:
                ignored["links to a folder that is listed already"] += 1
                folders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            relative = os.path.relpath(parent, folder).removeprefix(".")
            folders[:] = [name for name in folders if is_visible(name)]
            files += [os.path.join(relative, name) for name in names]
            starts += [os.path.join(relative, name) for name in folders if os.path.islink(os.path.join(parent, name))]
    return files, ignored


def safe_parts(path: str) -> tuple[str, ...]:
    """Return the parts of a stranger's path without roots and `..`, so that it stays below its folder."""
    return tuple(part for part in PurePosixPath(path).parts if part not in ("/", "//", ".."))


def is_image(path: str) -> bool:
    """Whether a path's ending is that of an image; TAR.npy is the table of a shard."""
    name = path.lower()
    return is_visible(path) and PurePosixPath(name).suffix[1:] in IMAGE_FILES and not name.endswith(".tar.npy")


def is_visible(path: str) -> bool:
    """Whether a path is neither hidden nor what macOS adds to archives."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in safe_parts(path))


def split_of(path: Path, folder: Path) -> str | None:
    """Return the split that a word of a path names, as in data/train-00000-of-00004.parquet or test/0000.tar."""
    words = re.split(r"[-_./]", path.relative_to(folder).as_posix().lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)
