"""Images and shards that the tests make, and harm that they do to them."""

import io
import tarfile

import numpy as np
from PIL import Image

from data.loader import Augment, Batches
from data.order import Order
from data.shards.reader import Shards


def encoded(pixels: np.ndarray, form: str = "PNG", mode: str | None = None, **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)).save(file, form, **options)
    return file.getvalue()


def flat(value: int) -> bytes:
    """A grey PNG of 8 x 8 equal pixels."""
    return encoded(np.full((8, 8), value, np.uint8))


def tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def corrupt(shards: Shards, position: int) -> None:
    """Spoil an image, its place in the tar being left as it is."""
    shard, row = shards._place(position)
    with open(shards.paths[shard], "r+b") as file:
        file.seek(int(np.load(f"{shards.paths[shard]}.npy")[row, 0]))
        file.write(b"spoilt")


def batches(shards: Shards, rows: slice = slice(0, 8), augment: Augment = Augment(), size: int = 32) -> Batches:
    return Batches([shards], [Order(shards.counts, 8, 0)], size, 1, rows, augment)


def smooth(width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([255 * x, 255 * y, 127 + 127 * np.sin(9 * x)], -1).astype(np.uint8)
