"""A rank's share of every global batch, decoded ahead by worker processes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.images import decode
from data.order import Order
from data.shards import DataError, Shards


class Images(NamedTuple):
    """uint8 [n, channels, size, size] and int64 labels [n], -1 where there is none."""

    image: Tensor
    label: Tensor


def read(shards: Shards, positions: np.ndarray, size: int, channels: int) -> Images:
    """Decode the samples at some positions.

    Raises:
        DataError: a sample is damaged; names shard and member.
    """
    images = torch.empty((len(positions), channels, size, size), dtype=torch.uint8)
    for row, position in enumerate(positions):
        content = shards.image(int(position))
        try:
            images[row].numpy()[:] = decode(content, size, channels).transpose(2, 0, 1)
        except Exception as error:  # Pillow raises nearly anything on damaged bytes
            raise DataError(
                f"cannot decode an image: {shards.name(int(position))}: {error}. Mend or remove the sample and prepare "
                "the shard anew"
            ) from error
    return Images(images, torch.from_numpy(shards.labels[positions]))


class Batches(Dataset):
    """A map from step to this rank's rows of the global batch, of each data set; a pure function, so resuming needs the
    step alone."""

    def __init__(self, shards: Sequence[Shards], orders: Sequence[Order], size: int, channels: int, rows: slice):
        self.sets, self.size, self.channels, self.rows = list(zip(shards, orders, strict=True)), size, channels, rows

    def __getitem__(self, step: int) -> list[Images] | DataError:
        try:
            return [read(shards, order[step][self.rows], self.size, self.channels) for shards, order in self.sets]
        except DataError as error:  # as a value: raised in a worker, it would come wrapped in a traceback's text
            return DataError(f"step {step}: {error}")


def load(batches: Batches, steps: range, workers: int, pin_memory: bool = False) -> Iterator[list[Images]]:
    """The batches of some steps in order, whatever the number of worker processes (0: decoded when asked for).

    Raises:
        DataError: a sample is damaged; names step, shard and member.
    """
    loader: DataLoader[list[Images]] = DataLoader(
        batches, sampler=steps, batch_size=None, num_workers=workers, pin_memory=pin_memory, worker_init_fn=_one_thread
    )
    for images in loader:
        if isinstance(images, DataError):
            raise images
        yield images


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
