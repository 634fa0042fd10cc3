"""What a run shows: TensorBoard, metrics.jsonl, a progress bar or lines, pictures.

A disk that is full for a while stops none of it: lines of metrics.jsonl wait for room, and TensorBoard's curves are
made from them again; pictures are left out.
"""

import json
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data.redact import printable, redacted_all
from trainer.files import write_atomically
from trainer.log.metrics_file import Line, read_metrics
from trainer.log.pictures import Panels, grid

SCORES = {  # charts: of what, and the tags of
    "FID and rFID": ("fid", "eval/fid.*", "eval/rfid.*"),
    "KID": ("kid", r"eval/kid\d.*"),
    "inception score": ("is", r"eval/is\d.*"),
    "precision and recall": ("prdc", "eval/precision.*", "eval/recall.*"),
    "density and coverage": ("prdc", "eval/density.*", "eval/coverage.*"),
    "PSNR": ("reconstruct", "eval/psnr.*"),
    "prior gap": ("reconstruct", "eval/prior_gap.*"),
    "FID of translations": ("translate", "eval/fid.*"),
    "PSNR of cycles": ("translate", "eval/cycle_psnr.*"),
}
PLAIN_TERMS = ("discriminator_loss", "generator_loss", "reconstruction", "kl")


class RunLogger:
    """Writes into a run's folder from its main process; on others every method returns at once.

    Args:
        folder: the run's
        step: the run goes on from here; what an earlier try recorded after it is removed
        steps: of the whole run
        is_main: whether this process writes
        evaluation_pending: the step's scores are to be recorded again
    """

    def __init__(self, folder: Path, step: int, steps: int, is_main: bool, evaluation_pending: bool = False):
        self.folder, self.steps, self.is_main = folder, steps, is_main
        if not is_main:
            return
        self.metrics = folder / "metrics.jsonl"
        self._pending, self._lock = "", threading.Lock()  # lines that are not yet on the disk
        self._failed: set[str] = set()
        self._whole = step  # so far the curves are on the disk
        self._last = 0  # step of the last line
        if self.metrics.exists():
            kept = [line for line in read_metrics(folder) if _is_kept(line, step, evaluation_pending)]
            write_atomically(self.metrics, "".join(f"{json.dumps(line)}\n" for line in kept))
            self._last = kept[-1]["step"] if kept else 0
        self.board = SummaryWriter(str(folder), purge_step=step + 1)
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.began, self.first = time.monotonic(), step

    def layout(self, modes: list[str], scored: set[str]) -> None:
        """Charts that put FID beside rFID and recall beside precision, each discriminator's loss beside chance, its
        accuracies together, and the rows of a ternary one's confusion matrix.

        Args:
            modes: of the discriminators
            scored: what evaluations score: reconstruct, translate, and of samples fid, is, kid, prdc
        """
        if self.is_main:
            charts = {chart: ["Multiline", tags] for chart, (use, *tags) in SCORES.items() if use in scored}
            layout = {"scores": charts} if charts else {}
            for mode in modes:
                layout[mode] = {
                    "loss and chance": ["Multiline", [f"{mode}/(./)?discriminator_loss", f"{mode}/(./)?chance"]],
                    "accuracy": ["Multiline", [f"{mode}/.*accuracy/.*"]],
                }
            if "ternary" in modes:
                for kind in ("real", "reconstructed", "generated"):
                    layout["ternary"][f"{kind} images are named"] = ["Multiline", [f"ternary/named/{kind}/.*"]]
            self.board.add_custom_scalars(layout)

    def configuration(self, text: str) -> None:
        if self.is_main:
            self.board.add_text("configuration", f"```yaml\n{text}\n```", 0)

    def advance(self) -> None:
        if self.is_main:
            self.bar.update()

    def message(self, text: str) -> None:
        """A line for the terminal, above the bar if there is one."""
        if self.is_main:
            tqdm.write(printable(text), file=sys.stderr)

    def scalars(self, step: int, values: dict[str, float], **facts: Any) -> None:
        """Scores or terms at a step; `facts` go into metrics.jsonl only."""
        if not self.is_main:
            return
        with self._trying("TensorBoard's curves"):
            self._plot(step, values)
        with self._trying("metrics.jsonl"):
            self._append(json.dumps({"step": step, **values, **facts}) + "\n", step)

    def scores(self, step: int, values: dict[str, float], **facts: Any) -> None:
        """An evaluation's scores: recorded, and shown by short names."""
        self.scalars(step, values, **facts)
        extractor = facts["extractor"]
        shown = {name.removeprefix("eval/").removesuffix(f"/{extractor}"): value for name, value in values.items()}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if "_std" not in name)
        lines = textwrap.wrap(
            f"step {step}  by {extractor}:  {text}", 120, subsequent_indent="    ", break_on_hyphens=False
        )
        self.message("\n".join(lines))

    def terms(self, step: int, values: dict[str, float], **facts: Any) -> None:
        """A log line's terms: recorded, and the main ones shown."""
        self.scalars(step, values, **facts)
        if not self.is_main:
            return
        shown = {name: f"{value:.3g}" for name, value in values.items() if name.split("/")[1] in PLAIN_TERMS}
        shown |= {
            "images/s": f"{values['speed/images_per_second']:.0f}",
            "data wait": f"{values['speed/data_wait']:.0%}",
        }
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        if self.bar.disable:
            left = (time.monotonic() - self.began) / (step - self.first) * (self.steps - step)
            self.message(f"step {step}/{self.steps}  {text}  eta {tqdm.format_interval(left)}")
        else:
            self.bar.set_postfix_str(text)

    def pictures(self, step: int, panels: Panels) -> None:
        """A grid as `samples/step_<8 digits>.png` and in TensorBoard."""
        if self.is_main:
            picture = grid(panels)
            with self._trying("pictures"):
                (self.folder / "samples").mkdir(exist_ok=True)
                picture.save(self.folder / "samples" / f"step_{step:08d}.png")
            with self._trying("TensorBoard's pictures"):
                self.board.add_image(" | ".join(panels), np.asarray(picture), step, dataformats="HWC")

    def failure(
        self,
        step: int,
        told: str,
        terms: dict[str, float],
        samples: list[list[str]],
        networks: dict[str, nn.Module],
        pictures: dict[str, Tensor],
    ) -> None:
        """What is known of a step that is not finite, as `failures/step_<8 digits>.json`, and its images as a PNG.

        Args:
            step: where
            told: what the user is told
            terms: means since the last log line
            samples: names of the whole batch, of each data set
            networks: as they were before the move that was blocked
            pictures: uint8 images of the batch, of each data set
        """
        folder = self.folder / "failures"
        weights = {
            f"{name}.{key}": {"largest": value.abs().max().item(), "finite": bool(value.isfinite().all())}
            for name, network in networks.items()
            for key, value in network.named_parameters()
        }
        facts = {"step": step, "told": told, "terms": terms, "samples": redacted_all(samples), "weights": weights}
        with self._trying("failures"):
            folder.mkdir(exist_ok=True)
            (folder / f"step_{step:08d}.json").write_text(json.dumps(facts, indent=1))
            grid(pictures).save(folder / f"step_{step:08d}.png")

    def flush(self) -> None:
        """Have all that was recorded on the disk, before a checkpoint that goes on from it.

        Raises:
            OSError: there is no room for metrics.jsonl.
        """
        if self.is_main:
            step = self._append()
            with self._trying("TensorBoard's curves"):
                if "TensorBoard's curves" in self._failed:
                    self._reopen()
                self.board.flush()
                self._whole = step
                self._failed.discard("TensorBoard's curves")

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            with self._trying("TensorBoard's curves"):
                self.board.close()

    def _append(self, line: str = "", step: int = 0) -> int:
        """Add a step's line to metrics.jsonl, and those that waited; what cannot be written as a whole waits.

        The saver's thread calls this, too. Returns the step of the last line that is on the disk.
        """
        with self._lock:
            self._pending += line
            self._last = step or self._last
            with open(self.metrics, "ab", buffering=0) as file:
                whole, rest = file.tell(), self._pending.encode()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(whole)
                    raise
            self._pending = ""
            return self._last

    def _reopen(self) -> None:
        """Begin TensorBoard's file anew after a failure, with what came since it was last whole."""
        self.board = SummaryWriter(str(self.folder), purge_step=self._whole + 1)
        with self._lock:  # or a line might be on its way
            lines = read_metrics(self.folder)
        for line in lines:
            if line["step"] > self._whole:
                self._plot(line["step"], line)

    def _plot(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if "/" in name:
                self.board.add_scalar(name, value, step)

    @contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        """Go on where something cannot be written, and say so once."""
        try:
            yield
        except OSError as error:
            if what not in self._failed:
                self._failed.add(what)
                self.message(f"{what} cannot be written in {self.folder}: {error}. The run goes on")


def _told_here(thrown: threading.ExceptHookArgs, others: Callable[..., Any] = threading.excepthook) -> None:
    """Print no traceback of what TensorBoard's thread cannot write: its next caller is raised that, and tells it."""
    if not (isinstance(thrown.exc_value, OSError) and type(thrown.thread).__module__.startswith("tensorboard.")):
        others(thrown)


threading.excepthook = _told_here


def _is_kept(line: Line, step: int, evaluation_pending: bool) -> bool:
    scores = any(name.startswith("eval/") for name in line)
    return line["step"] < step or (line["step"] == step and not (evaluation_pending and scores))
