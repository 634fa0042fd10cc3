"""What runs have logged: the values of each run and of each entry of a page."""

import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

from data.dataset import FEW
from data.files import read
from data.redact import redacted_all
from models.manifest import checkpoints
from trainer.checkpoint.writer import step_of
from trainer.config.resume import flatten, saved_settings
from trainer.log.charts import KINDS
from trainer.log.metrics_file import Line, is_evaluation, read_metrics
from trainer.measures import COLUMNS, OF_NEIGHBOURS, Measure
from trainer.run_folder import RunStatus

WORKLOAD = ("data.size", "data.channels", "system.networks")  # settings without which no speeds compare


@dataclass(frozen=True)
class Run:
    """A run, as its folder has it; others may have written the folder, so nothing in it is trusted."""

    folder: Path

    @cached_property
    def lines(self) -> list[Line]:
        return read_metrics(self.folder)

    @cached_property
    def evaluations(self) -> list[Line]:
        return [line for line in self.lines if is_evaluation(line)]

    @cached_property
    def logs(self) -> list[Line]:
        return [line for line in self.lines if "speed/images_per_second" in line]

    @cached_property
    def scores(self) -> dict[str, float]:
        """The last evaluation's values, of two directions their means, and the training speed, by measure."""
        last = self.evaluations[-1] if self.evaluations else {}
        shown = {one.key: [last[tag] for tag in one.tags(last) if not self.hides(tag)] for one in COLUMNS}
        found = {key: statistics.mean(values) for key, values in shown.items() if values}
        speed = self.median("speed/images_per_second")
        return found if speed is None else found | {"images_per_second": speed}

    @cached_property
    def tags(self) -> list[str]:
        """What its lines have, without what is hidden."""
        return [tag for tag in dict.fromkeys(tag for line in self.lines for tag in line) if not self.hides(tag)]

    def hides(self, tag: str) -> bool:
        """Return whether a score is of neighbours among too few held-out images."""
        few = any(line.get("held_out_images", FEW) < FEW for line in self.evaluations[-1:])
        measure = Measure.of(tag)
        return few and measure is not None and measure.key in OF_NEIGHBOURS

    def measured(self, measure: Measure) -> tuple[str, ...]:
        """Return what must be the same of two scores, or of two speeds, that are compared."""
        last = self.evaluations[-1] if self.evaluations else {}
        if not (tags := measure.tags(last)):
            settings = flatten(self.settings)
            return tuple(f"{name} {value}" for name, value in settings.items() if name.startswith(WORKLOAD))
        # The names tell the number of images, and the extractor if there is one.
        by = [last["extractor_sha256"]] if tags[0].endswith(f"/{last['extractor']}") else []
        return (*tags, last["held_out"], *as_read(last), *by)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of config.yaml as plain data without credentials; empty without the file.

        Raises:
            ValueError: the file is damaged.
        """
        return redacted_all(saved_settings(self.folder))

    @property
    def step(self) -> int:
        """The last step that has left something: a line of the log, or a checkpoint where the run stopped."""
        saved = checkpoints(self.folder / "checkpoints")
        return max([line["step"] for line in self.lines] + [step_of(path) for path in saved], default=0)

    @property
    def status(self) -> str:
        """One of trainer.run_folder's, or "" if the folder has none."""
        path = self.folder / "state"
        found = read(path, 100).decode(errors="replace").strip() if path.exists() else ""
        return found if found in get_args(RunStatus) else ""

    @property
    def seed(self) -> int | None:
        return flatten(self.settings).get("trainer.seed")

    def median(self, term: str) -> float | None:
        """Return the median of a term of the log lines, None if there is none."""
        values = [line[term] for line in self.logs if term in line]
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class Entry:
    """A column of the page: its name, its system's class and settings, and its runs, which differ in their seeds."""

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def values(self, key: str) -> list[float]:
        """Return a measure's values, one per seed; empty if the system cannot have it."""
        return [run.scores[key] for run in self.runs if key in run.scores]

    def mean(self, key: str) -> float | None:
        """Return the mean of a measure over the seeds, None if the system cannot have it."""
        values = self.values(key)
        return statistics.mean(values) if values else None

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Return the steps and the means over the runs of a score or a term, where all runs have it."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for line in run.lines if tag in run.tags else ():
                if tag in line:
                    found.setdefault(line["step"], []).append(line[tag])
        steps = sorted(step for step, values in found.items() if len(values) == len(self.runs))
        return steps, [statistics.mean(found[step]) for step in steps]

    def confusions(self) -> list[tuple[int, list[list[float]]]]:
        """Return the steps and confusion matrices of the first and the last log line.

        Rows are the kinds of images, columns the shares that a ternary discriminator classified as each kind. The list
        is empty without such a discriminator.
        """
        logs = [[line for line in run.logs if "ternary/named/real/real" in line] for run in self.runs]
        if not logs or not all(logs):
            return []
        ends = [lines[0] for lines in logs], [lines[-1] for lines in logs]
        return [
            (lines[0]["step"], [[_mean(lines, f"ternary/named/{kind}/{name}") for name in KINDS] for kind in KINDS])
            for lines in ends
        ]


def _mean(lines: list[Line], term: str) -> float:
    return statistics.mean(line[term] for line in lines)


class Cell(NamedTuple):
    """A cell of the table of scores: the mean, the range over several seeds, and whether the mean is the best."""

    mean: str
    range: str
    is_best: bool


def score_table(entries: list[Entry]) -> dict[str, list[Cell]]:
    """Return a row of cells, one per measure, by the name of each system."""
    leaders = {measure.key: best(entries, measure) for measure in COLUMNS}

    def cell(entry: Entry, measure: Measure) -> Cell:
        values = entry.values(measure.key)
        shown = measure.range(values) if len(values) > 1 else ""
        return Cell(measure.text(entry.mean(measure.key)), shown, entry.name in leaders[measure.key])

    return {entry.name: [cell(entry, measure) for measure in COLUMNS] for entry in entries}


def best(entries: list[Entry], measure: Measure) -> set[str]:
    """Return the systems whose mean, rounded as it is shown, is the best.

    It is none if all means look equal, or if the scores were not measured alike.
    """
    means = {entry.name: mean for entry in entries if (mean := entry.mean(measure.key)) is not None}
    texts = {name: measure.text(mean) for name, mean in means.items()}
    ways = {run.measured(measure) for entry in entries for run in entry.runs if measure.key in run.scores}
    if len({*texts.values()}) < 2 or len(ways) > 1:
        return set()
    loss = {"lower": lambda x: x, "higher": lambda x: -x, "near 1": lambda x: abs(x - 1)}[measure.better]
    top = min(means, key=lambda name: loss(means[name]))
    return {name for name, text in texts.items() if text == texts[top]}


def as_read(evaluation: Line) -> tuple[str, ...]:
    """Return as what an evaluation read the held-out images, which a checksum of their files does not tell."""
    return tuple(str(evaluation.get(name)) for name in ("image_size", "channels", "bits"))


def differently_scored(entries: list[Entry]) -> list[Path]:
    """Return a run of each kind if last evaluations had other extractor weights, images or numbers of samples."""
    folders: dict[tuple[Any, ...], Path] = {}
    for run in (run for entry in entries for run in entry.runs if run.evaluations):
        last = run.evaluations[-1]
        how = (last["extractor_sha256"], last["held_out"], *as_read(last), str(last.get("num")))
        folders.setdefault(how, run.folder)
    return [*folders.values()] if len(folders) > 1 else []
