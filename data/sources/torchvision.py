"""Data sets of torchvision.datasets."""

import difflib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.errors import DataError
from data.sources.paths import SPLITS
from data.sources.source import Item, OpenFiles, Request, Source, png, read_file

PREFIX = "torchvision:"


def open_torchvision(request: Request) -> Source | None:
    """Open `torchvision:NAME`, in all of its splits that have a usual name.

    Raises:
        DataError: torchvision has no such data set, or the data set is not in torchvision's folder.
    """
    if not request.name.startswith(PREFIX):
        return None
    name = request.name.removeprefix(PREFIX)
    parameters = _parameters(name)
    read = TorchvisionReader(name, request.root, request.bounds.image.bytes)
    download = {"download": True} if request.download and "download" in parameters else {}
    items, classes, taken = list[Item](), list[str](), set[str | None]()
    for split, keywords in _splits(parameters):
        if split not in taken and (data := read.open(keywords | download)) is not None:
            taken.add(split)
            items += [Item(f"{i:08d}", f"{split or name} {i}", (keywords, i), split=split) for i in range(len(data))]
            classes = [one if isinstance(one, str) else ", ".join(one) for one in getattr(data, "classes", [])]
    if not items:
        raise DataError(f"{request.name} has no split of a usual name ({', '.join(SPLITS)}), so none can be taken")
    return Source(items, read, classes)


class TorchvisionReader(OpenFiles):
    """A reader of a torchvision data set; an item's `where` is (the data set's keywords, index).

    Files keep their bytes; arrays become PNGs.
    """

    def __init__(self, name: str, root: Path, max_bytes: int):
        super().__init__()
        self.name, self.root, self.max_bytes = name, root, max_bytes

    def open(self, keywords: dict[str, Any]) -> Any:
        """Return the data set, or None if it has no such split."""
        from torchvision import datasets

        if repr(keywords) not in self.opened:
            try:
                data = getattr(datasets, self.name)(self.root, **keywords)
            except (RuntimeError, FileNotFoundError, TypeError, ValueError) as error:
                if str(error).startswith("Unknown value"):  # of a split
                    return None
                raise DataError(
                    f"torchvision:{self.name} cannot be opened under --root {self.root}: {error}. Name the folder "
                    "that holds it by --root, or let torchvision download it by --download"
                ) from error
            if hasattr(data, "loader"):
                data.loader = Path  # returns the file's path instead of decoding the file
            self.opened[repr(keywords)] = data
        return self.opened[repr(keywords)]

    def __call__(self, item: Item) -> tuple[bytes, int]:
        keywords, index = item.where
        try:
            image, label = self.open(keywords)[index][:2]
        except UnidentifiedImageError as error:
            raise ValueError(str(error)) from error
        if not isinstance(image, (Path, Image.Image)):
            raise DataError(f"torchvision:{self.name} holds {type(image).__name__}s where images were expected")
        is_class = isinstance(label, (int, np.integer)) or getattr(label, "shape", None) == ()
        content = read_file(image, self.max_bytes) if isinstance(image, Path) else png(image)
        return content, int(label) if is_class else -1


def _parameters(name: str) -> set[str]:
    """Return the parameters of a data set's constructor."""
    from torchvision import datasets

    parameters = set(inspect.signature(getattr(datasets, name)).parameters) if name in datasets.__all__ else set()
    if "root" not in parameters:
        names = {one.lower(): f"{PREFIX}{one}" for one in datasets.__all__}
        close = [names[one] for one in difflib.get_close_matches(name.lower(), names, 3)]
        hint = f": did you mean {' or '.join(close)}?" if close else ""
        raise DataError(f"{PREFIX}{name} is no data set of torchvision.datasets that has a root{hint}")
    return parameters


def _splits(parameters: set[str]) -> list[tuple[str | None, dict[str, Any]]]:
    """Return the splits that a data set may have, each with the keywords that select it."""
    if "train" in parameters:
        return [("train", {"train": True}), ("test", {"train": False})]
    if "split" in parameters:
        return [(split, {"split": word}) for word, split in [*SPLITS.items(), ("trainval", "train")]]
    return [(None, {})]
