"""Writes a run's log: metrics.jsonl, TensorBoard and other trackers, a progress bar or lines in the terminal, pictures.

A disk that is full for a while does not stop the log: lines of metrics.jsonl wait for room, and TensorBoard's curves
are made from them again. Only pictures are lost.
"""

import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from tqdm import tqdm

from data.errors import DataError
from data.redact import printable
from data.tables import duration
from models import System
from trainer.config.resume import flatten
from trainer.config.settings import TENSORBOARD
from trainer.log.board import Board
from trainer.log.codes import Embedded, code_views
from trainer.log.metrics_file import MetricsWriter
from trainer.log.pictures import COLUMNS, Panels, below_originals, grid
from trainer.log.trackers import Trackers

PLAIN_TERMS = ("discriminator_loss", "generator_loss", "reconstruction", "kl")
CURVES, PICTURES = "TensorBoard's curves", "TensorBoard's pictures"
MAIN_SCORES = re.compile(r"(r?fid|is|(cycle_)?psnr)\d")
QUIET, SILENT = 10, 30  # seconds between lines in an output that is no terminal, such as a job's log: least and most
RECENT = 60  # lines, of 10 minutes or more, by whose steps the time left is told: later steps may take longer


class RunLogger:
    """Writes a run's log from its main process; on other processes every method returns at once.

    Args:
        folder: the run's folder
        step: the step at which the run starts or resumes; later lines of an earlier process are removed
        steps: steps of the whole run
        is_main: whether this process writes
        evaluation_pending: also remove this step's scores, which will be measured again
        trackers: names of experiment trackers
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        steps: int,
        is_main: bool,
        evaluation_pending: bool = False,
        trackers: Sequence[str] = (TENSORBOARD,),
    ):
        self.folder, self.steps, self.is_main = folder, steps, is_main
        if not is_main:
            return
        self._failed_outputs: set[str] = set()
        self.metrics = MetricsWriter(folder, step, evaluation_pending)
        self.board = Board(folder, step, self.metrics.names) if TENSORBOARD in trackers else None
        self.trackers = Trackers(trackers, folder, step, self.message)
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=not _shows_bars(), dynamic_ncols=True)
        began = time.monotonic()
        self._recent = deque([(began, step)], maxlen=RECENT)  # when each of the last lines was printed, and its step
        self._quiet_until, self._silent_until = 0.0, began + SILENT

    def start(self, configuration: str, begin: str) -> None:
        """Record the configuration, without credentials, and as what the run starts or resumes."""
        if self.is_main:
            if self.board:
                self.board.start(configuration, begin)
            self.trackers.start(flatten(yaml.safe_load(configuration)))

    def advance(self) -> None:
        """Advance the progress bar by a step."""
        if self.is_main:
            self.bar.update()

    def print_if_silent(self, step: int) -> None:
        """Print a line with the time that is left if a file has had none about a step for SILENT seconds."""
        if self.is_main and self.bar.disable and time.monotonic() > self._silent_until:
            self._progress(step)

    def message(self, text: str) -> None:
        """Print a line in the terminal, above the progress bar."""
        if self.is_main:
            tqdm.write(printable(text), file=sys.stderr)

    def scalars(self, step: int, values: dict[str, float], **facts: Any) -> None:
        """Record scores or terms at a step; `facts` are written to metrics.jsonl only."""
        if not self.is_main:
            return
        if self.board:
            with self.tolerate_disk_errors(CURVES):
                self.board.plot(step, values)
        with self.tolerate_disk_errors("metrics.jsonl"):
            self.metrics.append({"step": step, **values, **facts})
        self.trackers.notify()

    def evaluating(self, step: int, samples: int, held_out: int) -> None:
        """Print that an evaluation begins, which may take minutes, into a file; a terminal shows the progress bar."""
        if self.is_main and self.bar.disable:
            images = f"{samples:,} samples and " * bool(samples) + f"{held_out:,} held-out images"
            self.message(f"step {step}: evaluating {images} ...")

    def scores(self, step: int, values: dict[str, float], **facts: Any) -> None:
        """Record an evaluation's scores, and print the main ones by short names; the report has all."""
        self.scalars(step, values, **facts)
        extractor = facts["extractor"]
        names = {name.removeprefix("eval/").removesuffix(f"/{extractor}"): value for name, value in values.items()}
        main = {name: value for name, value in names.items() if MAIN_SCORES.match(name)}
        text = "  ".join(f"{name} {value:.4g}" for name, value in (main or names).items())
        self.message(f"step {step}  by {extractor}:  {text}")

    def terms(self, step: int, values: dict[str, float], **facts: Any) -> None:
        """Record a log line's terms, and print the main ones; into a file, at most every QUIET seconds."""
        self.scalars(step, values, **facts)
        if not self.is_main:
            return
        main = {name: f"{value:.3g}" for name, value in values.items() if name.split("/")[1] in PLAIN_TERMS}
        main |= {
            "images/s": f"{values['speed/images_per_second']:.0f}",
            "data wait": f"{values['speed/data_wait']:.0%}",
        }
        text = "  ".join(f"{name} {value}" for name, value in main.items())
        if self.bar.disable:
            if step < self.steps and time.monotonic() < self._quiet_until:
                return
            self._progress(step, f"{text}  ")
            self._quiet_until = time.monotonic() + QUIET
        else:
            self.bar.set_postfix_str(text)

    def _progress(self, step: int, text: str = "") -> None:
        """Print a line about a step, with the time that is left."""
        now = time.monotonic()
        self._silent_until = now + SILENT
        began, first = self._recent[0]
        self._recent.append((now, step))
        left = (now - began) / max(1, step - first) * (self.steps - step)  # a resumed run may have no step to take
        self.message(f"step {step}/{self.steps}  {text}eta {duration(left)}")

    def pictures(self, step: int, panels: Panels, columns: int = COLUMNS) -> None:
        """Save a grid as `samples/step_<8 digits>.png` and in TensorBoard."""
        if self.is_main:
            picture = grid(below_originals(panels, columns), columns)
            with self.tolerate_disk_errors("pictures"):
                (self.folder / "samples").mkdir(exist_ok=True)
                picture.save(self.folder / "samples" / f"step_{step:08d}.png")
                self.trackers.notify(drawn=step)
            if self.board:
                with self.tolerate_disk_errors(PICTURES):
                    self.board.picture(step, " | ".join(panels), picture)
                    self.board.confusion(step)

    def codes(self, step: int, system: System, real: Tensor, label: Tensor) -> None:
        """Show in TensorBoard how a system with an encoder codes images, uint8 [n, channels, height, width]."""
        if self.is_main and self.board:
            with self.tolerate_disk_errors(PICTURES):
                self.board.codes(step, code_views(system, real, label))

    def conclude(
        self,
        settings: Callable[[], dict[str, Any]],
        scores: dict[str, float],
        embed: Callable[[], Embedded] | None,
    ) -> None:
        """Record in TensorBoard what a finished run is and scores, and its codes, if it has any, in the projector.

        `settings` and `embed` take a while, so only the process that writes to TensorBoard calls them.
        """
        if not (self.is_main and self.board):
            return
        embedded = None
        try:
            embedded = embed() if embed else None
        except (DataError, OSError) as error:
            self.message(f"warning: TensorBoard's projector lacks this run's codes: {error}")
        with self.tolerate_disk_errors(PICTURES):
            self.board.conclude(settings(), scores)
            if embedded is not None:
                self.board.embed(embedded)

    def flush(self) -> None:
        """Write everything recorded so far to the disk, before a checkpoint from which a run may resume.

        Raises:
            OSError: there is no room for metrics.jsonl.
        """
        if self.is_main:
            step = self.metrics.flush()
            if self.board:
                with self.tolerate_disk_errors(CURVES):
                    if CURVES in self._failed_outputs:
                        self.board.plot_again(self.metrics.read())
                    self.board.flush(step)
                    self._failed_outputs.discard(CURVES)

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            if self.board:
                with self.tolerate_disk_errors(CURVES):
                    self.board.close()
            self.trackers.close()

    @contextmanager
    def tolerate_disk_errors(self, output: str) -> Iterator[None]:
        """Continue if an output cannot be written; report the first error of each output."""
        try:
            yield
        except OSError as error:
            if output not in self._failed_outputs:
                self._failed_outputs.add(output)
                self.message(f"{output} cannot be written in {self.folder}: {error}. The run continues")


def _shows_bars() -> bool:
    """Whether standard error is a terminal of a known width; without one, as in some containers, tqdm shows nothing."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
