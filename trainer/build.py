"""Builds what a run trains: the system and its averages, the datasets with their order, and the split of a batch."""

import copy
import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator

from data.errors import DataError
from data.order import Order
from data.processes import prepare_workers
from data.shards.reader import OnError, Shards
from models import System
from models.manifest import checkpoints
from trainer.batch import Batch
from trainer.checkpoint.state import TrainState, frozen_checksums
from trainer.classes import check_class_names, check_labels
from trainer.config.parser import Config
from trainer.config.resume import flatten
from trainer.config.settings import DataConfig
from trainer.distributed.ranks import Ranks, code_checksum, run_on_main
from trainer.draws import key
from trainer.ema import EMA
from trainer.networks import prepare_networks, set_memory_format
from trainer.parts import RunParts
from trainer.step import TrainStep, frozen_networks
from trainer.weights import Initial, start_from

PER_MACHINE_SETTINGS = ("data.workers", "data.cache", "data.cache_gb")  # settings in which processes may differ


def build_run(config: Config, accelerator: Accelerator, ranks: Ranks) -> RunParts:
    """Build everything that a run trains, with the same weights on all processes.

    Raises:
        ValueError: a setting is out of its range, or processes differ in their code, settings or data.
        DataError: shards are missing or damaged.
    """
    settings, code = config.trainer, code_checksum()
    if config.data.workers:
        prepare_workers()
    config.settle_precision(accelerator.mixed_precision)
    torch.manual_seed(key(settings.seed, "weights"))
    system = config.system()
    system.players()  # checks their settings
    frozen = frozen_networks(system, settings.train_only)
    per_rank_batch, micro_batch = split_batch(
        settings.batch_size, settings.micro_batch, accelerator.num_processes, system.groups
    )
    trains, tests = open_datasets(config, system)
    _check_same_run(config, system, [*trains, *tests], code, ranks)
    orders = make_orders(config, trains)

    initial = run_on_main(accelerator, lambda: load_initial(config, system))
    system.to(accelerator.device)
    ranks.broadcast_weights(system)  # from one seed, different processors draw weights that differ in their last digits
    set_memory_format(system)
    ema = EMA(system, settings.ema_half_life, settings.batch_size, settings.ema_ramp, settings.ema_lengths)
    first = accelerator.process_index * per_rank_batch
    system.hold(slice(first, first + per_rank_batch), settings.batch_size)
    networks = prepare_networks(system, accelerator, settings, frozen)
    split = (per_rank_batch, micro_batch)
    return RunParts(config, system, networks, ema, trains, tests, orders, *split, code, frozen, initial)


def load_initial(config: Config, system: System, copy: bool = True) -> Initial | None:
    """Load the weights that trainer.init_from names, or only compare them; None if the run resumes or draws its own.

    Raises:
        ValueError: they cannot be read, or none fits.
    """
    settings = config.trainer
    if settings.init_from is None or checkpoints(config.run_dir / "checkpoints"):
        return None
    return start_from(settings.init_from, settings.init_averages, system.networks(), type(system), copy)


def _check_same_run(config: Config, system: System, shards: list[Shards], code: str, ranks: Ranks) -> None:
    """Check that all processes run the same program with the same settings on the same images."""
    own = {"code": code, **flatten(config.resolved()), **frozen_checksums(system)}
    for name in PER_MACHINE_SETTINGS:
        del own[name]
    ranks.check_same(own | {"shards": [one.fingerprint() for one in shards]})


def make_train_step(parts: RunParts, accelerator: Accelerator) -> TrainStep:
    """Return the run's step, with new optimizers."""
    settings, graphs = parts.config.trainer, parts.config.trainer.compile == "cuda_graphs"
    options = (settings.steps, settings.share_passes, settings.overflows, parts.frozen, graphs)
    return TrainStep(accelerator, parts.system, *options)


def take_trial_steps(parts: RunParts, state: TrainState, accelerator: Accelerator) -> None:
    """Take the steps that must precede the first one, and undo them.

    They compile the networks, in steps with gradient penalties and without them, before the run's time is measured. And
    DDP reorders its buckets after its first backward pass; with three processes or more that changes the rounding of
    sums, and the first step of a resumed run would differ from the same step of an uninterrupted one.
    """
    settings, data = parts.config.trainer, parts.config.data
    if not settings.compile and (accelerator.num_processes == 1 or settings.grad_sync == "flat"):
        return
    before = copy.deepcopy(state.trained())
    blank = torch.zeros(parts.per_rank_batch, *data.shape, device=accelerator.device)
    images, rows = (blank,) * parts.system.domains, parts.system.rows
    label = torch.zeros(len(blank), dtype=torch.int64, device=accelerator.device)
    train_step = make_train_step(parts, accelerator)
    players = [player_state.player for player_state in train_step.player_states]
    compiles = bool(settings.compile)
    trials = {start + compiles * after for p in players for start in p.starts for after in (0, p.every)}
    for step in trials:
        train_step(Batch(images, rows, settings.batch_size, 0, step, label).split(parts.micro_batch), step)
    state.load_networks(before)


def split_batch(
    batch_size: int, micro_batch: int | None, world_size: int, groups: Mapping[str, int] = {}
) -> tuple[int, int]:
    """Return the images per step of one process, and how many of them pass through the networks at once.

    Args:
        batch_size: images per step of all processes
        micro_batch: most images at once; None sets no limit
        world_size: number of processes
        groups: images that a discriminator must see together, by the setting that says so

    Raises:
        ValueError: the world size does not divide the batch, or no micro-batch holds whole groups.
    """
    per_rank_batch, rest = divmod(batch_size, world_size)
    if rest or not per_rank_batch:
        fitting = [max(1, batch_size // world_size) * world_size, -(-batch_size // world_size) * world_size]
        worlds = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise ValueError(
            f"trainer.batch_size {batch_size} cannot be dealt evenly to {world_size} processes: take "
            f"{' or '.join(str(size) for size in dict.fromkeys(fitting))}, or another number of processes "
            f"({_some_of(worlds)})"
        )
    group, names = math.lcm(*groups.values()), " and ".join(f"{name} {size}" for name, size in groups.items())
    fits = [size for size in range(group, per_rank_batch + 1, group) if per_rank_batch % size == 0]
    if not fits:
        raise ValueError(
            f"{names} cannot divide a process's {per_rank_batch} images a step (trainer.batch_size {batch_size} over "
            f"{world_size} processes) into whole groups: change it, trainer.batch_size or the number of processes"
        )
    within = [size for size in fits if size <= (micro_batch or per_rank_batch)]
    if not within:
        raise ValueError(
            f"trainer.micro_batch {micro_batch} holds no whole group of {names}: take one of "
            f"{_some_of(fits)}, or leave it out"
        )
    return per_rank_batch, within[-1]


def _some_of(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) < 12 else [*numbers[:5], "...", *numbers[-5:]]))


def open_datasets(config: Config, system: System) -> tuple[list[Shards], list[Shards]]:
    """Return the training and the held-out shards of each dataset that a system learns from.

    Raises:
        ValueError: the system needs more or fewer datasets.
        DataError: shards are missing or damaged, or a label is not one of the system's classes, or names another one
            in data.test; the message names the setting.
    """
    data = config.data
    trains = _open(data, "data.train", data.trains, system, data.on_error)
    tests = _open(data, "data.test", data.tests, system) if data.tests else []
    for train, test in zip(trains, tests, strict=False) if system.classes else ():
        check_class_names(test.classes, train.classes, "data.test")
    return trains, tests


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
        opened = data.open(folders, on_error)
        for shards in opened:
            if system.classes and not shards.remote.any():  # remote ones are checked as they arrive
                check_labels(shards, system.classes, shards.labels)
        return opened
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error


def check_held_out(tests: list[Shards]) -> None:
    """Check that there are held-out images, which evaluations compare with.

    Raises:
        ValueError: there are no held-out images.
    """
    if not tests:
        raise ValueError(
            "data.test is not set, and evaluations compare with held-out images: name a folder of shards with "
            "--data.test, or turn evaluations off with --evaluate.every 0"
        )


def make_orders(config: Config, trains: list[Shards]) -> list[Order]:
    """Return the order of samples of each training set.

    Raises:
        DataError: a set has fewer samples than a batch.
    """
    settings, data = config.trainer, config.data
    seeds = [settings.seed, *(key(settings.seed, "order", i) for i in range(1, len(trains)))]
    return [
        Order(shards.counts, settings.batch_size, seed, data.lanes, data.window)
        for shards, seed in zip(trains, seeds, strict=True)
    ]
