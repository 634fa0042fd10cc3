"""Parts that several benchmarks share: the command line, tables, timing, and the real training step in memory."""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from data.shards.reader import write
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
    options.add_argument("--small", action="store_true", help="the smallest sizes, which only try the benchmark itself")
    return options


def machine() -> str:
    """Return this machine's name: processor, cores, what it computes in hardware, torch's version."""
    return f"{cpu_fact('model name')}, {os.cpu_count()} cores, {', '.join(vectors())}, torch {torch.__version__}"


def vectors() -> list[str]:
    flags = cpu_fact("flags").split()
    bf16 = "bf16 in hardware" if {"avx512_bf16", "amx_bf16"} & {*flags} else "no bf16 in hardware"
    return ["AVX-512" if "avx512f" in flags else "no AVX-512", bf16]


def cpu_fact(name: str) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), f"unknown {name}")


def precisions() -> dict[str, str]:
    """Return the precisions that this machine computes in hardware, by the names in tables."""
    return {"fp32": "no", **({"bf16": "bf16"} if "bf16 in hardware" in vectors() else {})}


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


def paired(ours: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Return medians over rounds: the CPU seconds of ours and of the other, and the ratio of the other's to ours.

    A round times the other before and after ours, so that what else the machine does cancels in the ratio.
    """
    times = []
    for i in range(-1, rounds):
        before, mine, after = (seconds(work, clock=time.process_time) for work in (other, ours, other))
        times += [(mine, (before + after) / 2, (before + after) / 2 / mine)] if i >= 0 else []  # the first is slower
    first, second, ratio = (statistics.median(column) for column in zip(*times, strict=True))
    return first, second, ratio


def bar(found: float, required: float, most: bool = False) -> list[str]:
    """Return two cells: the figure, bold where it misses its bar, and the bar, which is the least or the most of it."""
    met = found <= required if most else found >= required
    return [f"{found:.2f}" if met else f"**{found:.3f}**", f"{'at most ' if most else ''}{required:g}"]


def child(module: str, *given: object) -> Any:
    """Return what a fresh process of `python -m MODULE --child ...` prints as JSON in its last line."""
    command = [sys.executable, "-m", module, "--child", *map(str, given)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def memory(line: str = "VmHWM") -> float:
    """Return this process's peak memory in MB, or with "VmRSS" its present memory."""
    lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would include the parent's peak
    return next(int(each.split()[1]) / 1024 for each in lines if each.startswith(line))


def made_images(folder: Path, size: int, count: int) -> Path:
    """Write shards of `count` JPEGs, of 500 at most, of random pixels with the spectrum of photographs, 1/f."""
    rng = np.random.default_rng(size)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = np.inf

    def jpeg() -> bytes:
        pixels = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, size, size))) / frequency).real
        pixels = pixels.mean(0) + 0.4 * pixels  # correlated colours
        pixels = (127.5 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "JPEG", quality=90)
        return file.getvalue()

    some = [jpeg() for _ in range(min(count, 500))]
    write(folder, ({"__key__": f"{i:08d}", "jpg": some[i % len(some)], "cls": "0"} for i in range(count)), 5000)
    return folder


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
    label = torch.randint(2, (rows,), generator=generator)  # no system has fewer classes, unless it has none
    return Batch(images, slice(rank * rows, (rank + 1) * rows), world * rows, config.trainer.seed, step, label)


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
        self.step = TrainStep(accelerator, self.system, 10**9, graphs=settings.compile == "cuda_graphs")
        self.done = max(player_state.player.start for player_state in self.step.player_states)
        self.batch = random_batch(config, self.system.domains, rank, world)
        self.batch.images = tuple(images.to(accelerator.device) for images in self.batch.images)
        assert self.batch.label is not None
        self.batch.label = self.batch.label.to(accelerator.device)
        self.micro_batch = settings.micro_batch or settings.batch_size

    def __call__(self) -> None:
        """Take a step."""
        self.batch.step = self.done
        self.step(self.batch.split(self.micro_batch), self.done)
        self.done += 1
        self.ema.update(self.done)

    def check(self) -> None:
        """Exit with an error if a loss or a gradient was not finite."""
        if (failed := self.step.failed()) is not None:
            raise SystemExit(
                f"error: step {failed[0]}: a loss or gradient of player {failed[1].name} is not finite, so the "
                "measured times are meaningless"
            )
