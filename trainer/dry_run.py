"""The dry run prints what a run would do, and what it takes of memory, time and disk (`trainer/main.py ... --dry_run`).

It writes nothing to the run folder; a folder of shards without an index gets one, as in a run. The time is measured in
trial steps, unless a number of processes is given, which plans a launch elsewhere.
"""

import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from typing import Any

from accelerate.utils import parse_flag_from_env

from data.redact import printable, redacted
from data.shards.remote import is_remote
from data.tables import amount, duration, table
from models import OptimizerConfig
from trainer.build import check_held_out, load_initial, make_orders, open_datasets, split_batch
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint import writer
from trainer.checkpoint.state import TrainState
from trainer.config.parser import Config
from trainer.distributed.exit import user_errors
from trainer.errors import RunError
from trainer.log.summary import start_warnings
from trainer.precision import check_precision, choose_precision, has_gpu
from trainer.run_folder import RunFolder
from trainer.step_memory import FakeRun, fake_accelerator
from trainer.step_time import seconds_per_image

PYTHON, HEAP = 0.8e9, 1.4  # bytes of a process beside its tensors, and times what its tensors take
FLOAT = 4  # bytes of a number for the networks
NOT_COUNTED = {
    "cpu": "Allow for {} in all: Python takes 0.8 GB, and gaps in its memory up to 0.4 times the row all (at most 0.1 "
    "times with MALLOC_MMAP_THRESHOLD_=65536).",
    "cuda": "CUDA itself and gaps in the allocator's blocks take more: leave room.",
}


def dry_run(config: Config) -> int:
    """Print the report, on the first process only, and return the exit code."""
    if not int(os.environ.get("RANK", "0")):
        with user_errors():
            # As a list first, so that an error comes alone, and not below a page of tables.
            for title, lines in [(title, [*lines]) for title, lines in Report(config).sections()]:
                print(f"\n{title}", *(f"  {printable(line, keep='')}".rstrip() for line in lines), sep="\n", flush=True)
    return 0


class Report:
    """The report, built as `trainer.train.Run` builds a run, but of fake tensors.

    Args:
        config: its `dry_run` is the number of processes; 0 stands for as many as the launcher started

    Raises:
        ValueError, DataError: the run would exit with the same error.
    """

    def __init__(self, config: Config):
        self.config, self.settings = config, config.trainer
        self.processes = config.dry_run or int(os.environ.get("WORLD_SIZE", "1"))
        # A given number of processes plans a launch on other machines, which are assumed to have GPUs.
        self.assumed = bool(config.dry_run) and not (has_gpu() or parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.device, requested = "cuda" if self.assumed or has_gpu() else "cpu", self.settings.precision
        precision = choose_precision(requested)
        precision = "bf16" if self.assumed and requested is None and precision == "no" else precision
        check_precision(precision, self.device, requested)
        config.settle_precision(precision)
        self.run = FakeRun(config, self.device, self.processes)
        self.system, states = self.run.system, self.run.step.player_states
        self.players, self.each = [state.player for state in states], " of each set" * (self.system.domains > 1)
        self.per_rank_batch, self.micro_batch = self._split(self.processes)
        self.trains, self.tests = open_datasets(config, self.system)
        self.remote = any(shards.remote.any() for shards in (*self.trains, *self.tests))
        self.orders = make_orders(config, self.trains)
        self.epochs = [f"{float(f'{self.settings.steps / order.steps_per_epoch:.3g}'):,g}" for order in self.orders]
        networks, ema = self.system.networks(), self.run.ema
        self.initial = load_initial(config, self.system, copy=False)
        record = self.initial.record if self.initial else None
        self.state = TrainState(config, self.system, networks, ema, states, self.trains, self.orders, record)
        more = {"evaluation_pending": False, "replaced": 0, "code": "0" * 16}
        self.checkpoint = writer.checkpoint_bytes(self.state.whole(), self.state.manifest() | more)

    def sections(self) -> Iterator[tuple[str, Iterable[str]]]:
        """Yield the title and the lines of each section; raises what the class raises."""
        place = {"cpu": "CPU", "cuda": "GPU"}[self.device]
        yield "all settings", self.config.redacted_yaml().splitlines()  # first, as a terminal shows the end
        yield "players, in the order of their updates", self._players()
        if self.run.frozen:
            yield "networks that trainer.train_only leaves as they are", sorted(self.run.frozen)
        if self.initial:
            yield "weights that the run starts from", self.initial.lines
        yield "data", self._data()
        yield "batch", self._batch()
        yield f"peak memory of a process on a {place}, estimated", self._memory()
        if not self.config.dry_run:  # a number of processes plans a launch elsewhere, or is a job's last check
            yield "time", self._time()
        yield "checkpoints", self._checkpoints()
        yield "evaluation", self._evaluation() if self.config.evaluate.every else ["none, because evaluate.every is 0"]
        yield "run folder", self._run_folder()
        if warnings := start_warnings(self.config, self.device, self.trains, self.tests):
            yield "warnings", warnings

    def _players(self) -> list[str]:
        settings = [field.name for field in fields(OptimizerConfig)]
        rows: list[tuple[Any, ...]] = [("player", "networks and weights", "every", "start", *settings)]
        for player in self.players:
            networks = {name: self.system.get_submodule(name).parameters() for name in player.networks}
            sizes = ", ".join(f"{name} {sum(w.numel() for w in ws):,}" for name, ws in networks.items())
            values = (getattr(player.optimizer, name) for name in settings)
            # A tuple would show the parts that vary by their repr.
            shown = (f"({', '.join(map(str, one))})" if isinstance(one, tuple) else one for one in values)
            rows.append((player.name, sizes, player.every, player.start, *shown))
        return table(rows)

    def _data(self) -> Iterator[str]:
        head = (
            "set",
            "shards",
            "images",
            "bytes",
            "where",
            "fingerprint of the shards",
            "epochs",
            "steps per epoch",
            "order",
        )
        rows: list[tuple[Any, ...]] = [head]
        for i, shards in enumerate((*self.trains, *self.tests)):
            name, of_run = "data.test", list[Any]([None] * 3)
            if i < len(self.orders):
                name, of_run = "data.train", [self.epochs[i], self.orders[i].steps_per_epoch, self.orders[i]]
            name += f" {'ab'[i % 2]}" * bool(self.each)
            remote, size = int(shards.remote.sum()), sum(shard.filesize for shard in shards.shards)
            where = {0: "local", len(shards.shards): "remote"}.get(remote, f"{remote:,} remote")
            rows.append((name, len(shards.shards), len(shards), amount(size), where, shards.fingerprint(), *of_run))
        yield from table(rows)
        if self.remote:
            yield f"cache: {self.config.data.cache}, at most {self.config.data.cache_gb:g} GB on each machine"
        yield from (f"skipped: {problem}" for shards in self.trains for problem in shards.problems)

    def _batch(self) -> Iterator[str]:
        settings, size, n = self.settings, self.settings.batch_size, self.processes
        parts, others = self.per_rank_batch // self.micro_batch, list[str]()
        for other in (other for other in range(1, size + 1) if size % other == 0 and other != n):
            with suppress(ValueError):
                self._split(other)
                others.append(f"{other:,}")
        splits = f"{n:,} process{'es' * (n > 1)} x {parts:,} micro-batch{'es' * (parts > 1)} x {self.micro_batch:,}"
        yield f"{size:,} images a step = {splits}; other possible numbers of processes: {', '.join(others) or 'none'}"
        images, epochs = f"{settings.steps * size:,} images{self.each}", " and ".join(self.epochs)
        yield f"{settings.steps:,} steps = {images} = {epochs} epochs"
        for shards, order in zip(self.trains, self.orders, strict=True):
            if left := len(shards) - order.steps_per_epoch * size:
                yield (
                    f"each epoch leaves out {left:,} of the {len(shards):,} images, other ones each time, because its "
                    "batches are full"
                )
        yield f"precision {settings.precision}" + f", gradients averaged by {settings.grad_sync}" * (n > 1)
        if self.assumed:
            yield "GPUs are assumed; set ACCELERATE_USE_CPU=true for a report about CPUs"

    def _memory(self) -> Iterator[str]:
        rows = self.memory()
        yield from table((name, amount(size), note) for name, size, note in rows)
        yield "Activations are those of a step that updates every player with all its penalties, counted from shapes."
        yield "Evaluations and the workspaces of kernels are left out."
        yield NOT_COUNTED[self.device].format(amount(PYTHON + HEAP * rows[-1][1]))
        if self.settings.compile:
            yield "Networks are counted without trainer.compile, which changes what they keep."
        if self.device == "cuda":
            yield f"The first process also holds {amount(self.checkpoint)} on the host while it writes a checkpoint."

    def memory(self) -> list[tuple[str, int, str]]:
        """Return rows of purpose, bytes and explanation; the last row is their sum."""
        held, data = self.run.held, self.config.data
        live, player = self.run.peak(self.per_rank_batch, self.micro_batch)
        images = self.per_rank_batch * self.system.domains * math.prod(data.shape) * (data.bits // 8 + FLOAT)
        also = "" if held["gradients"] else ", and gradients"
        rows = [
            ("weights", held["weights"], "of all networks, with their statistics"),
            ("averages", held["averages"], "of the weights (EMA)"),
            ("moments", held["moments"], "of the optimizers"),
            ("images", images, f"{self.per_rank_batch:,}{self.each} in a batch"),
            ("activations", live, f"of {self.micro_batch:,} images{also}, while {player} is updated"),
        ]
        if held["by_position"]:
            rows.append(("kept images", held["by_position"], "of this process's positions of the batch"))
        if held["gradients"]:
            rows.append(("gradients", held["gradients"], "of all players, which DDP's buckets hold"))
        if self.device == "cpu":
            rows.append(("snapshot", self.checkpoint, "of a checkpoint, while the first process writes it"))
        elif held["gradients"]:
            copies = sum(value.nbytes for content in self.state.trained().values() for value in content.values())
            rows.append(("copies", copies, "of the weights, in a trial step that settles DDP's buckets"))
        return [*rows, ("all", sum(size for _, size, _ in rows), "")]

    def _time(self) -> Iterator[str]:
        if sys.stderr.isatty():
            print("taking some trial steps ...", file=sys.stderr, flush=True)
        share = self.settings.share_passes and self.micro_batch == self.per_rank_batch
        try:
            seconds, tried = seconds_per_image(self.config, self.device, self.micro_batch, share)
        except RunError as error:
            yield str(error)
            return
        step = seconds * self.per_rank_batch
        yield (
            f"about {duration(step * self.settings.steps)} for all {self.settings.steps:,} steps, of {step:.2g} s, "
            "without reading images and evaluations"
        )
        scaled = f", and scaled to {self.per_rank_batch:,}" * (tried != self.per_rank_batch)
        yield f"This was measured in steps of {tried:,} images by one process{scaled}; other work slows them."
        if self.processes > 1:
            yield "It holds if each process has processors or a GPU of its own."
        if self.settings.compile:
            yield "The trial steps did not use trainer.compile."

    def _checkpoints(self) -> Iterator[str]:
        settings, every, folder = self.settings, self.config.evaluate.every, self.config.run_dir
        kept = {f"the newest {settings.keep}": settings.keep}
        if every:
            best = {"fid": "the best by FID", "rfid": "the best by rFID"}[self.system.judged_by]
            kept[best] = 1 + self.system.can("translate")  # one in each direction
        if settings.keep_every:
            kept[f"every {settings.keep_every:,}th step's"] = settings.steps // settings.keep_every
        disk = next(path for path in (folder, *folder.parents) if path.exists())
        count, free = sum(kept.values()), shutil.disk_usage(disk).free
        need = f"{amount((count + 1) * self.checkpoint)}; {amount(free)} are free at {disk}"
        evaluations = f", and with each evaluation (every {every:,} steps)" * bool(every)
        yield f"{amount(self.checkpoint)} each, every {settings.save_every:,} steps{evaluations}"
        yield f"up to {count} are kept ({', '.join(kept)}), and one more while it is written: {need}"
        if (count + 1) * self.checkpoint > free:
            yield "This is too little: make room, lower trainer.keep, or choose another trainer.run_dir"

    def _evaluation(self) -> Iterator[str]:
        settings = self.config.evaluate
        check_held_out(self.tests)
        from trainer.evaluate.extractors import demo_cnn, inception, registered  # these take seconds to import
        from trainer.evaluate.extractors.build import build_extractor
        from trainer.evaluate.extractors.choice import extractor_so_far

        kind = settings.extractor or extractor_so_far(self.config) or "inception"
        registered.check_name(kind)
        if settings.weights or kind == "file":  # build_extractor() reads the file
            alone: Any = fake_accelerator(1, None)
            build_extractor(settings, self.config.data, self.config.run_dir, self.trains, self.tests, alone)
        elif kind == "demo-cnn" and not self.remote:
            demo_cnn.check_labels(self.trains, self.tests)
        hub = inception.hub_path()
        download = kind == "inception" and not settings.weights and not hub.exists()
        samples = f"{settings.num:,} samples and " * bool(settings.num and self.system.can("sample"))
        images = " and ".join(f"{len(shards):,}" for shards in self.tests)
        yield f"every {settings.every:,} steps and after the last: {-(-self.settings.steps // settings.every):,} times"
        source = f"{kind}{f', which the run first downloads to {hub}' * download}"
        source += ", or by demo-random if it cannot" * (download and settings.extractor is None)
        yield f"{samples}{images} held-out images, by {source}"

    def _run_folder(self) -> Iterator[str]:
        folder, steps = self.config.run_dir, self.settings.steps
        RunFolder(folder).check_free()
        manifest, damaged = checkpoint_files.verify_newest(folder / "checkpoints")
        if manifest:
            self.state.check(manifest, verbose=True)
        if is_remote(url := str(self.settings.run_dir)):
            yield f"{redacted(url)}, whose checkpoints a run fetches, and a dry run does not look up; here:"
        yield from (str(folder), *(f"{problem}; the run would put it aside" for problem in damaged))
        step, start = (manifest["step"], "the run resumes") if manifest else (0, "no checkpoint yet: the run starts")
        done = f"all {steps:,} steps are done: nothing is left to train"
        yield done if step >= steps else f"{start} at step {step:,} of {steps:,}"

    def _split(self, processes: int) -> tuple[int, int]:
        return split_batch(self.settings.batch_size, self.settings.micro_batch, processes, self.system.groups)
