"""A run's curves and pictures in TensorBoard."""

import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from trainer.log.charts import chart_layout
from trainer.log.codes import CodeViews, Embedded
from trainer.log.metrics_file import Line
from trainer.log.pictures import confusion_picture

NAMED = "ternary/named/"
PROJECTOR = "projector"  # folder of the codes that its page shows


class Board:
    """Writes TensorBoard's files; every method may raise an OSError when the disk is full.

    Args:
        folder: the run's folder
        step: the step at which the run starts or resumes; TensorBoard no longer shows later points
        tags: names of what was plotted before
    """

    def __init__(self, folder: Path, step: int, tags: Collection[str] = ()):
        self.folder, self.flushed_step = folder, step  # of the last line whose curves are on the disk
        self.tags = {*tags}
        self.named: dict[str, float] = {}  # the last log line's confusion of a ternary discriminator
        self.starts = 1 + len([*folder.glob("events.out.tfevents.*")])  # each start has written a file
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def start(self, configuration: str, begin: str) -> None:
        """Record the configuration, and as what the run starts or resumes."""
        self.writer.add_text("configuration", f"```yaml\n{configuration}\n```", 0)
        self.writer.add_text("starts", begin, self.flushed_step)
        self.plot(self.flushed_step, {"run/starts": self.starts})  # beside the curves, which may bend there

    def plot(self, step: int, values: dict[str, Any]) -> None:
        """Plot the values that have a slash in their names; new ones get into the layout of charts."""
        plotted = {name: value for name, value in values.items() if "/" in name}
        for name, value in plotted.items():
            self.writer.add_scalar(name, value, step)
        self.named |= {name.partition(NAMED)[2]: value for name, value in plotted.items() if name.startswith(NAMED)}
        if not plotted.keys() <= self.tags:
            self.tags |= plotted.keys()
            self.writer.add_custom_scalars(chart_layout(self.tags))  # TensorBoard takes the last

    def plot_again(self, lines: list[Line]) -> None:
        """Start a new file with all curves since the last flush, after the old one could not be written."""
        self.writer = SummaryWriter(str(self.folder), purge_step=self.flushed_step + 1)
        for line in lines:
            if line["step"] > self.flushed_step:
                self.plot(line["step"], line)

    def picture(self, step: int, title: str, picture: Image.Image) -> None:
        self.writer.add_image(title, np.asarray(picture), step, dataformats="HWC")

    def confusion(self, step: int) -> None:
        """Draw the last confusion of a ternary discriminator, if there is one."""
        if self.named:
            self.picture(step, "confusion of the ternary discriminator", confusion_picture(self.named))

    def codes(self, step: int, views: CodeViews) -> None:
        """Draw histograms of codes and of their KL, and a traversal."""
        self.writer.add_histogram("codes/means", views.means, step)
        if views.kl is not None:
            self.writer.add_histogram("codes/KL of each number in nats", views.kl, step)
        if views.traversal is not None:
            self.picture(step, "traversals of codes, from -3 to 3 deviations", views.traversal)

    def embed(self, embedded: Embedded) -> None:
        """Show codes in the projector, with their images and labels."""
        shutil.rmtree(self.folder / PROJECTOR, ignore_errors=True)  # of an earlier end of the same run
        self.writer.add_embedding(*embedded, PROJECTOR, "codes")  # instead of a step, which would name the folder

    def conclude(self, settings: dict[str, Any], scores: dict[str, float]) -> None:
        """Add the run to the table of runs: its settings by name, and its final scores."""
        plain = {
            name: value if isinstance(value, str | float | int) else str(value) for name, value in settings.items()
        }
        for summary in hparams(plain, scores):
            self.writer._get_file_writer().add_summary(summary)  # add_hparams would make another run of it

    def flush(self, step: int) -> None:
        """Write all to the disk; `step` is that of the last line."""
        self.writer.flush()
        self.flushed_step = step

    def close(self) -> None:
        self.writer.close()


def hide_tensorboard_tracebacks() -> None:
    """Print no traceback for what TensorBoard's thread cannot write.

    SummaryWriter raises the thread's error again at its next call, and RunLogger reports it.
    """

    def hook(thrown: threading.ExceptHookArgs) -> None:
        if not (isinstance(thrown.exc_value, OSError) and type(thrown.thread).__module__.startswith("tensorboard.")):
            threading.__excepthook__(thrown)

    threading.excepthook = hook
