"""What a source of images is: its images, how they are read, and how much it may hold."""

import io
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from data.errors import DataError
from data.files import read, regular_file
from data.images import LIMITS, Limits, limit_settings
from data.sources.paths import CONTACT_SHEET, is_image, is_visible, list_files

MAX_RATIO = 200  # bytes of an archive's images as a multiple of the archive's own: a bomb unpacks to more
SMALL = 2**26  # bytes that any archive may unpack to
OPEN_FILES = 100  # that a reader keeps open


class Item(NamedTuple):
    """One image of a source."""

    key: str  # decides the image's place in the order and its split; independent of the other images
    name: str  # for messages
    where: Any  # what the source's reader needs to find the image
    size: int = 0  # encoded bytes, 0 if unknown
    stamp: int = 0  # changes when the image's file is replaced
    split: str | None = None  # as the source names it
    label: int = -1  # number of its class, -1 if it has none


@dataclass
class Source:
    """All images of a source.

    Args:
        items: in a fixed order
        read: returns the bytes and the label of an item. It can be pickled. It raises ValueError where only this image
            is unreadable, OSError or DataError where the source is
        classes: names of the labels 0, 1, ...; empty if they have none
        ordered: keep the items' order and keys instead of shuffling by a hash of the keys
        ignored: number of files that are not images, by ending
    """

    items: list[Item]
    read: Callable[[Item], tuple[bytes, int]]
    classes: list[str] = field(default_factory=list)
    ordered: bool = False
    ignored: Counter[str] = field(default_factory=Counter)


class Bounds(NamedTuple):
    """How much a source may hold."""

    ratio: float = MAX_RATIO  # unpacked bytes of an archive's images as a multiple of the archive's own bytes
    image: Limits = LIMITS  # limits of each image

    def check(self, unpacked: int, path: Path, packed: int) -> None:
        """Raise DataError if a file of `packed` bytes unpacks to too many."""
        most = max(SMALL, self.ratio * packed)
        if unpacked > most:
            raise DataError(
                f"{path} has {packed:,} bytes, and unpacks to more than {most:,.0f}: it may be made to fill a disk. If "
                f"you trust it, raise data.prepare's --max_ratio {self.ratio:g}"
            )


BOUNDS = Bounds()


@dataclass
class Request:
    """A source to open, and how."""

    name: str  # the source as typed
    spool: Path  # path of a temporary file, for formats that allow no random access
    root: Path  # folder of torchvision's data sets
    download: bool = False  # let torchvision download what is missing from it
    splits: bool = True  # a folder's `train` and `test` sub-folders are splits, not classes
    bounds: Bounds = BOUNDS  # how much the source may hold

    @property
    def path(self) -> Path:
        return Path(self.name)

    @cached_property
    def listed(self) -> tuple[list[str], Counter[str]]:
        """Files of a folder, and how many entries were ignored, by reason; both empty if it is none."""
        return list_files(self.path) if self.path.is_dir() else ([], Counter())

    def files(self, ending: str) -> list[Path]:
        """Return the visible files with an ending that the name stands for: itself, or those in the folder."""
        if self.path.name.lower().endswith(ending) and self.path.is_file():
            return [self.path]
        names = sorted(name for name in self.listed[0] if name.endswith(ending) and is_visible(name))
        return [self.path / name for name in names]

    def check_alone(self, packed: list[Path]) -> None:
        """Raise DataError if a folder of files that hold images also has images of its own, which would be left out."""
        images = [name for name in self.listed[0] if is_image(name) and Path(name).name != CONTACT_SHEET]
        if images:
            raise DataError(
                f"{self.name} holds images, such as {min(images)} ({len(images):,} in all), and also files that hold "
                f"images, such as {packed[0].relative_to(self.path)} ({len(packed):,} in all): name the folder of "
                "either, or move one of them out"
            )


class OpenFiles:
    """A base of readers: open files stay open, and are not pickled."""

    def __init__(self) -> None:
        self.opened: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": {}}


class RangeReader(OpenFiles):
    """A reader of parts of files; an item's `where` is (number of the file, offset, size)."""

    def __init__(self, paths: list[Path], max_bytes: int):
        super().__init__()
        self.paths, self.max_bytes = paths, max_bytes

    def __call__(self, item: Item) -> tuple[bytes, int]:
        number, offset, size = item.where
        check_size(size, self.max_bytes)
        if number not in self.opened:
            if len(self.opened) >= OPEN_FILES:
                self.opened.pop(next(iter(self.opened))).close()
            self.opened[number] = open(regular_file(self.paths[number]), "rb")  # noqa: SIM115
        content = os.pread(self.opened[number].fileno(), size, offset)
        if len(content) != size:
            raise DataError(f"{self.paths[number]} ends within {item.name}: it was cut short while in use")
        return content, item.label


def check_size(size: int, max_bytes: int) -> None:
    """Raise ValueError if an image has more bytes than it may have."""
    if size > max_bytes:
        raise ValueError(f"it has {size:,} bytes, more than {max_bytes:,} ({limit_settings('bytes')})")


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of an image's file; raise ValueError if it cannot be read, as other files may be readable."""
    try:
        return read(path, max_bytes)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from error


def png(image: Image.Image) -> bytes:
    """Return an image as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def number_classes(names: list[str | None]) -> tuple[list[int], list[str]]:
    """Return the label of each class name (-1 for None), and the names of the labels 0, 1, ..."""
    classes = sorted({name for name in names if name is not None})
    labels = {name: label for label, name in enumerate(classes)}
    return [-1 if name is None else labels[name] for name in names], classes
