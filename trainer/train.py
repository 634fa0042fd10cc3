"""A run, top to bottom."""

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from data.errors import DataError
from data.loader import Augment, Batches, load, read
from data.order import permutation, sample_checksum
from data.processes import prepare_workers
from models import Player
from trainer.batch import Batch, key, normalize
from trainer.build import check_held_out, make_orders, open_datasets, split_batch
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint import writer
from trainer.checkpoint.state import TrainState, frozen_checksums
from trainer.config.parser import Config
from trainer.config.resume import flatten
from trainer.distributed.accelerator import make_accelerator
from trainer.distributed.exit import run_errors, user_errors
from trainer.distributed.ranks import ROOT, Ranks, code_checksum, tensors_of
from trainer.distributed.rendezvous import rendezvous_errors
from trainer.distributed.stop import StopSignal, exit_code, listening
from trainer.ema import EMA
from trainer.errors import DivergedError, RunError
from trainer.log.logger import RunLogger
from trainer.log.pictures import panels
from trainer.log.run_folder import RunFolder, RunStatus
from trainer.results import lines_of
from trainer.step import TrainStep

if TYPE_CHECKING:
    from trainer.evaluate.evaluator import Evaluator

GRID = 48  # images in each panel of a grid
FEW = 1000  # images, of which a share is measured no more finely


def train(config: Config) -> int:
    """Train as configured; a run that is there already goes on. Returns the process's exit code."""
    settings = config.trainer
    with listening(settings.time_limit) as leaving, RunFolder(config.run_dir) as folder:
        with user_errors():
            with rendezvous_errors(settings.timeout):
                accelerator = make_accelerator(
                    settings.precision, settings.timeout, settings.deterministic, config.run_dir
                )
                peers = Ranks(accelerator, settings.timeout)
            with peers.naming_missing_ranks():
                run = Run(config, folder, accelerator, peers, leaving)
        with run_errors():
            return exit_code(left_early=run.go())


class Run:
    """Everything that a run needs, built and resumed; then `go`.

    Raises:
        ValueError, DataError: something that the configuration asks for cannot be.
    """

    def __init__(self, config: Config, folder: RunFolder, accelerator: Accelerator, peers: Ranks, leaving: StopSignal):
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.peers, self.leaving, self.code = peers, leaving, code_checksum()
        settings = config.trainer
        if config.data.workers:
            prepare_workers()
        config.settle_precision(accelerator.mixed_precision)

        torch.manual_seed(key(settings.seed, "weights"))
        self.system = config.system()
        self.system.players()  # checks their settings
        self.share, self.micro = split_batch(
            settings.batch_size, settings.micro_batch, accelerator.num_processes, self.system.group
        )
        self.trains, self.tests = open_datasets(config, self.system)
        self._check_alike()
        self.orders = make_orders(config, self.trains)

        self.system.to(accelerator.device)
        self.peers.broadcast_weights(self.system)  # processors draw other last digits from one seed
        self.ema = EMA(self.system, settings.ema_half_life, settings.batch_size, settings.ema_ramp)
        self.networks = self.system.networks()
        for name, network in self.networks.items():
            if settings.compile and not name.startswith("discriminator"):
                network.compile()  # in place: names of weights stay what they are
            # For accelerate, a network that is evaluated only is not wrapped by DDP.
            prepared = accelerator.prepare_model(network, evaluation_mode=settings.grad_sync == "flat")
            setattr(self.system, name, prepared)
        self.train_step = self._make_train_step()
        self.state = TrainState(
            config, self.system, self.networks, self.ema, self.train_step.player_states, self.trains, self.orders
        )
        self._settle_buckets()
        self.step = self.replaced = 0  # images that others stood in for
        self.evaluation_pending = False  # the scores of the step that it goes on from
        self.seen, self.warned = 0, False
        self.skipped: list[str] = []
        self._resume()
        self.first = self.step

        self.evaluator = self._evaluator()
        self.panels = self._grid_source()
        self.record = RunLogger(
            self.folder.path, self.step, settings.steps, accelerator.is_main_process, self.evaluation_pending
        )
        self.saver = writer.Saver(
            self.checkpoints, settings.keep, settings.keep_every, self.record.say, self.record.flush
        )
        self._announce()
        for problem in [problem for shards in self.trains for problem in shards.problems]:
            self.record.say(f"left out: {problem}")

    @property
    def checkpoints(self) -> Path:
        return self.folder.path / "checkpoints"

    def _board(self) -> str:
        path = self.folder.path
        return "make board" if path.parent == ROOT / "runs" else f"tensorboard --logdir {path}"

    def _checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    # ---- the run

    def go(self) -> bool:
        """Train to the last step, or until asked to leave; returns whether it left early.

        Raises:
            RunError: a loss or gradient is not finite, a checkpoint cannot be written, or a process is missing.
            DataError: a sample is damaged.
        """
        try:
            with self.peers.naming_missing_ranks():
                left = self._train()
                self._say("preempted" if left else "finished")
                self.accelerator.wait_for_everyone()
        except BaseException:
            with suppress(OSError):
                self.saver.finish()  # what was on its way
            raise
        finally:
            self.record.close()
        return left

    def _train(self) -> bool:
        settings, evaluation = self.config.trainer, self.config.evaluate
        if self.evaluation_pending:
            self._evaluate()
        batches = self._batches()
        since, began, waited, leave = self.step, time.monotonic(), 0.0, False
        while self.step < settings.steps and not leave:
            leave = self.peers.agree(self.leaving.should_stop(self.saver.seconds), self.step)
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            self.train_step(batch.split(self.micro), self.step)
            self.step += 1
            self.ema.update(self.step)
            self.record.advance()

            last = self.step == settings.steps
            due = self.evaluator is not None and (last or self.step % evaluation.every == 0)
            evaluating = due and (last or self._affords())
            saving = last or due or self.step % settings.save_every == 0
            checking = saving or self.step % settings.check_every == 0
            # StopSignal ends no window of the log, so that a run that goes on logs what one that never stopped does.
            logging = checking or self.step % settings.log_every == 0
            if logging or leave:
                self._check(weights=checking or leave)
            if logging:
                self._log(self.step - since, began, waited)
            if saving:
                self._draw()
            if saving or leave:
                self._save(evaluation_pending=evaluating)
            if evaluating and not leave:
                self._evaluate()
            if logging:
                since, began, waited = self.step, time.monotonic(), 0.0
        batches.close()
        self._saving(self.saver.finish)
        done = self.step == settings.steps and not (leave and self.evaluator)
        self.record.say(
            f"finished at step {self.step}: pictures in {self.folder.path / 'samples'}, curves by {self._board()}"
            if done
            else f"left at step {self.step} of {settings.steps} for {self.leaving.reason or 'another process'}: all is "
            "saved, and the same command goes on"
        )
        return not done

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
                self.seen += sample_checksum(step, which, rows, images.position.numpy())
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

    def _check(self, weights: bool) -> None:
        """Stop where a step was not finite, or where processes differ in their weights."""
        if failed := self.train_step.failed():
            raise self._diverged(*failed)
        if weights:
            averages = {f"the average of {name}": ema for name, ema in self.ema.system.named_children()}
            parts = {name: tensors_of(network) for name, network in (self.networks | averages).items()}
            statistics = self.system.named_buffers(recurse=False)
            self.peers.check_weights(parts | {f"the statistic {name}": [value] for name, value in statistics})

    def _log(self, steps: int, began: float, waited: float) -> None:
        terms = self.train_step.meter.read(self.accelerator)
        seconds = time.monotonic() - began  # after the reading, which waits for the device
        terms |= {
            f"{player_state.player.name}/lr": player_state.player.optimizer.rate(
                self.step - 1, self.config.trainer.steps
            )
            for player_state in self.train_step.player_states
        }
        terms["speed/images_per_second"] = steps * self.config.trainer.batch_size / seconds
        self._log_data(terms, waited / seconds)

    def _log_data(self, terms: dict[str, float], waited: float) -> None:
        """RunLogger a log line's terms with those of the data, of all ranks."""
        told = torch.tensor([self.seen % 2**32, len(self.skipped), round(waited * 1e6)], device=self.accelerator.device)
        seen, skipped, wait = self.accelerator.reduce(told, "sum").tolist()
        terms["speed/data_wait"] = wait / 1e6 / self.accelerator.num_processes
        settings, data = self.config.trainer, self.config.data
        if data.on_error == "skip":
            self.replaced += skipped
            terms["data/skipped"] = self.replaced
        self.record.terms(self.step, terms, seen=seen % 2**32)
        if skipped:
            for line in gather_object(self.skipped):
                self.record.say(line)
        self.seen, self.skipped = 0, []
        shown = self.step * settings.batch_size * len(self.trains)
        if self.replaced > data.max_skipped * max(shown, FEW):
            raise RunError(
                f"step {self.step}: {self.replaced} of {shown:,} images were damaged, more than data.max_skipped "
                f"{data.max_skipped:g} allows: mend the data (python -m data.inspect FOLDER --verify lists what is "
                "wrong), or raise it"
            )
        if terms["speed/data_wait"] > 0.1 and not self.warned and self.step > self.first + settings.log_every:
            self.warned = True
            self.record.say(
                f"steps wait for data {terms['speed/data_wait']:.0%} of the time: raise --data.workers (now "
                f"{data.workers}), or prepare smaller images (python -m data.prepare --size {data.size})"
            )

    def _diverged(self, step: int, player: Player) -> DivergedError:
        """What is told of a step that is not finite, and written for whoever looks for the cause."""
        terms = self.train_step.meter.read(self.accelerator)
        bad = [name for name, value in terms.items() if name.startswith(f"{player.name}/") and not math.isfinite(value)]
        told = f"step {step + 1}: player {player.name}: not finite: {', '.join(bad) or 'its gradient'}"
        with suppress(OSError):  # whatever else goes wrong, it is not to be started again
            self._say("diverged")
        if self.accelerator.is_main_process:
            batch = [order[step] for order in self.orders]
            samples = [
                [shards.name(int(position)) for position in positions]
                for shards, positions in zip(self.trains, batch, strict=True)
            ]
            pictures = {}
            with suppress(DataError):
                for i, (shards, positions) in enumerate(zip(self.trains, batch, strict=True)):
                    shown = read(shards, positions[:GRID], self.config.data.size, self.config.data.channels)
                    pictures[f"set {i}"] = shown.image
            self.record.failure(step + 1, told, terms, samples, self.networks, pictures)
        kept = f", and the checkpoints in {self.checkpoints} are intact" if self.checkpoints.exists() else ""
        return DivergedError(
            f"{told}. No weight was changed since{kept}. The step's samples, terms and weights are told of in "
            f"{self.folder.path / 'failures'}. Start again in another run folder with a lower "
            f"--system.{player.name}.lr, or with --system.{player.name}.clip"
        )

    def _affords(self) -> bool:
        """Whether an evaluation fits into evaluate.budget; scores alone depend on it, and no step does."""
        budget = self.config.evaluate.budget
        assert self.evaluator is not None
        fits = budget == 1 or self.evaluator.budget.affordable(budget)
        if not fits:
            self.record.say(f"step {self.step}: not scored, or it would take more than evaluate.budget {budget:g}")
        return fits

    def _evaluate(self) -> None:
        """Score this step's averages, and add the scores to its checkpoint."""
        from trainer.evaluate.hints import hints  # torchmetrics takes seconds to import

        assert self.evaluator is not None
        try:
            scores = self.evaluator(self.ema.system)
        except FloatingPointError as error:
            raise self._unusable(str(error)) from error
        past = lines_of(self.folder.path) if self.accelerator.is_main_process else []
        told = hints(past, scores, self.evaluator.facts)
        facts = {"weights": "ema", "seed": self.config.trainer.seed, "world_size": self.accelerator.num_processes}
        facts |= {**self.evaluator.recipe, **({"hints": told} if told else {})}
        self.record.scores(self.step, scores, **self.evaluator.facts, **facts)
        for hint in told:
            self.record.say(f"step {self.step}: {hint}")
        evaluation = self.evaluator.facts
        self._saving(lambda: self.saver.score(self.step, scores, evaluation))

    @torch.no_grad()
    def _draw(self) -> None:
        trouble = None
        if self.accelerator.is_main_process:
            try:
                self.record.pictures(self.step, panels(self.ema.system, *self.panels))
            except FloatingPointError as error:
                trouble = str(error)
        (trouble,) = broadcast_object_list([trouble])
        if trouble:
            raise self._unusable(trouble)

    def _unusable(self, trouble: str) -> DivergedError:
        """What is told of averages that make images which are not finite, though every loss and gradient was."""
        with suppress(OSError):
            self._say("diverged")
        kept = f" The checkpoints in {self.checkpoints} are intact." if self.checkpoints.exists() else ""
        return DivergedError(
            f"step {self.step}: the averaged networks' images cannot be used: {trouble}.{kept} Start again in another "
            "run folder with lower learning rates (--system.PLAYER.lr), or with --system.PLAYER.clip"
        )

    # ---- its state

    def _save(self, evaluation_pending: bool) -> None:
        """Begin to save; `evaluation_pending`: its scores are still to come."""
        # Empty, but for a step at which the run leaves.
        window = {"terms": self.train_step.meter.state(), "seen": self.seen, "skipped": self.skipped}
        kept = {
            "evaluation_pending": evaluation_pending,
            "skipped": self.replaced,
            "code": self.code,
            "windows": gather_object([window]),
        }
        self._saving(lambda: self.saver.save(self.step, self.state.tensors(), self.state.manifest() | kept))

    def _saving(self, work: Callable[[], None]) -> None:
        """Do something about checkpoints on the main process; what goes wrong there stops all."""
        trouble = None
        if self.accelerator.is_main_process:
            try:
                work()
            except OSError as error:
                step, where = self.saver.step, error.filename or self.checkpoints
                trouble = f"step {step}: the checkpoint could not be saved: {error.strerror} ({where})"
        (trouble,) = broadcast_object_list([trouble])
        if trouble:
            raise RunError(
                f"{trouble}. The ones before it are intact: make room or mend the folder, then run the same command "
                "again, and it goes on from the newest"
            )

    def _say(self, state: RunStatus) -> None:
        if self.accelerator.is_main_process:
            self.folder.say(state)

    def _resume(self) -> None:
        """Load the newest whole checkpoint, the same one on every process; without one the run starts at step 0."""
        found, trouble = None, None
        if self.accelerator.is_main_process:
            try:
                self.folder.lock()
                found = checkpoint_files.load_newest(self.checkpoints)
            except (ValueError, OSError) as error:
                trouble = str(error)
        step = found and found[1]["step"]
        scored = step is not None and checkpoint_files.read_scores(self._checkpoint(step)) is not None
        step, scored, trouble = broadcast_object_list([step, scored, trouble])
        if trouble:
            raise ValueError(trouble)
        if step is None:
            return
        tensors, manifest = found or checkpoint_files.load(self._checkpoint(step))
        self.state.check(manifest, speaks=self.accelerator.is_main_process)
        self.state.load(tensors, manifest)
        self.step, self.replaced = step, manifest["skipped"]
        self._resume_windows(manifest["windows"])
        self.evaluation_pending = manifest["evaluation_pending"] and not scored and self.config.evaluate.every > 0

    def _resume_windows(self, windows: list[dict[str, Any]]) -> None:
        """Go on with what each process had not logged yet; as many other processes share it."""
        if len(windows) == self.accelerator.num_processes:
            windows = [windows[self.accelerator.process_index]]
            self.seen, self.skipped = windows[0]["seen"], windows[0]["skipped"]
        elif self.accelerator.is_main_process:
            self.seen = sum(window["seen"] for window in windows)
            self.skipped = [told for window in windows for told in window["skipped"]]
        self.train_step.meter.load([window["terms"] for window in windows], self.accelerator.device)

    def _check_alike(self) -> None:
        """All processes must run the same program with the same settings on the same images."""
        own = {"code": self.code, **flatten(self.config.resolved())}
        for name in ("data.workers", "data.cache", "data.cache_gb"):  # a machine's own
            del own[name]
        own |= frozen_checksums(self.system)
        own["shards"] = [shards.fingerprint() for shards in (*self.trains, *self.tests)]
        self.peers.check_same(own)

    def _make_train_step(self) -> TrainStep:
        settings = self.config.trainer
        return TrainStep(self.accelerator, self.system, settings.steps, settings.share_passes, settings.overflows)

    def _settle_buckets(self) -> None:
        """Take a step that is then undone, so that every real one, a resumed run's first too, sums gradients alike.

        DDP reorders its buckets after its first backward, and with three processes or more that changes rounding.
        """
        if self.accelerator.num_processes == 1 or self.config.trainer.grad_sync == "flat":
            return
        before = copy.deepcopy(self.state.trained())
        data, settings = self.config.data, self.config.trainer
        image = torch.zeros(self.share, data.channels, data.size, data.size, device=self.accelerator.device)
        player_state = self._make_train_step()
        for start in {player_state.player.start for player_state in player_state.player_states}:
            blank = Batch((image,) * self.system.domains, slice(0, self.share), settings.batch_size, 0, start)
            player_state(blank.split(self.micro), start)
        self.state.load_networks(before)

    # ---- what it looks at

    def _evaluator(self) -> "Evaluator | None":
        settings = self.config.evaluate
        if not settings.every:
            return None
        check_held_out(self.tests)
        if self.accelerator.is_main_process:
            held_out = sum(len(shards) for shards in self.tests)
            print(f"preparing {settings.extractor} and {held_out:,} held-out images", file=sys.stderr, flush=True)
        from trainer.evaluate.evaluator import Evaluator  # torchmetrics takes seconds to import
        from trainer.evaluate.extractors.build import build
        from trainer.evaluate.extractors.lpips import LPIPS

        extractor = build(settings, self.config.data, self.folder.path, self.trains, self.tests, self.accelerator)
        evaluator = Evaluator(
            self.accelerator,
            extractor,
            self.tests,
            self.config.data,
            num=settings.num,
            seed=self.config.trainer.seed,
            system=self.system,
            metrics=settings.metrics,
            statistics=Path(settings.statistics or self.folder.path / "statistics"),
            distance=LPIPS(settings.lpips, self.accelerator.device) if settings.lpips else None,
        )
        evaluator.budget.resume(lines_of(self.folder.path) if self.accelerator.is_main_process else [])
        return evaluator

    def _grid_source(self) -> tuple[list[Tensor], Tensor]:
        """The same images of each data set and prior draws at every step of the run."""
        data, seed, device = self.config.data, self.config.trainer.seed, self.accelerator.device
        real = [
            read(shards, permutation(len(shards), seed)[:GRID], data.size, data.channels).image.to(device)
            for shards in self.tests or self.trains
        ]
        z = torch.randn(GRID, *self.system.latent_shape, generator=torch.Generator().manual_seed(key(seed, "grid")))
        return real, z.to(device)

    def _announce(self) -> None:
        world, settings = self.accelerator.num_processes, self.config.trainer
        sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in self.networks.items()}
        if self.accelerator.is_main_process:
            self.config.write(self.folder.path / "config.yaml")
        self.record.configuration(self.config.redacted_yaml())
        modes = [
            player_state.player.name
            for player_state in self.train_step.player_states
            if player_state.player.name in ("binary", "ternary")
        ]
        scored = {use for use in ("sample", "reconstruct", "translate") if self.evaluator and self.system.can(use)}
        if self.evaluator and "sample" in scored:
            scored |= {*self.evaluator.sample_metrics}
        self.record.layout(modes, scored)
        self.record.say(
            f"{self.config.redacted_yaml()}\n"
            f"{type(self.system).__name__}: {', '.join(f'{name} {size:,} weights' for name, size in sizes.items())}\n"
            f"{' + '.join(f'{len(shards):,}' for shards in self.trains)} training images, "
            f"{self.orders[0].steps_per_epoch} steps an epoch; {world} "
            f"process{'es' if world > 1 else ''} on {self.accelerator.device.type}, precision "
            f"{self.accelerator.mixed_precision}; {settings.batch_size} images a step = {world} x "
            f"{self.share // self.micro} x {self.micro}\n"
            f"{'going on' if self.step else 'starting'} at step {self.step} of {settings.steps} in {self.folder.path}"
        )
