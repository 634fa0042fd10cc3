"""What a run is built from: processes and precision, image sets and their order, the shares of a batch."""

import ctypes
import logging
import os
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DynamoBackend, parse_flag_from_env

from data.errors import DataError
from data.order import Order
from data.shards import OnError, Shards
from models import System
from trainer.batch import key
from trainer.config import Config, Data, Trainer
from trainer.peers import MEETING

# Buffers, where a network has any (spectral norm's), are alike on all processes by arithmetic: none is sent.
WRAPPING = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def accelerator_of(settings: Trainer) -> Accelerator:
    """The launcher's processes and device, and the precision asked for.

    Raises:
        ValueError: fp16 on a CPU, or accelerate does not see the launcher's processes as one world.
    """
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Its successor forward_sync_buffers is not accelerate's to pass on yet.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
    # Of a dimension of size 1, whose stride means nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    _settle_cuda(settings)
    if not _has_gpu():
        keep_memory()
    # NCCL's watchdog aborts a process: have the one that names who is missing be the first, peers.py's on the host.
    patience = 2 if _has_gpu() else 1
    waiting = InitProcessGroupKwargs(init_method=MEETING, timeout=timedelta(seconds=patience * settings.timeout))
    accelerator = Accelerator(mixed_precision=precision_of(settings.precision), kwargs_handlers=[WRAPPING, waiting])
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "the launcher's --dynamo_backend would compile discriminators, too, through which no gradient penalty can "
            "go: take --dynamo_backend no and --trainer.compile true"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes, but each would train alone: for CPU processes set "
            "ACCELERATE_USE_CPU=true before `accelerate launch --multi_gpu`"
        )
    check_precision(accelerator.mixed_precision, accelerator.device.type, settings.precision)
    return accelerator


def check_precision(precision: str, device: str, asked: str | None) -> None:
    """Refuse what would silently be another precision.

    Raises:
        ValueError: names the setting, `trainer.precision` if that was `asked` for.
    """
    if precision == "fp16" and device == "cpu":
        source = "trainer.precision" if asked else "the launcher's --mixed_precision"
        raise ValueError(f"{source} is fp16, which a CPU would silently train in fp32: take bf16 or no")


def precision_of(asked: str | None) -> str:
    """The one asked for, the launcher's, or bf16 where a GPU has it: accelerate's launcher says no by default."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked or launched != "no":
        return asked or launched
    return "bf16" if _has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def _has_gpu() -> bool:
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def _settle_cuda(settings: Trainer) -> None:
    """What CUDA and NCCL read when they start: the same bits each time, if asked for, and a record of what hung."""
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    for name, value in {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{settings.run_dir}/nccl_rank_",
    }.items():
        os.environ.setdefault(name, value)


def keep_memory() -> None:
    """Have glibc keep what a step frees for the next: page by page from the kernel it takes up to a fifth of a step.

    Where the environment sets malloc's thresholds (MALLOC_MMAP_THRESHOLD_=65536 saves memory), they stay.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    set_before = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if mallopt and not set_before and "malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # all that older ones take
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def shares(batch_size: int, micro_batch: int | None, world_size: int, group: int = 1) -> tuple[int, int]:
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


def open_sets(config: Config, system: System) -> tuple[list[Shards], list[Shards]]:
    """The training and the held-out shards of each data set that a system learns from.

    Raises:
        ValueError: there are too many or too few sets.
        DataError: shards are missing or damaged; names the setting.
    """
    data = config.data
    trains = _open(data, "data.train", data.trains, system, data.on_error)
    return trains, _open(data, "data.test", data.tests, system) if data.tests else []


def _open(data: Data, setting: str, folders: list[str], system: System, on_error: OnError = "stop") -> list[Shards]:
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


def orders_of(config: Config, trains: list[Shards]) -> list[Order]:
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
