"""What a run would do and take, told without training: `trainer/main.py ... --dry_run [PROCESSES]`.

Nothing is written into the run's folder; a folder of shards without an index gets one, as from the run.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from data.order import Order
from data.redact import printable
from data.shards.reader import Shards
from models.settings import OptimizerConfig
from models.system import Player
from trainer.build import check_held_out, make_orders, open_datasets, split_batch
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint import writer
from trainer.checkpoint.state import TrainState
from trainer.config.parser import Config
from trainer.distributed.accelerator import check_precision, choose_precision
from trainer.distributed.exit import user_errors
from trainer.evaluate.extractors import build as extractor_build
from trainer.evaluate.extractors import demo_cnn, inception, registered
from trainer.log.run_folder import RunFolder
from trainer.memory import Device, Rehearsal, size_of

Row = Sequence[object]
NUMBER = re.compile(r"[\d.,e-]+( [kMGT]?B)?")
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
# Of whole processes, beside what is counted here.
BESIDE = {
    "cpu": [
        "Python and its libraries take 0.8 GB besides, and glibc's heap was seen to hold 1.3 to 1.4 times as much as",
        "is in use (1.03 to 1.1 times with MALLOC_MMAP_THRESHOLD_=65536).",
    ],
    "cuda": ["What CUDA takes besides, and gaps in the allocator's blocks, were not measured: leave room."],
}


def dry_run(config: Config) -> int:
    """Tell of the run on stdout, from the first process alone. Returns the exit code."""
    if int(os.environ.get("RANK", "0")):
        return 0
    with user_errors():
        for title, lines in Plan(config).blocks():
            print(f"\n{title}", *(f"  {printable(line, keep='')}".rstrip() for line in lines), sep="\n", flush=True)
    return 0


class Plan:
    """A run as `trainer.train.Run` would build it, of networks without content.

    Args:
        config: its `dry_run` is the number of processes; 0: as many as were launched

    Raises:
        ValueError, DataError: what the run would be refused for.
    """

    def __init__(self, config: Config):
        self.config, self.data, self.settings = config, config.data, config.trainer
        self.processes = config.dry_run or int(os.environ.get("WORLD_SIZE", "1"))
        self.device: Device = "cuda" if _has_gpu(elsewhere=bool(config.dry_run)) else "cpu"
        asked, precision = self.settings.precision, self._precision()
        check_precision(precision, self.device, asked)
        config.settle_precision(precision)
        self.rehearsal = Rehearsal(config, self.device)
        self.system = self.rehearsal.system
        sizes = self.settings.batch_size, self.settings.micro_batch, self.processes, self.system.group
        self.share, self.micro = split_batch(*sizes)
        self.trains, self.tests = open_datasets(config, self.system)
        self.orders = make_orders(config, self.trains)
        self.rehearsal.prepare(self.processes)
        self.player_states = self.rehearsal.step.player_states
        networks, ema = self.system.networks(), self.rehearsal.ema
        self.state = TrainState(config, self.system, networks, ema, self.player_states, self.trains, self.orders)

    def blocks(self) -> Iterator[tuple[str, list[str]]]:
        """Titles, and the lines below them.

        Raises:
            ValueError, DataError: as the class.
        """
        yield "configuration", self.config.redacted_yaml().splitlines()
        yield "networks", self.networks()
        yield "players, in the order of their moves", self.players()
        yield "images", self.images()
        yield "batch", self.batch()
        place = "GPU" if self.device == "cuda" else "CPU"
        yield f"memory of a process on a {place} at its highest, about", self.memory()
        yield "checkpoints", self.checkpoints()
        yield "evaluation", self.evaluation()
        yield "run folder", self.run_folder()

    def networks(self) -> list[str]:
        averaged = dict(self.rehearsal.ema.system.named_children())
        rows = [
            (name, _count(network.parameters()), _count(averaged[name].parameters()) if name in averaged else "")
            for name, network in self.system.named_children()
        ]
        total = "all", *(_count(system.parameters()) for system in (self.system, self.rehearsal.ema.system))
        return table(("network", "weights", "averaged"), *rows, total)

    def players(self) -> list[str]:
        head = ("player", "may change", "weights", "algorithm", "rate", "schedule", "moves", "clip")
        rows = []
        for mover in self.player_states:
            player, settings = mover.player, mover.player.optimizer
            rule = settings.algorithm, f"{settings.lr:g}", schedule(settings, self.settings.steps), moves(player)
            clip = "" if settings.clip is None else f"{settings.clip:g}"
            rows.append((player.name, ", ".join(player.networks), _count(mover.parameters.values()), *rule, clip))
        return table(head, *rows)

    def images(self) -> list[str]:
        head = ("set", "shards", "images", "bytes", "where", "fingerprint", "epochs", "steps an epoch", "order")
        names = ("",) if self.system.domains == 1 else (" a", " b")
        rows = [
            (f"data.train{name}", *_facts(shards), _number(self._epochs(order)), order.steps_per_epoch, _order(order))
            for name, shards, order in zip(names, self.trains, self.orders, strict=True)
        ]
        for name, shards in zip(names, self.tests, strict=False):  # without evaluations there may be none
            rows.append((f"data.test{name}", *_facts(shards), "", "", ""))
        lines = table(head, *rows)
        if any(shards.remote.any() for shards in (*self.trains, *self.tests)):
            lines.append(f"cache: {self.data.cache}, up to {self.data.cache_gb:g} GB on each machine")
        return lines + [f"left out: {problem}" for shards in self.trains for problem in shards.problems]

    def batch(self) -> list[str]:
        settings, images = self.settings, self.settings.steps * self.settings.batch_size
        parts = self.share // self.micro
        lines = [
            f"{settings.batch_size:,} images a step = {_plural(self.processes, 'process', 'processes')} x "
            f"{_plural(parts, 'micro-batch', 'micro-batches')} x {self.micro:,}",
            f"{settings.steps:,} steps = {images:,} images{' of each set' * (self.system.domains > 1)} = "
            f"{' and '.join(_number(self._epochs(order)) for order in self.orders)} epochs",
            f"precision {settings.precision}"
            + f", gradients averaged by {settings.grad_sync}" * (self.processes > 1)
            + f"; other numbers of processes that fit: {self._fitting()}",
        ]
        if self.device == "cuda" and not torch.cuda.is_available():
            lines.append("PROCESSES were given, so GPUs are assumed; ACCELERATE_USE_CPU=true plans for CPUs")
        return lines

    def memory(self) -> list[str]:
        rows = [(name, amount(size), note) for name, size, note in self.memory_rows()]
        lines = [
            *table(*rows),
            "Activations are counted in a step of all players with all their penalties, on tensors without content,",
            "the rest follows from shapes. Evaluations and kernels' workspaces are left out.",
            *BESIDE[self.device],
        ]
        if self.settings.compile:
            lines.append("Networks are counted as they are before trainer.compile, which changes what they keep.")
        if self.device == "cuda":
            lines.append(
                f"While it writes a checkpoint, the first process holds {amount(self.checkpoint())} on the host."
            )
        return lines

    def memory_rows(self) -> list[tuple[str, int, str]]:
        """What it is for, bytes, and a remark; the last one is the sum."""
        rehearsal, buckets = self.rehearsal, self.processes > 1 and self.settings.grad_sync == "ddp"
        peak = rehearsal.peak(self.share, self.micro, apart=buckets)
        gradients = ("gradients", peak.gradients, "those that live then")
        if buckets:
            gradients = ("gradients", rehearsal.moved(), "DDP's buckets, of all players and for good")
        rows = [
            ("weights", rehearsal.weights(), "with statistics, and networks that nobody moves"),
            ("averages", rehearsal.averages(), "of the weights (EMA)"),
            ("moments", rehearsal.moments(), "of the optimizers"),
            gradients,
            ("images", rehearsal.images(self.share), f"{self.share:,}{' of each set' * (self.system.domains > 1)}"),
            ("activations", peak.activations, f"of {self.micro:,} images, as {peak.player} moves"),
        ]
        if self.device == "cpu":
            rows.append(("snapshot", self.checkpoint(), "of a checkpoint, as the first process writes it"))
        elif buckets:
            rows.append(("copies", self.undone(), "of the weights, in a first step that is undone"))
        return [*rows, ("all", sum(size for _, size, _ in rows), "")]

    def checkpoints(self) -> list[str]:
        settings, one = self.settings, self.checkpoint()
        kept, why = self._kept()
        need, (free, disk) = (kept + 1) * one, _free(self.config.run_dir)
        lines = [
            f"{amount(one)} each, every {settings.save_every:,} steps"
            + f" and at every evaluation, each {self.config.evaluate.every:,}" * bool(self.config.evaluate.every),
            f"up to {kept} are kept ({why}) and one is on its way: {amount(need)}; {amount(free)} are free at {disk}",
        ]
        if need > free:
            lines.append("That is too little: make room, lower trainer.keep, or take another --trainer.run_dir")
        return lines

    def evaluation(self) -> list[str]:
        settings = self.config.evaluate
        if not settings.every:
            return ["none: evaluate.every is 0"]
        check_held_out(self.tests)
        held_out = " and ".join(f"{len(shards):,}" for shards in self.tests)
        samples = f"{settings.num:,} samples and " * self.system.can("sample")
        return [
            f"every {settings.every:,} steps and after the last: {_times(self.settings.steps, settings.every)} times",
            f"{samples}{held_out} held-out images, by {settings.extractor}: {self._extractor()}",
        ]

    def run_folder(self) -> list[str]:
        folder, steps = self.config.run_dir, self.settings.steps
        RunFolder(folder).check_free()
        manifest, damaged = checkpoint_files.verify_newest(folder / "checkpoints")
        lines = [str(folder), *(f"{problem}: it would be put aside" for problem in damaged)]
        if manifest is None:
            return [*lines, f"no checkpoint yet: the run starts at step 0 of {steps:,}"]
        self.state.check(manifest, verbose=True)
        step = manifest["step"]
        if step >= steps:
            return [*lines, f"all {steps:,} steps are done, and nothing is left to train"]
        return [*lines, f"the run goes on at step {step:,} of {steps:,}"]

    def _precision(self) -> str:
        known = choose_precision(self.settings.precision)
        unknown = known == "no" and self.settings.precision is None and not torch.cuda.is_available()
        return "bf16" if self.device == "cuda" and unknown else known

    def _epochs(self, order: Order) -> float:
        return self.settings.steps / order.steps_per_epoch

    def _fitting(self) -> str:
        batch = self.settings.batch_size
        fitting = [n for n in range(1, batch + 1) if batch % n == 0 and n != self.processes and self._fits(n)]
        return ", ".join(map(str, fitting)) or "none"

    def _fits(self, processes: int) -> bool:
        try:
            return bool(split_batch(self.settings.batch_size, self.settings.micro_batch, processes, self.system.group))
        except ValueError:
            return False

    def undone(self) -> int:
        """Bytes that are copied before a first step, which settles DDP's buckets."""
        return sum(size_of(content.values()) for content in self.state.trained().values())

    def checkpoint(self) -> int:
        """Bytes of one."""
        more = {"owes": False, "skipped": 0, "code": "0" * 16}
        return writer.checkpoint_bytes(self.state.tensors(), self.state.manifest() | more)

    def _kept(self) -> tuple[int, str]:
        """How many checkpoints there will be at most, besides one on its way."""
        settings, evaluation = self.settings, self.config.evaluate
        parts = {f"the newest {settings.keep}": settings.keep}
        if evaluation.every and (best := self.system.can("sample") + 2 * self.system.can("translate")):
            parts["the best by FID"] = best
        if settings.keep_every:
            parts[f"every {settings.keep_every:,}th step's"] = settings.steps // settings.keep_every
        return sum(parts.values()), ", ".join(parts)

    def _extractor(self) -> str:
        """Where its weights come from; where they are given, they are looked at as the run would."""
        # takes seconds to import

        settings, folder = self.config.evaluate, self.config.run_dir
        registered.check_name(settings.extractor)
        if settings.weights or settings.extractor == "file":  # which refuses to have none
            alone = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, wait_for_everyone=lambda: None)
            given = settings, self.data, folder, self.trains, self.tests
            extractor_build.build(*given, cast(Accelerator, alone))
            return str(settings.weights)
        if settings.extractor == "inception":
            path = Path(torch.hub.get_dir(), "checkpoints", inception.INCEPTION_FILE)
            return f"{path}{'' if path.exists() else ', which the run downloads first'}"
        if settings.extractor == "demo-cnn":
            if not any(shards.remote.any() for shards in (*self.trains, *self.tests)):
                demo_cnn.check_labels(self.trains, self.tests)
            return "trained at the run's start, if it is not in its folder yet"
        if settings.extractor == "demo-random":
            return "made at the run's start"
        return f"torch-fidelity's, from {torch.hub.get_dir()}, where the run downloads it if it is not there"


def table(*rows: Row) -> list[str]:
    """Rows of cells as lines: columns of numbers end where the others' begin, words begin together."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True))
    padded = []
    for column in columns:
        width = max(map(len, column))
        right = all(NUMBER.fullmatch(cell) for cell in column[1:] if cell)
        padded.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def schedule(optimizer: OptimizerConfig, steps: int) -> str:
    """How a learning rate goes through a run."""
    rise = f"rises for {optimizer.warmup:,}, " if optimizer.warmup else ""
    if optimizer.schedule == "constant":
        return f"{rise}constant"
    return f"{rise}{optimizer.schedule} from {int(optimizer.hold * steps):,} on, to {optimizer.final:.0%}"


def moves(player: Player) -> str:
    """At which steps a player moves."""
    every = "every step" if player.every == 1 else f"every {player.every:,} steps"
    return every + f" from {player.start:,} on" * bool(player.start)


def amount(size: float) -> str:
    """Bytes for people."""
    for unit, bytes_ in UNITS.items():
        if size >= bytes_:
            return f"{size / bytes_:.3g} {unit}"
    return f"{size:.0f} B"


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _facts(shards: Shards) -> Row:
    remote = int(shards.remote.sum())
    where = {0: "local", len(shards.shards): "remote"}.get(remote, f"{remote:,} remote")
    size = sum(shard.filesize for shard in shards.shards)
    return len(shards.shards), len(shards), amount(size), where, shards.fingerprint()


def _order(order: Order) -> str:
    if order.n <= order.window:
        return "the whole set shuffled"
    return f"{order.lanes:,} lanes, shuffled in {len(order.edges) - 1:,} blocks each"


def _has_gpu(elsewhere: bool) -> bool:
    """Whether the run's processes compute on GPUs; those of a launch elsewhere do unless this one is told not to."""
    return not parse_flag_from_env("ACCELERATE_USE_CPU") and (elsewhere or torch.cuda.is_available())


def _free(folder: Path) -> tuple[int, Path]:
    """Free bytes of the disk that a folder is on, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free, there


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _times(steps: int, every: int) -> int:
    """Evaluations of a run: at each multiple of `every`, and after the last step."""
    return -(-steps // every)


def _plural(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
