"""What a run is built from: processes and precision, image sets and their order, the shares of a batch."""

from data.errors import DataError
from data.order import Order
from data.shards.reader import OnError, Shards
from models import System
from trainer.batch import key
from trainer.config.parser import Config
from trainer.config.settings import DataConfig


def split_batch(batch_size: int, micro_batch: int | None, world_size: int, group: int = 1) -> tuple[int, int]:
    """Images a step of one process, and how many of them go through the networks at once.

    Args:
        batch_size: images a step of all
        micro_batch: at most so many at once; None: a process's whole share
        world_size: processes
        group: images that must stay together

    Raises:
        ValueError: the world size does not divide the batch, or no micro-batch holds whole groups.
    """
    share, rest = divmod(batch_size, world_size)
    if rest or not share:
        fitting = [max(1, batch_size // world_size) * world_size, -(-batch_size // world_size) * world_size]
        worlds = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise ValueError(
            f"trainer.batch_size {batch_size} cannot be dealt evenly to {world_size} processes: take "
            f"{' or '.join(str(size) for size in dict.fromkeys(fitting))}, or another number of processes "
            f"({_some_of(worlds)})"
        )
    fits = [size for size in range(group, share + 1, group) if share % size == 0]
    if not fits:
        raise ValueError(
            f"minibatch_stddev {group} does not divide a process's {share} images a step (trainer.batch_size "
            f"{batch_size} over {world_size}): change it, trainer.batch_size or the number of processes"
        )
    within = [size for size in fits if size <= (micro_batch or share)]
    if not within:
        raise ValueError(
            f"trainer.micro_batch {micro_batch} holds no whole group of minibatch_stddev {group}: take one of "
            f"{_some_of(fits)}, or leave it unset"
        )
    return share, within[-1]


def _some_of(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) < 12 else [*numbers[:5], "...", *numbers[-5:]]))


def open_datasets(config: Config, system: System) -> tuple[list[Shards], list[Shards]]:
    """The training and the held-out shards of each data set that a system learns from.

    Raises:
        ValueError: there are too many or too few sets.
        DataError: shards are missing or damaged; names the setting.
    """
    data = config.data
    trains = _open(data, "data.train", data.trains, system, data.on_error)
    return trains, _open(data, "data.test", data.tests, system) if data.tests else []


def _open(
    data: DataConfig, setting: str, folders: list[str], system: System, on_error: OnError = "stop"
) -> list[Shards]:
    if len(folders) != system.domains:
        names = f"{len(folders)} folder{'s' if len(folders) > 1 else ''}"
        raise ValueError(
            f"{setting} names {names}, expected {system.domains} for {type(system).__name__}"
            + (': give "[A, B]"' if system.domains == 2 else "")
        )
    try:
        return data.open(folders, on_error)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error


def check_held_out(tests: list[Shards]) -> None:
    """Refuse evaluations without anything to compare with.

    Raises:
        ValueError: there are no held-out images.
    """
    if not tests:
        raise ValueError(
            "data.test is not set, and evaluations compare with held-out images: name a folder of shards with "
            "--data.test, or turn them off with --evaluate.every 0"
        )


def make_orders(config: Config, trains: list[Shards]) -> list[Order]:
    """The order of samples of each training set.

    Raises:
        DataError: one has fewer samples than a batch.
    """
    settings, data = config.trainer, config.data
    seeds = [settings.seed, *(key(settings.seed, "order", i) for i in range(1, len(trains)))]
    return [
        Order(shards.counts, settings.batch_size, seed, data.lanes, data.window)
        for shards, seed in zip(trains, seeds, strict=True)
    ]
