"""Experiment trackers other than TensorBoard: Weights & Biases, MLflow and all others that accelerate knows.

Each is driven through accelerate's `GeneralTracker` by a thread of its own, which reads what the run has written:
metrics.jsonl and the pictures in `samples`. So a tracker that is slow, fails or hangs neither slows nor stops the run,
and it can catch up with all that it lacks. TensorBoard has a writer of its own in trainer/log/board.py, since
accelerate's cannot purge what an earlier process wrote behind its last checkpoint, or lay out charts.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from uuid import uuid4

import msgspec
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from msgspec import Meta, Struct

from data.files import parse, read
from data.images import decode_whole
from data.redact import redacted_all
from trainer.config.settings import TENSORBOARD
from trainer.files import write_atomically
from trainer.log.metrics_file import is_evaluation, parse_line

PROJECT = "vaegan-trainer"  # in which trackers file runs
CLOSING = 30  # seconds that all trackers together may take at the end of a run
TERMS, PICTURE, SCORES = range(3)  # the order in which a step's are made
Place = tuple[int, int]  # step, and TERMS, PICTURE or SCORES
Report = Callable[[str], None]


class Sent(Struct):
    """tracker.NAME.json of a run folder: the tracker's run, and the last that it was sent."""

    run: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,128}$")]
    place: Place = (-1, 0)


class Event(NamedTuple):
    place: Place
    content: dict[str, float] | Path  # metrics by name, or the file of a picture


class Kind(NamedTuple):
    """How accelerate's tracker of one name starts a run, and resumes it.

    Args:
        start: its arguments, of the run's folder, the identity of the tracker's run, and whether it is resumed
        run: the identity that the tracker has given its run; None if it takes one from here
        project: environment variable with the name of the tracker's project
    """

    start: Callable[[Path, str, bool], dict[str, Any]] = lambda folder, run, resumed: {}
    run: Callable[[Any], str] | None = None
    project: str = ""


KINDS = {
    "aim": Kind(lambda folder, run, resumed: {"run_hash": run if resumed else None}, lambda run: run.hash),
    "clearml": Kind(
        lambda folder, run, resumed: {
            "task_name": os.environ.get("CLEARML_TASK", folder.name),
            "reuse_last_task_id": run if resumed else False,
            "continue_last_task": 0 if resumed else False,  # 0: steps are not counted from the last one
        },
        lambda task: task.id,
    ),
    "comet_ml": Kind(
        lambda folder, run, resumed: {"experiment_key": run, "mode": "get_or_create"}, project="COMET_PROJECT_NAME"
    ),
    "dvclive": Kind(lambda folder, run, resumed: {"dir": str(folder / "dvclive"), "resume": resumed}),
    "mlflow": Kind(
        lambda folder, run, resumed: {"run_id": run if resumed else None, "run_name": folder.name},
        lambda run: run.info.run_id,
    ),
    "swanlab": Kind(
        lambda folder, run, resumed: {"id": run, "resume": "allow", "experiment_name": folder.name},
        project="SWANLAB_PROJ_NAME",
    ),
    "trackio": Kind(lambda folder, run, resumed: {"name": f"{folder.name}-{run[:8]}", "resume": "allow"}),
    "wandb": Kind(
        lambda folder, run, resumed: {
            "id": run,
            "resume": "allow" if resumed else None,
            "name": os.environ.get("WANDB_NAME", folder.name),
            # It makes links, which no run folder may hold.
            "dir": os.environ.get("WANDB_DIR", str(folder.parent)),
        },
        project="WANDB_PROJECT",
    ),
}


class Tracker(threading.Thread):
    """Sends a run's metrics and pictures to one of accelerate's trackers.

    Args:
        name: accelerate's name of the tracker
        folder: the run's folder
        step: the step at which the run starts or resumes; at 0 it becomes a new run of the tracker
        report: takes a message for the user
    """

    def __init__(self, name: str, folder: Path, step: int, report: Report):
        super().__init__(name=f"trackers: {name}", daemon=True)
        self.kind, self.folder = KINDS.get(name, Kind()), folder
        self.settings: dict[str, Any] = {}  # of the run, by name and without credentials
        self.drawn, self._seen = step, -1  # steps of the last picture that exists, and of the last one in _waiting
        self._tracker_name, self._report, self._resumed = name, report, step > 0
        self._path, self._offset = folder / f"tracker.{name}.json", 0  # bytes of metrics.jsonl that are in _waiting
        self._waiting: list[Event] = []
        self._failed: Event | None = None
        self._reported = self._closing = False
        self._news = threading.Event()
        self.consequence = f"The run continues; {folder / 'metrics.jsonl'} has all, and is sent when the run is resumed"

    def notify(self, closing: bool = False) -> None:
        """Have the thread send what is new, and then end if it is closing."""
        self._closing = closing
        self._news.set()

    def run(self) -> None:
        try:
            self._begin()
            while True:
                self._news.wait()
                self._news.clear()
                closing = self._closing
                try:
                    self._send()
                except Exception as error:  # a full disk
                    self._fail(error)
                if closing:
                    break
            self.tracker.finish()
        except BaseException as error:  # whatever a tracker raises
            self._fail(error)

    def _begin(self) -> None:
        """Start the tracker's run or resume it."""
        resumed = self._resumed and self._path.exists()
        self.sent = parse(read(self._path), Sent) if resumed else Sent(uuid4().hex)
        arguments = self.kind.start(self.folder, self.sent.run, resumed)
        PartialState()  # accelerate's log needs it
        made = LOGGER_TYPE_TO_CLASS[self._tracker_name]
        place = [str(self.folder.parent)] if made.requires_logging_directory else []
        project = os.environ.get(self.kind.project, PROJECT)
        self.tracker: GeneralTracker = made(project, *place, **arguments)
        self.tracker.start()
        if self.kind.run is not None:
            self.sent.run = self.kind.run(self.tracker.tracker)
        self.sent.place = self._had = self._has()
        self._write()
        plain = {
            name: value if isinstance(value, str | float | int | None) else str(value)
            for name, value in self.settings.items()
        }
        try:
            self.tracker.store_init_configuration(plain)
        except Exception as error:  # MLflow does not let a setting change
            self._fail(error)

    def _send(self) -> None:
        """Send what is new. What fails is tried once more at the next notification."""
        pictures = self._pictures()  # first: their lines were written before them
        self._waiting = sorted([*self._waiting, *self._lines(), *pictures], key=lambda event: event.place)
        while self._waiting:
            event = self._waiting[0]
            try:
                if event.place > self._had:
                    self._log(event)
            except Exception as error:
                self._fail(error)
                if event is not self._failed:
                    self._failed = event
                    break
            self.sent.place = max(self.sent.place, self._waiting.pop(0).place)
        self._write()

    def _lines(self) -> list[Event]:
        """Return the new lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():  # before the first line
            return []
        with open(path, "rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = [line for text in whole.decode(errors="replace").splitlines() if (line := parse_line(text))]
        return [
            Event(
                (line["step"], SCORES if is_evaluation(line) else TERMS),
                {name: value for name, value in line.items() if "/" in name},
            )
            for line in lines
        ]

    def _pictures(self) -> list[Event]:
        drawn, seen = self.drawn, self._seen
        self._seen = drawn
        found = ((re.fullmatch(r"step_(\d{8,18})", path.stem), path) for path in self.folder.glob("samples/*.png"))
        steps = ((int(match[1]), path) for match, path in found if match)
        return [Event((step, PICTURE), path) for step, path in steps if seen < step <= drawn]

    def _has(self) -> Place:
        """Return the last that the tracker's run has."""
        return self.sent.place

    def _log(self, event: Event) -> None:
        (step, _), content = event
        if not isinstance(content, Path):
            self.tracker.log(content, step=step)
        elif hasattr(self.tracker, "log_images"):
            picture = decode_whole(read(content))
            one = self._tracker_name in ("aim", "clearml")  # the others take lists
            self.tracker.log_images({"samples": picture if one else [picture]}, step=step)
        elif hasattr(self.tracker, "log_artifact"):
            self.tracker.log_artifact(str(content), "samples")

    def _write(self) -> None:
        write_atomically(self._path, msgspec.json.encode(self.sent).decode())

    def _fail(self, error: BaseException) -> None:
        if self._reported:
            return
        self._reported, name = True, self._tracker_name
        reason = str(error).strip().rstrip(".") or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            package = "'vaegan-trainer[wandb]'" if name == "wandb" else name
            reason = f"{reason}: pip install {package}, or remove it from trainer.trackers"
        self._report(f"trainer.trackers: {name} failed: {reason}. {self.consequence}")


class WandB(Tracker):
    """Weights & Biases: steps are a metric of their own, since its own counter takes no score of an earlier step."""

    def _has(self) -> Place:
        run: Any = self.tracker.tracker
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if not run.resumed:  # a new run, or a folder of its own in offline mode: the last one has it all
            return (-1, 0)
        step = int(run.summary.get("step", -1))  # of the last line that arrived before a kill
        return self.sent.place if step == self.sent.place[0] else (step, SCORES)

    def _log(self, event: Event) -> None:
        (step, _), content = event
        if isinstance(content, Path):
            import wandb

            self.tracker.log({"samples": wandb.Image(decode_whole(read(content))), "step": step})
        else:
            self.tracker.log({**content, "step": step})


class Trackers:
    """The trackers of a run, each in a thread of its own.

    Args:
        names: accelerate's names of them
        folder, step, report: as of `Tracker`
    """

    def __init__(self, names: Sequence[str], folder: Path, step: int, report: Report):
        self.report = report
        self.trackers = [
            (WandB if name == "wandb" else Tracker)(name, folder, step, report)
            for name in dict.fromkeys(names)
            if name != TENSORBOARD
        ]

    def start(self, settings: dict[str, Any]) -> None:
        """Start or resume the trackers' runs; `settings` are the run's by name, without credentials."""
        if self.trackers:
            sys.argv[:] = redacted_all(sys.argv)  # trackers record the command line
        for tracker in self.trackers:
            tracker.settings = settings
            tracker.start()

    def notify(self, drawn: int | None = None) -> None:
        """Say that metrics.jsonl has new lines, or that the picture of step `drawn` is there."""
        for tracker in self.trackers:
            tracker.drawn = tracker.drawn if drawn is None else drawn
            tracker.notify()

    def close(self) -> None:
        """Send the rest and end the trackers' runs; what takes longer than CLOSING is left undone."""
        for tracker in self.trackers:
            tracker.notify(closing=True)
        end = time.monotonic() + CLOSING
        for tracker in self.trackers:
            tracker.join(max(0, end - time.monotonic()))
            if tracker.is_alive():
                self.report(f"trainer.{tracker.name} did not end in {CLOSING} s. {tracker.consequence}")
