"""Parts that several benchmarks share: the command line, tables, timing, and the real training step in memory."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from trainer.batch import Batch
from trainer.config.parser import Config
from trainer.distributed.accelerator import DDP_SETTINGS
from trainer.ema import EMA
from trainer.networks import prepare_networks, set_memory_format
from trainer.step import TrainStep


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring, with the option `--rounds`."""
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--rounds", type=int, default=rounds, help=f"repetitions of each measurement ({rounds})")
    return options


def print_table(head: str, rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table, each row as soon as it is measured.

    Args:
        head: The column names, separated by " | ".
        rows: The cells of each row.
    """
    print(f"| {head} |\n|{'---|' * (head.count(' | ') + 1)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print()


def seconds(work: Callable[..., object], *given: Any, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that `work(*given)` takes by a clock."""
    began = clock()
    work(*given)
    return clock() - began


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median over rounds of each named figure."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def accelerator(precision: str | None = None, cpu: bool = True) -> Accelerator:
    """Return an accelerator; one process may use several, one after another, of different precisions."""
    AcceleratorState._reset_state()
    return Accelerator(cpu=cpu, mixed_precision=precision or "no", kwargs_handlers=[DDP_SETTINGS])


def random_batch(config: Config, domains: int, rank: int = 0, world: int = 1, step: int = 0) -> Batch:
    """Return a process's rows of random images, `trainer.batch_size` of them, in a batch of all processes."""
    data, rows = config.data, config.trainer.batch_size
    generator = torch.Generator().manual_seed(rank)
    shape = (rows, *data.shape)
    images = tuple(torch.rand(shape, generator=generator) * 2 - 1 for _ in range(domains))
    return Batch(images, slice(rank * rows, (rank + 1) * rows), world * rows, config.trainer.seed, step)


class Training:
    """The training step and the averaging of weights, as in a run, on one random batch in memory.

    Attributes:
        done: The steps taken; the first one is the first in which all players move.

    Args:
        config: A run's configuration, whose `trainer.batch_size` is taken as that of one process. No data is read.
        accelerator: The device, the precision and the processes.
        channels_last: Take the memory format that a run takes.
    """

    def __init__(self, config: Config, accelerator: Accelerator, channels_last: bool = True):
        torch.manual_seed(0)
        settings, rank, world = config.trainer, accelerator.process_index, accelerator.num_processes
        self.system = config.system().to(accelerator.device)
        if channels_last:
            set_memory_format(self.system)
        self.ema = EMA(self.system, settings.ema_half_life, world * settings.batch_size, settings.ema_ramp)
        self.system.hold(
            slice(rank * settings.batch_size, (rank + 1) * settings.batch_size), world * settings.batch_size
        )
        self.networks = prepare_networks(self.system, accelerator, settings)
        self.step = TrainStep(accelerator, self.system, 10**9)
        self.done = max(player_state.player.start for player_state in self.step.player_states)
        self.batch = random_batch(config, self.system.domains, rank, world)
        self.batch.images = tuple(images.to(accelerator.device) for images in self.batch.images)

    def __call__(self) -> None:
        """Take a step."""
        self.batch.step = self.done
        self.step([self.batch], self.done)
        self.done += 1
        self.ema.update(self.done)

    def check(self) -> None:
        """Exit with an error if a loss or a gradient was not finite."""
        if (failed := self.step.failed()) is not None:
            raise SystemExit(
                f"error: step {failed[0]}: a loss or gradient of player {failed[1].name} is not finite, so the "
                "measured times are meaningless"
            )
