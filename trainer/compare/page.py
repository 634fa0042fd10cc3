"""The page of a comparison, which needs no other file, an overview as a picture, and all numbers as JSON."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from data.redact import redacted
from trainer.compare.figures import IMAGES_PER_ROW, draw_curves, draw_overview, draw_panels
from trainer.compare.findings import FAILS, HOLDS, Finding, find
from trainer.compare.results import COLUMNS, KINDS, MEASURES, MISSING, Entry, score_table
from trainer.config.settings import DataConfig
from trainer.log.pictures import grid

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)


def write_page(
    entries: list[Entry], failed: dict[str, str], data: DataConfig, settings: dict[str, Any], out: Path
) -> None:
    """Write index.html, compare.png and results.json.

    Args:
        entries: all systems, of which at least one has a run
        failed: what went wrong, by the name of each failed run
        data: where the held-out images to show are
        settings: those to show, as plain data
        out: folder to write into

    Raises:
        ValueError, DataError, OSError: a checkpoint or the held-out images cannot be read, or nothing can be written.
    """
    trained = [entry for entry in entries if entry.runs]
    pictures = {entry.name: draw_panels(entry, data) for entry in trained}
    findings, rows, curves = find(trained), score_table(entries), draw_curves(trained)
    (out / "results.json").write_text(json.dumps(_numbers(entries, findings, failed), indent=1, ensure_ascii=False))
    draw_overview(rows, pictures).savefig(out / "compare.png", dpi=110)
    page = TEMPLATES.get_template("page.html.j2").render(
        entries=entries,
        trained=trained,
        failed=failed,
        settings=settings,
        settings_yaml=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        data_set=Path(redacted(data.trains[0])).parent.name,
        size=data.size,
        last=trained[0].runs[0].evaluations[-1],
        findings=findings,
        classes={HOLDS: "holds", FAILS: "fails"},
        measures=COLUMNS,
        missing=MISSING,
        rows=rows,
        images={name: _base64(grid(panels, IMAGES_PER_ROW)) for name, panels in pictures.items()},
        curves=curves and _base64(curves),
        kinds=KINDS,
        confusions={entry.name: found for entry in trained if (found := entry.confusions())},
    )
    (out / "index.html").write_text(page, encoding="utf-8")


def _numbers(entries: list[Entry], findings: list[Finding], failed: dict[str, str]) -> dict[str, Any]:
    return {
        "runs": [
            {"system": entry.name, "seed": run.seed, "step": run.evaluations[-1]["step"], **run.scores}
            for entry in entries
            for run in entry.runs
        ],
        "means": {
            entry.name: {key: mean for key in MEASURES if (mean := entry.mean(key)) is not None} for entry in entries
        },
        "findings": [
            {"claim": finding.claim, "verdict": finding.verdict, "parts": [part._asdict() for part in finding.parts]}
            for finding in findings
        ],
        "failed": failed,
    }


def _base64(picture: Image.Image | Figure) -> str:
    """Encode a picture as PNG, for a data URL."""
    content = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(content, dpi=140)
    else:
        picture.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()
