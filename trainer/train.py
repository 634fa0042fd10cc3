"""A run, top to bottom."""

import copy
import gc
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from data.errors import DataError
from data.loader import Augment, Batches, load, read
from data.order import Order, permutation, tally
from data.processes import prepare_workers
from data.shards import OnError, Shards
from trainer import checkpoint
from trainer.batch import Batch, key, normalize
from trainer.config import FREE, Config, RunError, differences, refusing, stopping
from trainer.ema import EMA
from trainer.pictures import panels
from trainer.record import Record
from trainer.step import Step

if TYPE_CHECKING:
    from trainer.evaluate import Evaluator

GRID = 48  # images in each panel of a grid
# Settings of what steps see, with others of which a run may go on if told to.
NEW_DATA = frozenset({"data", "data.train", "data.crop", "data.flip", "trainer.batch_size"})
FEW = 1000  # images, of which a share is not judged more finely
# Buffers, where a network has any (spectral norm's), are alike on all processes by arithmetic: none is sent.
WRAPPING = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)


def train(config: Config) -> None:
    """Train as configured; a run that is there already goes on."""
    with refusing():
        run = Run(config)
    with stopping():
        run.go()


def shares(batch_size: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """Images a step of one process, and how many of them go through the networks at once.

    Raises:
        ValueError: the world size does not divide the batch, or the micro-batch a process's share.
    """
    share, rest = divmod(batch_size, world_size)
    if rest or not share:
        fitting = [max(1, batch_size // world_size) * world_size, -(-batch_size // world_size) * world_size]
        raise ValueError(
            f"trainer.batch_size {batch_size} cannot be dealt evenly to {world_size} processes: take "
            f"{' or '.join(str(size) for size in dict.fromkeys(fitting))}, or another number of processes"
        )
    micro = micro_batch or share
    if share % micro:
        fits = [size for size in range(1, share + 1) if share % size == 0]
        raise ValueError(
            f"trainer.micro_batch {micro} does not divide a process's {share} images a step (trainer.batch_size "
            f"{batch_size} over {world_size}): take one of {fits}, or leave it unset"
        )
    return share, micro


class Run:
    """Everything that a run needs, built and resumed; then `go`.

    Raises:
        ValueError, DataError: something that the configuration asks for cannot be.
    """

    def __init__(self, config: Config):
        self.config, settings = config, config.trainer
        if config.data.workers:
            prepare_workers()
        self.accelerator = _accelerator(settings.precision)
        config.settle_precision(self.accelerator.mixed_precision)
        self.share, self.micro = shares(settings.batch_size, settings.micro_batch, self.accelerator.num_processes)

        torch.manual_seed(key(settings.seed, "weights"))
        self.system = config.system()
        self.system.players()  # checks their settings
        self._check_group()
        self.trains = self._sets("data.train", config.data.trains, config.data.on_error)
        self.tests = self._sets("data.test", config.data.tests) if config.data.tests else []
        self._check_alike()
        seeds = [settings.seed, *(key(settings.seed, "order", i) for i in range(1, len(self.trains)))]
        self.orders = [
            Order(shards.counts, settings.batch_size, seed, config.data.lanes, config.data.window)
            for shards, seed in zip(self.trains, seeds, strict=True)
        ]
        self.run_dir, self.checkpoints = config.run_dir, config.run_dir / "checkpoints"

        self.system.to(self.accelerator.device)
        self.ema = EMA(self.system, settings.ema_half_life, settings.batch_size, settings.ema_ramp)
        self.networks = self.system.networks()
        for name, network in self.networks.items():
            setattr(self.system, name, self.accelerator.prepare_model(network))
        self._settle_buckets()
        self.mover = Step(self.accelerator, self.system, settings.steps, settings.share_passes)
        self.step = self.stood_in = 0  # images that others stood in for
        self._resume()
        self.first, self.seen, self.warned = self.step, 0, False
        self.skipped: list[str] = []

        self.evaluator = self._evaluator()
        self.panels = self._grid_source()
        self.record = Record(self.run_dir, self.step, settings.steps, self.accelerator.is_main_process)
        self._announce()
        for problem in [problem for shards in self.trains for problem in shards.problems]:
            self.record.say(f"left out: {problem}")

    # ---- the run

    def go(self) -> None:
        """Train to the last step.

        Raises:
            RunError: a loss or gradient is not finite, or a checkpoint cannot be written.
            DataError: a sample is damaged.
        """
        settings, evaluation = self.config.trainer, self.config.evaluate
        batches = self._batches()
        logged, began, waited = self.step, time.monotonic(), 0.0
        while self.step < settings.steps:
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            self.mover(batch.split(self.micro), self.step)
            self.step += 1
            self.ema.update(self.step)
            self.record.advance()

            last = self.step == settings.steps
            evaluating = self.evaluator is not None and (last or self.step % evaluation.every == 0)
            saving = last or evaluating or self.step % settings.save_every == 0
            # Saves end a log window, so that a resumed run's windows are those of one that never stopped.
            if saving or self.step % settings.log_every == 0:
                self._log(self.step - logged, began, waited)
                logged, waited = self.step, 0.0
            if saving:
                self._save(self._evaluate() if evaluating else {})
                self._draw()
            if logged == self.step:
                began = time.monotonic()
        self.record.say(f"finished at step {self.step}: pictures in {self.run_dir / 'samples'}, curves by make board")
        self.record.close()
        batches.close()
        gc.collect()  # or what the workers shared would be told as leaked when the process leaves at once
        self.accelerator.wait_for_everyone()

    def _batches(self) -> Generator[Batch]:
        """This rank's rows of each global batch, copied to the device while it still computes the step before."""
        settings, data, device = self.config.trainer, self.config.data, self.accelerator.device
        rows, steps = self._rows(self.accelerator.process_index, 1), range(self.step, settings.steps)
        augment = Augment(data.crop, data.flip)
        source = Batches(self.trains, self.orders, data.size, data.channels, rows, augment)
        loader = load(source, steps, data.workers, device.type == "cuda", self._rows_of_this_machine())
        copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        for step, sets in zip(steps, loader, strict=True):
            for which, images in enumerate(sets):
                self.seen += tally(step, which, rows, images.position.numpy())
                self.skipped += [f"step {step + 1}: {told}" for told in images.skipped]
            with torch.cuda.stream(copying):  # None leaves it as it is
                copied = [images.image.to(device, non_blocking=True) for images in sets]
            if copying is not None:
                current = torch.cuda.current_stream(device)
                current.wait_stream(copying)
                for image in copied:
                    image.record_stream(current)
            yield Batch(tuple(normalize(image) for image in copied), rows, settings.batch_size, settings.seed, step)

    def _rows(self, first: int, ranks: int) -> slice:
        return slice(first * self.share, (first + ranks) * self.share)

    def _rows_of_this_machine(self) -> slice | None:
        """On its first rank, which fetches their shards; None on others."""
        if not self.accelerator.is_local_main_process:
            return None
        return self._rows(self.accelerator.process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def _log(self, steps: int, began: float, waited: float) -> None:
        terms = self.mover.meter.read(self.accelerator)
        seconds = time.monotonic() - began  # after the reading, which waits for the device
        failed = self.mover.failed()
        if failed:
            step, player = failed
            kept = f", and the checkpoints in {self.checkpoints} are intact" if self.checkpoints.exists() else ""
            bad = [
                name for name, value in terms.items() if name.startswith(f"{player.name}/") and not math.isfinite(value)
            ]
            raise RunError(
                f"step {step + 1}: player {player.name}: not finite: {', '.join(bad) or 'its gradient'}. No weight was "
                f"changed since{kept}. Start again in another run folder with a lower --system.{player.name}.lr, or "
                f"with --system.{player.name}.clip"
            )
        terms |= {
            f"{mover.player.name}/lr": mover.player.optimizer.rate(self.step - 1, self.config.trainer.steps)
            for mover in self.mover.movers
        }
        terms["speed/images_per_second"] = steps * self.config.trainer.batch_size / seconds
        self._log_data(terms, waited / seconds)

    def _log_data(self, terms: dict[str, float], waited: float) -> None:
        """Record a log line's terms with those of the data, of all ranks."""
        told = torch.tensor([self.seen % 2**32, len(self.skipped), round(waited * 1e6)], device=self.accelerator.device)
        seen, skipped, wait = self.accelerator.reduce(told, "sum").tolist()
        terms["speed/data_wait"] = wait / 1e6 / self.accelerator.num_processes
        settings, data = self.config.trainer, self.config.data
        if data.on_error == "skip":
            self.stood_in += skipped
            terms["data/skipped"] = self.stood_in
        self.record.terms(self.step, terms, seen=seen % 2**32)
        if skipped:
            for line in gather_object(self.skipped):
                self.record.say(line)
        self.seen, self.skipped = 0, []
        shown = self.step * settings.batch_size * len(self.trains)
        if self.stood_in > data.max_skipped * max(shown, FEW):
            raise RunError(
                f"step {self.step}: {self.stood_in} of {shown:,} images were damaged, more than data.max_skipped "
                f"{data.max_skipped:g} allows: mend the data (python -m data.inspect FOLDER --verify lists what is "
                "wrong), or raise it"
            )
        if terms["speed/data_wait"] > 0.1 and not self.warned and self.step > self.first + settings.log_every:
            self.warned = True
            self.record.say(
                f"steps wait for data {terms['speed/data_wait']:.0%} of the time: raise --data.workers (now "
                f"{data.workers}), or prepare smaller images (python -m data.prepare --size {data.size})"
            )

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluator is not None
        try:
            scores = self.evaluator(self.ema.system)
        except FloatingPointError as error:
            raise RunError(f"step {self.step}: the averaged networks' images cannot be scored: {error}") from error
        facts = {"weights": "ema", "seed": self.config.trainer.seed, "world_size": self.accelerator.num_processes}
        self.record.scalars(self.step, scores, **self.evaluator.facts, **facts)
        self.record.say(f"step {self.step}  " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        return scores

    @torch.no_grad()
    def _draw(self) -> None:
        if self.accelerator.is_main_process:
            self.record.pictures(self.step, panels(self.ema.system, *self.panels))

    # ---- its state

    def _save(self, scores: dict[str, float]) -> None:
        trouble = None
        if self.accelerator.is_main_process:
            manifest = {
                "scores": scores,
                "evaluation": self.evaluator.facts if self.evaluator else {},
                "configuration": self.config.resolved(),
                "data": self._data(),
                "skipped": self.stood_in,
                "frozen": self._frozen(),
                "scalers": {
                    m.player.name: m.scaler.state_dict() | {"overflows": int(m.overflows)}
                    for m in self.mover.movers
                    if m.scaler
                },
            }
            try:
                checkpoint.save(self.checkpoints, self.step, self._tensors(), manifest)
                checkpoint.rotate(self.checkpoints, self.config.trainer.keep)
            except OSError as error:
                trouble = f"{error.strerror} ({error.filename or self.checkpoints})"
        (trouble,) = broadcast_object_list([trouble])
        if trouble:
            raise RunError(
                f"step {self.step}: the checkpoint could not be saved: {trouble}. The ones before it are intact: make "
                "room or mend the folder, then run the same command again, and it goes on from the newest"
            )

    def _frozen(self) -> dict[str, str]:
        """sha256 of the files of networks that nobody moves."""
        children = self.system.named_children()
        return {name: str(network.sha256) for name, network in children if name in self.system.frozen}

    def _tensors(self) -> checkpoint.Tensors:
        tensors = {name: network.state_dict() for name, network in self.networks.items()}
        tensors |= {f"ema.{name}": network.state_dict() for name, network in self.ema.system.named_children()}
        if statistics := dict(self.system.named_buffers(recurse=False)):
            tensors["statistics"] = statistics
        return tensors | {
            f"optimizer.{mover.player.name}": checkpoint.optimizer_tensors(mover.parameters, mover.optimizer)
            for mover in self.mover.movers
        }

    def _resume(self) -> None:
        """Load the newest whole checkpoint, the same one on every process; without one the run starts at step 0."""
        found, trouble = None, None
        if self.accelerator.is_main_process:
            try:
                found = checkpoint.load_newest(self.checkpoints)
            except (ValueError, OSError) as error:
                trouble = str(error)
        step, trouble = broadcast_object_list([found and found[1]["step"], trouble])
        if trouble:
            raise ValueError(trouble)
        if step is None:
            return
        tensors, manifest = found or checkpoint.load(self.checkpoints / f"step_{step:08d}")
        if "skipped" not in manifest:
            raise ValueError(f"{self.run_dir} holds a run of an older version: take another --trainer.run_dir")
        if changed := self._changes(manifest):
            raise ValueError(
                f"{self.run_dir} holds a run with other settings, and cannot go on with these:\n  "
                + "\n  ".join(changed)
                + "\nTake the old settings, or another --trainer.run_dir"
                + "; or accept what steps see as it is now: --trainer.accept_new_data true"
                * all(map(_is_new_data, changed))
            )
        self.step, self.stood_in = step, manifest["skipped"]
        self._load_networks(tensors)
        for mover in self.mover.movers:
            checkpoint.load_optimizer(mover.parameters, mover.optimizer, tensors[f"optimizer.{mover.player.name}"])
            if mover.scaler:
                scaler = manifest["scalers"][mover.player.name]
                mover.overflows.fill_(scaler.pop("overflows"))
                mover.scaler.load_state_dict(scaler)

    def _changes(self, manifest: dict[str, Any]) -> list[str]:
        """What is other than when the run was saved, a line each, less what may be."""
        scheduled = any(mover.player.optimizer.schedule != "constant" for mover in self.mover.movers)
        free = FREE - {"trainer.steps"} if scheduled else FREE
        changed = differences(manifest["configuration"], self.config.resolved(), free=free)
        for shards, saved, now in zip(self.trains, manifest["data"], self._data(), strict=False):
            if saved["fingerprint"] != now["fingerprint"]:
                was, has = (f"{of['images']:,} images in {of['shards']:,} shards" for of in (saved, now))
                other = " (other ones)" if was == has else ""
                changed.append(f"data.train: {was}{other} in the checkpoint, {has} now in {shards.source}")
            elif saved["order"] != now["order"] and not changed:
                changed.append("data: another order of samples than in the checkpoint, by data.lanes or data.window")
        files, here = manifest["frozen"], self._frozen()
        changed += [
            f"system.{name}_weights: a file of sha256 {files[name]} in the checkpoint, {here[name]} now"
            for name in files.keys() & here.keys()
            if files[name] != here[name]
        ]
        accepted = [line for line in changed if self.config.trainer.accept_new_data and _is_new_data(line)]
        if accepted and self.accelerator.is_main_process:
            print("accepted:", *accepted, sep="\n  ", file=sys.stderr)
        return [line for line in changed if line not in accepted]

    def _check_alike(self) -> None:
        """All processes must have the same images, or each would train on data of its own."""
        own = [shards.fingerprint() for shards in (*self.trains, *self.tests)]
        for rank, others in enumerate(gather_object([own])):
            for shards, mine, other in zip((*self.trains, *self.tests), own, others, strict=True):
                if mine != other:
                    raise ValueError(
                        f"{shards.source} holds other shards for process {self.accelerator.process_index} than for "
                        f"process {rank}: give all machines the same data"
                    )

    def _data(self) -> list[dict[str, Any]]:
        """Of each training set, what a step sees of it."""
        return [
            {
                "images": len(shards),
                "shards": len(shards.shards),
                "fingerprint": shards.fingerprint(),
                "order": order.fingerprint(),
            }
            for shards, order in zip(self.trains, self.orders, strict=True)
        ]

    def _settle_buckets(self) -> None:
        """Take a step that is then undone, so that every real one, a resumed run's first too, sums gradients alike.

        DDP reorders its buckets after its first backward, and with three processes or more that changes rounding.
        """
        if self.accelerator.num_processes == 1:
            return
        weights = {name: copy.deepcopy(network.state_dict()) for name, network in self.networks.items()}
        statistics = {name: buffer.clone() for name, buffer in self.system.named_buffers(recurse=False)}
        data, settings = self.config.data, self.config.trainer
        image = torch.zeros(self.share, data.channels, data.size, data.size, device=self.accelerator.device)
        step = Step(self.accelerator, self.system, settings.steps, settings.share_passes)
        for start in {mover.player.start for mover in step.movers}:
            blank = Batch((image,) * self.system.domains, slice(0, self.share), settings.batch_size, 0, start)
            step(blank.split(self.micro), start)
        for name, network in self.networks.items():
            network.load_state_dict(weights[name])
        self._load_statistics(statistics)

    def _load_statistics(self, statistics: dict[str, Tensor]) -> None:
        for name, buffer in self.system.named_buffers(recurse=False):
            buffer.copy_(statistics[name])

    def _load_networks(self, tensors: checkpoint.Tensors) -> None:
        for name, network in self.networks.items():
            network.load_state_dict(tensors[name])
        for name, network in self.ema.system.named_children():
            network.load_state_dict(tensors[f"ema.{name}"])
        self._load_statistics(tensors.get("statistics", {}))

    # ---- what it looks at

    def _evaluator(self) -> "Evaluator | None":
        settings = self.config.evaluate
        if not settings.every:
            return None
        if not self.tests:
            raise ValueError(
                "data.test is not set, and evaluations compare with held-out images: name a folder of shards with "
                "--data.test, or turn them off with --evaluate.every 0"
            )
        if self.accelerator.is_main_process:
            held_out = sum(len(shards) for shards in self.tests)
            print(f"preparing {settings.extractor} and {held_out:,} held-out images", file=sys.stderr, flush=True)
        from trainer.evaluate import Evaluator  # torchmetrics takes seconds to import
        from trainer.extractor import build

        extractor = build(settings, self.config.data, self.run_dir, self.trains, self.tests, self.accelerator)
        return Evaluator(
            self.accelerator,
            extractor,
            self.tests,
            self.config.data,
            settings.num,
            self.config.trainer.seed,
            self.system,
        )

    def _grid_source(self) -> tuple[list[Tensor], Tensor]:
        """The same images of each data set and prior draws at every step of the run."""
        data, seed, device = self.config.data, self.config.trainer.seed, self.accelerator.device
        real = [
            read(shards, permutation(len(shards), seed)[:GRID], data.size, data.channels).image.to(device)
            for shards in self.tests or self.trains
        ]
        z = torch.randn(GRID, *self.system.latent_shape, generator=torch.Generator().manual_seed(key(seed, "grid")))
        return real, z.to(device)

    def _sets(self, setting: str, folders: list[str], on_error: OnError = "stop") -> list[Shards]:
        if len(folders) != self.system.domains:
            names = f"{len(folders)} folder{'s' if len(folders) > 1 else ''}"
            raise ValueError(
                f"{setting} names {names}, expected {self.system.domains} for {type(self.system).__name__}"
                + (': give "[A, B]"' if self.system.domains == 2 else "")
            )
        try:
            return self.config.data.open(folders, on_error)
        except DataError as error:
            raise DataError(f"{setting}: {error}") from error

    def _check_group(self) -> None:
        if self.micro % self.system.group:
            raise ValueError(
                f"minibatch_stddev {self.system.group} does not divide the {self.micro} images that go through the "
                "networks at once: change it, trainer.batch_size or trainer.micro_batch"
            )

    def _announce(self) -> None:
        world, settings = self.accelerator.num_processes, self.config.trainer
        sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in self.networks.items()}
        self.record.configuration(self.config.yaml())
        self.record.layout(
            [mover.player.name for mover in self.mover.movers if mover.player.name in ("binary", "ternary")]
        )
        self.record.say(
            f"{self.config.yaml()}\n"
            f"{type(self.system).__name__}: {', '.join(f'{name} {size:,} weights' for name, size in sizes.items())}\n"
            f"{' + '.join(f'{len(shards):,}' for shards in self.trains)} training images, "
            f"{self.orders[0].steps_per_epoch} steps an epoch; {world} "
            f"process{'es' if world > 1 else ''} on {self.accelerator.device.type}, precision "
            f"{self.accelerator.mixed_precision}; {settings.batch_size} images a step = {world} x "
            f"{self.share // self.micro} x {self.micro}\n"
            f"{'going on' if self.step else 'starting'} at step {self.step} of {settings.steps} in {self.run_dir}"
        )


def _is_new_data(line: str) -> bool:
    """Whether a difference is of what steps see."""
    return line.partition(":")[0] in NEW_DATA


def _accelerator(precision: str | None) -> Accelerator:
    """The launcher's processes and device, and the precision asked for, or the launcher's.

    Raises:
        ValueError: fp16 on a CPU, or accelerate does not see the launcher's processes as one world.
    """
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Its successor forward_sync_buffers is not accelerate's to pass on yet.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[WRAPPING])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes, but each would train alone: for CPU processes set "
            "ACCELERATE_USE_CPU=true before `accelerate launch --multi_gpu`"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        source = "trainer.precision" if precision else "the launcher's --mixed_precision"
        raise ValueError(f"{source} is fp16, which a CPU would silently train in fp32: take bf16 or no")
    return accelerator
