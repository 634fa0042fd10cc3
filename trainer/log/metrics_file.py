"""Reading of a run's metrics.jsonl: one JSON object per logged step or evaluation."""

import json
from pathlib import Path
from typing import Any

from models.manifest import check_regular
from trainer import schemas

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
