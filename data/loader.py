"""A rank's rows of every global batch, read and decoded ahead by worker processes."""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.deep import decode_to
from data.errors import DataError
from data.images import CENTRE_CROP, ChannelsError, Format, Limits, Size, View, sides
from data.order import Order, random_bits
from data.processes import PROCESSES, allow_open_files, end_with_parent, prepare_workers
from data.shards.reader import OnError, Shards

NEIGHBOURS = 16  # samples after a damaged one in its shard that are tried in its place
DEATHS = ("DataLoader worker", "Pin memory thread")  # how torch's messages about dead workers begin
FETCHES = 4  # remote shards downloaded at once
AHEAD = 0.75  # share of the cache for shards downloaded ahead


Crop = Literal["random"] | tuple[float, float]


class Samples(Protocol):
    """Encoded images by position: `Shards`, or an object with their interface."""

    on_error: OnError
    limits: Limits

    def __len__(self) -> int: ...

    @property
    def labels(self) -> np.ndarray: ...

    def images(self, positions: np.ndarray) -> tuple[list[bytes], np.ndarray]: ...

    def name(self, position: int) -> str: ...

    def bounds(self, position: int) -> tuple[int, int]: ...

    def fingerprint(self) -> str: ...


class Images(NamedTuple):
    """Decoded samples."""

    image: Tensor  # uint8 or uint16 [n, channels, height, width]
    label: Tensor  # int64 [n], -1 where an image has none
    position: Tensor  # int64 [n], of the samples that were read
    skipped: list[str]  # a message for each damaged sample: where it is, what is wrong, and its stand-in


class Augment(NamedTuple):
    """Random views of training images.

    Args:
        crop: smallest and largest share of the image that is kept, 3/4 to 4/3 times as wide as the size's shape
            (Szegedy et al. 2015); "random" keeps as many pixels as the size has, unscaled; None keeps the largest
            centred part of the size's shape
        flip: mirror half of the images
    """

    crop: Crop | None = None
    flip: bool = False

    def views(self, rows: slice, seed: int, step: int) -> list[View]:
        """Return the views of some rows of a global batch, a function of (seed, step, row) alone."""
        n = rows.stop - rows.start
        if self.crop is None and not self.flip:
            return [CENTRE_CROP] * n
        bits = random_bits(5 * n, seed, step, 0, 3, start=5 * rows.start)
        area, ratio, x, y, side = (bits >> np.uint64(11)).reshape(n, 5).T * 2.0**-53
        low, high = self.crop if isinstance(self.crop, tuple) else (0.0, 0.0)
        area, ratio = low + (high - low) * area, (2 * ratio - 1) * math.log(4 / 3)
        flip = (side < 0.5) & self.flip
        drawn = zip(*(values.tolist() for values in (area, ratio, x, y, flip)), strict=True)
        return [View(*row)._replace(unscaled=self.crop == "random") for row in drawn]


def read(shards: Samples, positions: np.ndarray, size: Size, channels: int, bits: int = 8) -> Images:
    """Return the samples at some positions; if the shards skip errors, a damaged one's neighbour stands in for it.

    Raises:
        DataError: A sample cannot be read, or is damaged; the message names shard and member.
    """
    form = Format(size, channels, bits)
    images = _read(shards, positions, form, [CENTRE_CROP] * len(positions), lambda: positions)
    return images._replace(image=images.image.contiguous())


def _read(
    shards: Samples,
    positions: np.ndarray,
    form: Format,
    views: Sequence[View],
    others: Callable[[], np.ndarray],
) -> Images:
    """Return a view of each sample; `others` returns more positions that may stand in for damaged samples."""
    contents, labels = shards.images(positions)
    images, seen, skipped = _empty(form, len(positions)), positions.copy(), []
    pixels = images.numpy()
    for row, (content, view) in enumerate(zip(contents, views, strict=True)):
        try:
            decode_to(content, *form, view, shards.limits, pixels[row])
        except ValueError as error:
            name = shards.name(int(positions[row]))
            if shards.on_error == "stop":
                repair = (
                    ". Repair or remove the sample and prepare the shard again, or let others stand in for such: "
                    "--data.on_error skip"
                )
                repair *= not isinstance(error, ChannelsError)  # nothing is damaged
                raise DataError(f"cannot decode an image: {name}: {error}{repair}") from error
            seen[row], pixels[row], labels[row] = _stand_in(shards, int(positions[row]), others, form, view)
            skipped.append(f"{name}: {error}; seen instead: {shards.name(int(seen[row]))}")
    return Images(images.permute(0, 3, 1, 2), torch.from_numpy(labels), torch.from_numpy(seen), skipped)


def _stand_in(
    shards: Samples, damaged: int, others: Callable[[], np.ndarray], form: Format, view: View
) -> tuple[int, np.ndarray, int]:
    """Return position, pixels and label of a damaged sample's stand-in: the next good sample of its shard, or else of
    the others. It is a function of the data and the step alone, so that every rank finds the same one."""
    first, end = shards.bounds(damaged)
    neighbours = first + (damaged - first + np.arange(1, min(NEIGHBOURS + 1, end - first))) % (end - first)
    for position in itertools.chain(neighbours.tolist(), np.roll(others(), -damaged).tolist()):
        (content,), (label,) = shards.images(np.array([position]))
        with suppress(ValueError):
            return position, decode_to(content, *form, view, shards.limits), label
    raise DataError(f"{shards.name(damaged)} is damaged, and so is all that could stand in for it")


def _empty(form: Format, n: int) -> Tensor:
    """Return a tensor for n images; in a worker, of shared memory, into which torch would copy a batch otherwise."""
    shape, dtype = (n, *sides(form.size), form.channels), torch.uint8 if form.bits == 8 else torch.uint16
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    except RuntimeError as error:
        raise DataError(
            f"/dev/shm, through which workers send images, is too small or full ({error}): enlarge it (docker run "
            "--shm-size 8g), or lower data.workers; 0 workers need none"
        ) from error
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


class PositionBlocks(Dataset):
    """A map from a number to the samples at some positions, as `read` returns them.

    Args:
        blocks: shards and positions of each number
        size: pixels of a side, or height and width
        channels: as `Format` has it
        bits: of a channel, 8 or 16
    """

    unit, sets = "block", ()  # no sets are fetched ahead

    def __init__(self, blocks: Sequence[tuple[Shards, range]], size: Size, channels: int, bits: int = 8):
        self.blocks, self.form = blocks, Format(size, channels, bits)

    def __getitem__(self, number: int) -> list[Images] | DataError:
        try:
            shards, positions = self.blocks[number]
            return [read(shards, np.array(positions), *self.form)]
        except (DataError, OSError, MemoryError) as error:
            return DataError(str(error) or type(error).__name__)


class Batches(Dataset):
    """A map from a step to this rank's rows of the global batch, of each data set. Resuming needs only the step.

    Args:
        shards, orders: of each data set
        size: pixels of a side, or height and width
        channels: as `Format` has it
        rows: this rank's rows of the global batch
        augment: random views, drawn by each order's seed
        bits: of a channel, 8 or 16
    """

    unit = "step"

    def __init__(
        self,
        shards: Sequence[Shards],
        orders: Sequence[Order],
        size: Size,
        channels: int,
        rows: slice,
        augment: Augment = Augment(),
        bits: int = 8,
    ):
        self.sets = list(zip(shards, orders, strict=True))
        self.form, self.rows, self.augment = Format(size, channels, bits), rows, augment

    def __getitem__(self, step: int) -> list[Images] | DataError:
        try:
            return [self._images(shards, order, step) for shards, order in self.sets]
        except (DataError, OSError, MemoryError) as error:
            # Returned, not raised: torch wraps what a worker raises in the text of a traceback.
            return DataError(f"step {step + 1}: {error or type(error).__name__}")

    def _images(self, shards: Shards, order: Order, step: int) -> Images:
        views = self.augment.views(self.rows, order.seed, step)
        return _read(shards, order.rows(step, self.rows), self.form, views, lambda: order[step])


def load(
    batches: Batches | PositionBlocks, steps: range, workers: int, pin_memory: bool = False, ahead: slice | None = None
) -> Iterator[list[Images]]:
    """Yield the batches of some steps in order; they do not depend on the number of workers.

    Args:
        batches: of this rank
        steps: to come
        workers: processes that read and decode, which end with this one; 0 decodes in this process
        pin_memory: for copies to a GPU
        ahead: rows of this machine's ranks, given to the one rank that downloads their remote shards ahead

    Raises:
        DataError: A sample is damaged (names step, shard and member), a shard cannot be read, or a worker died.
    """
    if workers:
        prepare_workers()
    options: dict[str, Any] = {"multiprocessing_context": PROCESSES, "worker_init_fn": _begin} if workers else {}
    options |= {"collate_fn": _as_it_is, "pin_memory": pin_memory}
    # torch advises against more workers than cores; a run says itself if it waits for data.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers, **options)
    with _fetching(batches, steps, ahead) as now:
        arriving = iter(loader)
        try:
            for step in steps:
                now.value = step
                images = _next(arriving, f"{batches.unit} {step + 1}", workers)
                if isinstance(images, DataError):
                    raise images
                yield images
        finally:
            # This ends the workers. If an error's traceback kept them, the garbage collector would close their queues
            # first, and they would take ten seconds.
            del arriving


def _next(arriving: Iterator[Any], what: str, workers: int) -> Any:
    """Return the next batch, and name dead workers."""
    try:
        return next(arriving)
    except (RuntimeError, OSError, EOFError) as error:  # the last two: while it sent a batch
        reason = str(error).partition("\n")[0] or type(error).__name__
        if not workers or (isinstance(error, RuntimeError) and not reason.startswith(DEATHS)):
            raise
        raise DataError(
            f"{what}: a process that reads data died: it was killed, or memory or /dev/shm is full. Lower "
            f"data.workers, or enlarge them ({reason})"
        ) from error


def _as_it_is(images: Any) -> Any:
    return images


def _begin(_: int) -> None:
    end_with_parent()
    allow_open_files()
    torch.set_num_threads(1)


@contextmanager
def _fetching(batches: Batches | PositionBlocks, steps: range, ahead: slice | None) -> Iterator[Any]:
    """A context with a shared number, the present step, and a process that downloads shards ahead of that step."""
    now = PROCESSES.Value("q", steps.start, lock=False)
    if ahead is None or not any(shards.remote.any() for shards, _ in batches.sets):
        yield now
        return
    process = PROCESSES.Process(target=fetch_ahead, args=(batches.sets, steps, ahead, now), daemon=True)
    process.start()
    try:
        yield now
    finally:
        process.kill()
        process.join()


def fetch_ahead(sets: list[tuple[Shards, Order]], steps: range, rows: slice, now: Any) -> None:
    """Download the remote shards that some rows will need, in order of need, as far ahead as the cache has room.

    `now` is a shared number, the present step.
    """
    end_with_parent()
    wanted: dict[tuple[int, int], tuple[int, int]] = {}  # last step that needs each shard, and its bytes
    with ThreadPoolExecutor(FETCHES) as pool:
        for step in steps:
            for which, (shards, order) in enumerate(sets):
                for shard in shards.shards_of(order.rows(step, rows)).tolist():
                    if not shards.remote[shard]:
                        continue
                    size = shards.shards[shard].filesize
                    if (which, shard) not in wanted:
                        _wait_for_room(sets, wanted, size, now)
                        pool.submit(_fetch, shards, shard)
                    wanted[which, shard] = step, size
            if len(wanted) == sum(int(shards.remote.sum()) for shards, _ in sets):
                break


def _wait_for_room(
    sets: list[tuple[Shards, Order]], wanted: dict[tuple[int, int], tuple[int, int]], size: int, now: Any
) -> None:
    """Wait until there is room for a shard of some size; release shards whose last step has passed."""
    limit = AHEAD * min(shards.cache.limit for shards, _ in sets if shards.cache)
    while wanted and sum(size for _, size in wanted.values()) + size > limit:
        passed = [key for key, (last, _) in wanted.items() if last < now.value]
        if passed:
            del wanted[passed[0]]
            sets[passed[0][0]][0].release(passed[0][1])
        else:
            time.sleep(0.1)


def _fetch(shards: Shards, shard: int) -> None:
    with suppress(DataError, OSError):  # a worker meets the same error when it reads the shard
        shards.fetch(shard)
