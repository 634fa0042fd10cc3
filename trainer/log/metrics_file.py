"""A run's metrics.jsonl: one JSON object per logged step or evaluation."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from models.manifest import check_regular
from trainer import schemas
from trainer.files import write_atomically

Line = dict[str, Any]


def read_metrics(folder: Path) -> list[Line]:
    """Return the lines of a run's metrics.jsonl in file order; a missing file has none.

    Lines that no run writes, or that a kill cut short, are left out.

    Raises:
        ValueError: metrics.jsonl is not a regular file.
    """
    path = folder / "metrics.jsonl"
    check_regular(path)
    texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line for text in texts if (line := parse_line(text)) is not None]


def parse_line(text: str) -> Line | None:
    """Return one line of metrics.jsonl, or None if it does not have the shape that a run writes."""
    try:
        line = json.loads(text)
        schemas.checked(line, schemas.MetricsLine, "a line")
        schemas.checked({name: value for name, value in line.items() if "/" in name}, dict[str, float], "a line")
        if is_evaluation(line):
            schemas.checked(line, schemas.EvaluationLine, "a line")
    except (ValueError, RecursionError):
        return None
    return line


def is_evaluation(line: Line) -> bool:
    """Return whether a line holds the scores of an evaluation; the others hold the means of a log interval."""
    return "extractor" in line


class MetricsWriter:
    """Appends lines to a run's metrics.jsonl, and first removes those that a resumed run will write again.

    While the disk is full, lines wait in memory for room. The thread that saves checkpoints calls it, too.

    Args:
        folder: the run's folder
        step: the step at which the run starts or resumes; later lines are removed
        evaluation_pending: also remove this step's scores, which will be measured again
    """

    def __init__(self, folder: Path, step: int, evaluation_pending: bool):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self._lock = threading.Lock()
        self._waiting = ""  # lines that are not on the disk yet
        self.last_step = 0  # of the last line
        self.names = set[str]()  # of terms and scores of the lines that are kept
        if self.path.exists():
            kept = [line for line in read_metrics(folder) if _is_kept(line, step, evaluation_pending)]
            write_atomically(self.path, "".join(f"{json.dumps(line)}\n" for line in kept))
            self.last_step = kept[-1]["step"] if kept else 0
            self.names = {name for line in kept for name in line if "/" in name}

    def read(self) -> list[Line]:
        """Return all lines that are on the disk."""
        with self._lock:
            return read_metrics(self.folder)

    def append(self, line: Line) -> None:
        """Append a line after those that wait.

        Raises:
            OSError: there is no room; the line waits.
        """
        with self._lock:
            self._waiting += json.dumps(line) + "\n"
            self.last_step = line["step"]
            self._write()

    def flush(self) -> int:
        """Write the lines that wait to the disk, and return the step of the last line.

        Raises:
            OSError: there is no room.
        """
        with self._lock:
            self._write()
            return self.last_step

    def _write(self) -> None:
        with open(self.path, "ab", buffering=0) as file:
            size, rest = file.tell(), self._waiting.encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        self._waiting = ""


def _is_kept(line: Line, step: int, evaluation_pending: bool) -> bool:
    scores = any(name.startswith("eval/") for name in line)
    return line["step"] < step or (line["step"] == step and not (evaluation_pending and scores))
