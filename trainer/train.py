"""A training run: its loop, and what happens after a step."""

from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.profiler import record_function

from trainer.batch import Batch
from trainer.build import build_run, make_train_step, take_trial_steps
from trainer.checkpoint.collective import resume, save_on_main
from trainer.checkpoint.state import TrainState
from trainer.checkpoint.writer import Saver
from trainer.config.parser import LINKED, Config
from trainer.config.resume import RESUMABLE_SETTINGS
from trainer.config.settings import TENSORBOARD
from trainer.device_batches import device_batches
from trainer.distributed.accelerator import make_accelerator
from trainer.distributed.exit import run_errors, user_errors
from trainer.distributed.ranks import Ranks, run_on_main, tensors_of
from trainer.distributed.rendezvous import rendezvous_errors
from trainer.distributed.stop import StopSignal, exit_code, listening
from trainer.errors import RunError
from trainer.evaluate.extractors.choice import settle_extractor
from trainer.evaluate.periodic import PeriodicEvaluator
from trainer.flops import StepFlops
from trainer.log.board import hide_tensorboard_tracebacks
from trainer.log.codes import embed
from trainer.log.data_health import DataHealth
from trainer.log.failures import FailureReports
from trainer.log.logger import RunLogger
from trainer.log.metrics_file import is_evaluation, read_metrics
from trainer.log.pictures import GridInputs, grid_inputs, panel_size, panels
from trainer.log.summary import final_summary, run_summary, start_line, start_warnings
from trainer.log.window import LogWindow, peak_memory
from trainer.profiler import LOG, StepProfiler, parse_profile
from trainer.remote_run import RemoteRun, failing_at_url, follow
from trainer.run_folder import RunFolder


def train(config: Config) -> int:
    """Train as configured, resume if the run folder holds checkpoints, and return the process's exit code."""
    settings = config.trainer
    hide_tensorboard_tracebacks()
    with listening(settings.time_limit) as stop, RunFolder(config.run_dir) as folder:
        with user_errors():
            with rendezvous_errors(settings.timeout):
                accelerator = make_accelerator(
                    settings.precision, settings.timeout, settings.deterministic, config.run_dir
                )
                ranks = Ranks(accelerator, settings.timeout)
            with ranks.naming_missing_ranks():
                remote = follow(config, folder, accelerator)
                with failing_at_url(remote, accelerator.is_main_process):
                    run = Run(config, folder, accelerator, ranks, stop, remote)
        with run_errors():
            return exit_code(left_early=not run.train())


# What TensorBoard's table of runs leaves out: what may change when a run resumes, and what is also a setting of data.
UNSHOWN = RESUMABLE_SETTINGS | {f"system.{name}" for name in LINKED}


class Run:
    """A training run: built and resumed when it is made, then trained by `train`.

    Raises:
        ValueError, DataError, OSError: the settings, the data or the run folder do not allow the run.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        accelerator: Accelerator,
        ranks: Ranks,
        stop: StopSignal,
        remote: RemoteRun | None = None,
    ):
        settings, is_main, self.remote = config.trainer, accelerator.is_main_process, remote
        self.config, self.folder, self.accelerator, self.ranks, self.stop = config, folder, accelerator, ranks, stop
        self.parts = parts = build_run(config, accelerator, ranks)
        self.warnings = settle_extractor(config, accelerator)
        self.warnings += start_warnings(config, accelerator.device.type, parts.trains, parts.tests)
        self.train_step = make_train_step(parts, accelerator)
        self.window = LogWindow(accelerator, self.train_step.meter, settings.batch_size)
        players = self.train_step.player_states
        record = parts.initial.record if parts.initial else None
        self.state = TrainState(
            config, parts.system, parts.networks, parts.ema, players, parts.trains, parts.orders, record
        )
        take_trial_steps(parts, self.state, accelerator)
        run_on_main(accelerator, folder.lock)
        resumed = resume(folder.checkpoints, self.state, accelerator)
        self.has_codes = parts.system.can("posterior") and parts.system.can("sample")
        self.step, self.evaluation_pending, self.shortened = resumed.step, resumed.evaluation_pending, resumed.shortened
        if resumed.windows:
            self.window.load(resumed.windows)

        self.evaluator = PeriodicEvaluator(parts, folder.path, accelerator) if config.evaluate.every else None
        shown = parts.tests or parts.trains
        self.grid_inputs = list[GridInputs]()  # of the main process, which alone reads and draws them
        inputs = shown, config.data, settings.seed, parts.system, accelerator.device, bool(config.evaluate.num)
        run_on_main(accelerator, lambda: self.grid_inputs.append(grid_inputs(*inputs)))
        self.logger = RunLogger(
            folder.path, self.step, settings.steps, is_main, self.evaluation_pending, settings.trackers
        )
        profiled = parse_profile(settings.profile if is_main else None, settings.steps)
        self.profiler = StepProfiler(profiled, folder.path / "profile", self.logger.message)
        self.flops = StepFlops(config, parts.per_rank_batch)
        self.data_health = DataHealth(config, self.step, resumed.replaced)
        self.failures = FailureReports(parts, folder, self.logger)
        self.saver = Saver(
            folder.checkpoints,
            settings.keep,
            settings.keep_every,
            self.logger.message,
            self.logger.flush,
            partial(remote.push_behind, self.logger.message) if remote else lambda: None,
        )
        self._announce()

    def train(self) -> bool:
        """Train to the last step or until a process must stop; return whether the run has finished.

        Raises:
            RunError: a loss or gradient is not finite, a checkpoint cannot be written, or a process is missing.
            DataError: a sample is damaged.
        """
        try:
            with self.ranks.naming_missing_ranks():
                finished = self._train()
                if finished:
                    self._copy_to_url()  # a job script must not take a run for finished that is here alone
                self.folder.set_status("finished" if finished else "stopped")
                self._copy_to_url()
                self.accelerator.wait_for_everyone()
        except BaseException:
            with suppress(OSError, RunError):
                self.saver.finish()
                if self.remote is not None and self.accelerator.is_main_process:
                    if self.folder.status == "running":
                        self.folder.set_status("failed")
                    self.remote.push()  # with what was reported of the failure
            raise
        finally:
            self.logger.close()
            if self.evaluator is not None:
                self.evaluator.close()
        return finished

    def _train(self) -> bool:
        if self.shortened:
            if not self.window.is_empty:
                self._log()
            self._draw_grid()
        if self.evaluation_pending:
            self._evaluate()
        batches, stopping = self.batches(), False
        self.window.start(self.step)
        while self.step < self.config.trainer.steps and not stopping:
            stopping = self.ranks.agree(self.stop.should_stop(self.saver.seconds), self.step)
            self.profiler.before(self.step)
            with self.window.waiting_for_data():
                batch = next(batches)
            self.train_step(batch.split(self.parts.micro_batch), self.step)
            self.step += 1
            self.parts.ema.update(self.step)
            self.logger.advance()
            with record_function(LOG):
                self._after_step(stopping)
                self.logger.print_if_silent(self.step)
        self.profiler.finish(self.step)
        batches.close()
        self._save_on_main(self.saver.finish)
        # A run that must stop in its last step is not finished while that step's evaluation is pending.
        finished = self.step == self.config.trainer.steps and not (stopping and self.evaluator)
        if finished and self.accelerator.is_main_process:
            self._conclude()
        elif not finished:
            reason = self.stop.reason or "another process"
            self.logger.message(
                f"Stopped by {reason} at step {self.step} of {self.config.trainer.steps}. Checkpoint saved; run the "
                "same command to resume"
            )
        return finished

    def _copy_to_url(self) -> None:
        """Copy the rest of the run folder to where it belongs."""
        if self.remote is not None:
            self.logger.flush()
            self._save_on_main(self.remote.push)

    def batches(self) -> Generator[Batch]:
        """Yield this process's batches from the present step on."""
        return device_batches(self.parts, self.accelerator, self.step, self.window)

    def _after_step(self, stopping: bool) -> None:
        """Check, log, draw, save and evaluate where it is due."""
        settings, last = self.config.trainer, self.step == self.config.trainer.steps
        due = self.evaluator is not None and (last or self.step % self.config.evaluate.every == 0)
        evaluating = due and (last or self._affords_evaluation())
        saving = last or due or self.step % settings.save_every == 0
        checking = saving or self.step % settings.check_every == 0
        # Stopping ends no window of the log, so that a resumed run logs the same lines as an uninterrupted one.
        logging = checking or self.step % settings.log_every == 0
        if logging or stopping:
            self._check(weights=checking or stopping)
        if logging:
            self._log()
        if saving:
            self._draw_grid()
        if saving or stopping:
            self._save(evaluation_pending=evaluating)
        if evaluating and not stopping:
            self._evaluate()
        if logging:
            self.window.start(self.step)

    def _check(self, weights: bool) -> None:
        """Raise if a step was not finite, or if processes have different weights."""
        if failed := self.train_step.failed():
            raise self.failures.not_finite(*failed, self.train_step.meter.read(self.accelerator))
        if weights:
            system, averages = self.parts.system, self.parts.ema.system
            networks = self.parts.networks | {f"the average of {name}": one for name, one in averages.named_children()}
            tensors = {name: tensors_of(network) for name, network in networks.items()}
            tensors |= {f"the statistic {name}": [value] for name, value in system.statistics().items()}
            self.ranks.check_weights(tensors)

    def _log(self) -> None:
        summary, steps = self.window.read(self.step), self.config.trainer.steps
        terms = summary.terms
        for player in (player_state.player for player_state in self.train_step.player_states):
            terms[f"{player.name}/lr"] = player.optimizer.rate(self.step - 1, steps)
            varying = player.optimizer.varying(self.step - 1)
            terms |= {f"{player.name}/{name}": value for name, value in varying.items()}
        if self.accelerator.is_main_process:
            rate = terms["speed/images_per_second"] / self.config.trainer.batch_size
            terms |= peak_memory(self.accelerator.device)
            terms |= self.flops.rates(range(self.window.first_step, self.step), rate, self.accelerator.device)
        if self.config.data.on_error == "skip":
            self.data_health.replaced += len(summary.replaced)
            terms["data/skipped"] = self.data_health.replaced
        self.logger.terms(self.step, terms, sample_checksum=summary.sample_checksum)
        for message in summary.replaced:
            self.logger.message(message)
        self.data_health.check_replaced(self.step)
        if warning := self.data_health.slow_data_warning(self.step, terms["speed/data_wait"]):
            self.logger.message(warning)

    def _draw_grid(self) -> None:
        trouble = None
        if self.accelerator.is_main_process:
            try:
                system = self.parts.ema.system
                row, number = panel_size(system.classes, self.config.data.shape)
                (inputs,) = self.grid_inputs
                self.logger.pictures(self.step, panels(system, inputs.part(slice(number))), row)
                if self.has_codes:
                    self.logger.codes(self.step, system, inputs.real[0], inputs.label)
            except FloatingPointError as error:
                trouble = str(error)
        (trouble,) = broadcast_object_list([trouble])
        if trouble:
            raise self.failures.unusable_images(self.step, trouble)

    def _save(self, evaluation_pending: bool) -> None:
        progress = {
            "evaluation_pending": evaluation_pending,
            "replaced": self.data_health.replaced,
            "code": self.parts.code,
            "windows": gather_object([self.window.state()]),  # empty, unless the run stops within a window
        }
        tensors = self.state.tensors()
        tensors |= {"by_position": self.ranks.gather_rows(rows)} if (rows := tensors.get("by_position")) else {}
        self._save_on_main(lambda: self.saver.save(self.step, tensors, self.state.manifest() | progress))

    def _save_on_main(self, work: Callable[[], None]) -> None:
        save_on_main(self.accelerator, self.saver, work)

    def _affords_evaluation(self) -> bool:
        assert self.evaluator is not None
        affordable = self.evaluator.affordable()
        if not affordable:
            budget = self.config.evaluate.budget
            self.logger.message(f"step {self.step}: not scored, or it would take more than evaluate.budget {budget:g}")
        return affordable

    def _evaluate(self) -> None:
        """Score the averaged networks, and add the scores to this step's checkpoint."""
        assert self.evaluator is not None
        drawn = self.config.evaluate.num if self.parts.system.can("sample") else 0
        self.logger.evaluating(self.step, drawn or 0, sum(map(len, self.parts.tests)))
        try:
            scores, facts = self.evaluator()
        except FloatingPointError as error:
            raise self.failures.unusable_images(self.step, str(error)) from error
        self.logger.scores(self.step, scores, **facts)
        for hint in facts.get("hints", []):
            self.logger.message(f"step {self.step}: {hint}")
        comparable = self.evaluator.comparable
        self._save_on_main(lambda: self.saver.score(self.step, scores, comparable))

    def _announce(self) -> None:
        if self.accelerator.is_main_process:
            self.config.write(self.folder.path / "config.yaml")
            if self.remote is not None:
                self.remote.write("config.yaml", self.config.redacted_yaml())
                self.remote.write("state", "running\n")
        begin = start_line(self.config, self.step)
        self.logger.start(self.config.redacted_yaml(), begin)
        self.logger.message(run_summary(self.parts, self.train_step.player_states, self.accelerator))
        left_out = [f"left out: {problem}" for shards in self.parts.trains for problem in shards.problems]
        for text in (*(f"warning: {warning}" for warning in self.warnings), *left_out, begin):
            self.logger.message(text)

    def _conclude(self) -> None:
        """Print what a finished run scored and where it is, and complete TensorBoard's files."""
        lines, parts, config = read_metrics(self.folder.path), self.parts, self.config
        last = next((line for line in reversed(lines) if is_evaluation(line)), {})
        system, shown, device = parts.ema.system, (parts.tests or parts.trains)[0], self.accelerator.device
        self.logger.conclude(
            lambda: {name: value for name, value in config.stated().items() if name not in UNSHOWN},
            {name: value for name, value in last.items() if "/" in name},
            (lambda: embed(system, shown, config.data, config.trainer.seed, device)) if self.has_codes else None,
        )
        self.logger.message(final_summary(self.folder.path, config, lines, TENSORBOARD in config.trainer.trackers))
