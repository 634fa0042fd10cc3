"""The page of a comparison, an overview as a picture, and all numbers as JSON."""

import json
from pathlib import Path
from typing import Any

from data.redact import redacted
from trainer.compare.figures import IMAGES_PER_ROW, draw_overview, draw_panels
from trainer.compare.findings import FAILS, HOLDS, Finding, find
from trainer.config.settings import DataConfig
from trainer.log.pictures import grid
from trainer.measures import MEASURES
from trainer.report.page import Frame, Page, as_png
from trainer.report.results import Entry, score_table

ABOUT_IMAGES = (
    "All images are from each system's first seed. Every system gets the same held-out images and the same draws from "
    "the prior. An interpolation is a straight line between the codes of two held-out images. A system without an "
    "encoder interpolates between two draws from the prior instead, along a path whose points are such draws, too."
)


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
    pictures, findings = {entry.name: draw_panels(entry, data) for entry in trained}, find(trained)
    (out / "results.json").write_text(json.dumps(_numbers(entries, findings, failed), indent=1, ensure_ascii=False))
    draw_overview(score_table(entries), pictures).savefig(out / "compare.png", dpi=110)
    page = Page(
        title=f"{_count(len(entries), 'system')} on {Path(redacted(data.trains[0])).parent.name}",
        intro=f"Each system was trained for {settings['trainer']['steps']:,} steps of "
        f"{_count(settings['trainer']['batch_size'], 'image')} of {data.shape[1]} by {data.shape[2]} pixels, "
        f"from {_count(len(settings['compare']['seeds']), 'seed')}.",
        entries=entries,
        images={
            name: [Frame(settings["trainer"]["steps"], f"data:image/png;base64,{as_png(grid(panels, IMAGES_PER_ROW))}")]
            for name, panels in pictures.items()
        },
        about_images=ABOUT_IMAGES,
        findings=findings,
        classes={HOLDS: "holds", FAILS: "fails"},
        failed=failed,
        settings=settings,
    )
    (out / "index.html").write_text(page.render(), encoding="utf-8")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
