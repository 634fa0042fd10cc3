"""Images that a user gives: a folder of image files or of WebDataset shards."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.dataset import held_out_of
from data.deep import decode_to
from data.errors import DataError
from data.files import read as read_file
from data.images import LIMITS, Size
from data.loader import read
from data.shards.reader import Shards
from data.sources import find


def open_folder(
    folder: Path, size: Size | None, channels: int, bits: int = 8
) -> tuple[list[str], Callable[[range], Tensor]]:
    """Return the names of a folder's images, in order, and a function that reads some of them.

    Args:
        folder: of image files or of shards; one that data.prepare wrote stands for its held-out images
        size: of the images that are returned; None: their own, one at a time
        channels, bits: of the images that are returned

    Raises:
        ValueError, DataError: it is no folder of images or shards.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder; expected one of images or WebDataset shards (*.tar)")
    folder = Path(held_out_of(str(folder)))
    if any(folder.glob("*.tar")):
        shards = Shards(folder)
        names = [f"{i:06d}" for i in range(len(shards))]
        if size is None:
            return names, lambda rows: torch.stack([_decode_sample(shards, i, channels, bits) for i in rows])
        return names, lambda rows: read(shards, np.array(rows), size, channels, bits).image
    try:
        found = find(folder)
    except DataError as error:
        raise DataError(f"--images {error} and no shards (*.tar)") from error
    count = Counter(image.key for image in found)  # a.jpg gives a.png, or a.jpg.png if there is an a.png too
    names = [image.key if count[image.key] == 1 else image.name for image in found]
    return names, lambda rows: torch.stack([decode_file(folder / found[i].name, size, channels, bits) for i in rows])


def decode_file(path: Path, size: Size | None, channels: int, bits: int = 8) -> Tensor:
    """Return an image file as uint8 or uint16 [channels, height, width]; a DataError says why it cannot be read.

    A `size` of None is the image's own.
    """
    try:
        content = read_file(path, LIMITS.bytes)
        return torch.tensor(decode_to(content, size, channels, bits)).permute(2, 0, 1)
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise DataError(f"cannot read the image {path}: {getattr(error, 'strerror', None) or error}") from error


def _decode_sample(shards: Shards, position: int, channels: int, bits: int) -> Tensor:
    try:
        return torch.tensor(decode_to(shards.image(position), None, channels, bits)).permute(2, 0, 1)
    except ValueError as error:
        raise DataError(f"cannot decode an image: {shards.name(position)}: {error}") from error
