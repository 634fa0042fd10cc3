"""A comparison to look at: one page that needs nothing else, an overview as a picture, and all numbers."""

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

import models
from data.loader import read
from data.order import permutation
from trainer.config.settings import DataConfig
from trainer.log.pictures import Panels, grid, interpolation_rows, panels
from trainer.results import HOLDS, MEASURES, TEXTS, Entry, Finding, best, findings, number

matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
matplotlib.rcParams |= {"grid.alpha": 0.25, "legend.frameon": False}

ROWS, COLUMNS = 2, 12  # of pictures in a panel
DASH = "\N{EN DASH}"
KINDS = ("real", "reconstructed", "generated")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 1320px; margin: 2em auto;
       padding: 0 1.5em; }
h1 { font-size: 1.7em; margin-bottom: 0; }
h2 { font-size: 1.25em; margin: 2em 0 .6em; border-bottom: 1px solid #dde2e8; }
h3 { font-size: 1em; margin: 0 0 .3em; }
p, dl { max-width: 62em; } .soft, small { color: #657080; }
table { border-collapse: collapse; } th, td { padding: .35em .6em; text-align: right; white-space: nowrap; }
table.scores { width: 100%; font-size: .86em; } table.scores th { white-space: normal; vertical-align: bottom; }
table.scores tr { border-bottom: 1px solid #e6eaef; } th:first-child, td:first-child { text-align: left; }
td small { display: block; font-size: .82em; } td.best { font-weight: 700; } td.best small { font-weight: 400; }
dt { float: left; clear: left; width: 12em; font-weight: 600; } dd { margin-left: 12.5em; }
.verdict { border-radius: .8em; padding: .05em .6em; font-size: .85em; background: #eceff3; white-space: nowrap; }
.verdict.holds { background: #d8f0dd; } .verdict.fails { background: #fbdcd7; }
.finding { margin: .7em 0; } .finding ul { margin: .1em 0; } .failed { background: #fbdcd7; padding: .5em 1em; }
.systems { display: grid; grid-template-columns: repeat(auto-fill, minmax(560px, 1fr)); gap: 1.6em; }
.systems figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
.matrices { display: flex; flex-wrap: wrap; gap: 1.5em 3em; } .matrices table { font-size: .86em; }
.pair { display: flex; gap: 1.5em; } .pair th, .pair td { min-width: 6.2em; }
caption { text-align: left; color: #657080; } details pre { font-size: .85em; }
@media print { body { margin: 0; } }
"""


def report(entries: list[Entry], failed: dict[str, str], data: DataConfig, settings: dict[str, Any], out: Path) -> None:
    """Write index.html, compare.png and results.json into `out`.

    Raises:
        ValueError, DataError, OSError: a checkpoint or the held-out images cannot be read, or nothing can be written.
    """
    trained = [entry for entry in entries if entry.runs]
    pictures = {entry.name: _pictures(entry, data) for entry in trained}
    found = findings(trained)
    (out / "results.json").write_text(json.dumps(_numbers(entries, found, failed), indent=1, ensure_ascii=False))
    _overview(entries, pictures).savefig(out / "compare.png", dpi=110)
    page = "\n".join(
        [
            *_head(entries, failed, data, settings),
            *_section("What the scores say", _findings(found, entries)),
            *_section("Scores", [_table(entries), _legend()]),
            *_section("Pictures", _figures(entries, pictures)),
            *_section("Training", _curves(trained)),
            *_section("What the ternary discriminators see", _matrices(trained)),
            *_section("Settings", [f"<details><summary>All runs</summary><pre>{_yaml(settings)}</pre></details>"]),
            "</body></html>",
        ]
    )
    (out / "index.html").write_text(page, encoding="utf-8")


def _numbers(entries: list[Entry], found: list[Finding], failed: dict[str, str]) -> dict[str, Any]:
    return {
        "runs": [
            {"system": entry.name, "seed": run.seed, "step": run.evaluations[-1]["step"], **run.scores}
            for entry in entries
            for run in entry.runs
        ],
        "means": {
            entry.name: {m.key: mean for m in MEASURES if (mean := entry.mean(m.key)) is not None} for entry in entries
        },
        "findings": [
            {"claim": finding.claim, "verdict": finding.verdict, "parts": [part._asdict() for part in finding.parts]}
            for finding in found
        ],
        "failed": failed,
    }


# ---- the page's words and tables


def _head(entries: list[Entry], failed: dict[str, str], data: DataConfig, settings: dict[str, Any]) -> list[str]:
    last = next(run for entry in entries for run in entry.runs).evaluations[-1]
    seeds, trainer = settings["compare"]["seeds"], settings["trainer"]
    title = f"{len(entries)} systems on {Path(data.trains[0]).parent.name}"
    head = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Each trained for {trainer["steps"]:,} steps of {trainer["batch_size"]} images of '
        f"{data.size} by {data.size} pixels, from {_count(len(seeds), 'seed')}; scored with "
        f"{settings['evaluate']['num']:,} samples and {last['held_out_images']:,} held-out images, by features of "
        f"{escape(last['extractor'])}.</p>",
    ]
    if failed:
        items = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in failed.items())
        head.append(f'<div class="failed">{_count(len(failed), "run")} failed and do not count:<ul>{items}</ul></div>')
    return head


def _section(title: str, parts: list[str]) -> list[str]:
    return [f"<h2>{title}</h2>", *parts] if parts else []


def _findings(found: list[Finding], entries: list[Entry]) -> list[str]:
    blocks = []
    for finding in found:
        alone = len(finding.parts) == 1
        parts = "".join(
            f"<li>{escape(part.about)}: {escape(part.figures)}{'' if alone else f': {escape(part.verdict)}'}</li>"
            for part in finding.parts
        )
        blocks.append(
            f'<div class="finding"><b>{escape(finding.claim)}</b> {_verdict(finding.verdict)}<ul>{parts}</ul></div>'
        )
    least = min((len(entry.runs) for entry in entries if entry.runs), default=0)
    if blocks:
        few = " With fewer than three, that says little." if least < 3 else ""
        blocks.append(
            '<p class="soft">A claim holds where every seed of the one system lies on its side of every seed of the '
            f"other; figures are means, least and greatest over the seeds.{few}</p>"
        )
    return blocks


def _verdict(verdict: str) -> str:
    kind = {HOLDS: " holds", "does not hold": " fails"}.get(verdict, "")
    return f'<span class="verdict{kind}">{escape(verdict)}</span>'


def _table(entries: list[Entry]) -> str:
    heads = "".join(f"<th>{escape(measure.head)} {measure.arrow}</th>" for measure in MEASURES)
    tops = {measure.key: best(entries, measure) for measure in MEASURES}
    rows = []
    for entry in entries:
        cells = []
        for measure in MEASURES:
            values, mean = entry.values(measure.key), entry.mean(measure.key)
            if mean is None:
                cells.append(f"<td>{DASH}</td>")
                continue
            low, high = number(min(values), measure.digits), number(max(values), measure.digits)
            around = f"<small>{low} to {high}</small>" if len(values) > 1 else ""
            bold = ' class="best"' if entry.name in tops[measure.key] else ""
            cells.append(f"<td{bold}>{number(mean, measure.digits)}{around}</td>")
        rows.append(f"<tr><td>{escape(entry.name)}</td>{''.join(cells)}</tr>")
    return f'<table class="scores"><tr><th></th>{heads}</tr>{"".join(rows)}</table>'


def _legend() -> str:
    items = "".join(f"<dt>{escape(measure.head)}</dt><dd>{escape(TEXTS[measure.key])}</dd>" for measure in MEASURES)
    return (
        '<p class="soft">The mean over the seeds, and the least and greatest below it; the best mean in bold; ↑ higher '
        "is better, ↓ lower, → 1 nearer to one; "
        f"{DASH} where a system cannot have it.</p>"
        f"<dl>{items}</dl>"
    )


def _matrices(entries: list[Entry]) -> list[str]:
    blocks = []
    for entry in entries:
        early, late = entry.confusion(0), entry.confusion(-1)
        if early and late:
            tables = _matrix(f"up to step {early[0]:,}", early[1]) + _matrix(f"up to step {late[0]:,}", late[1])
            blocks.append(f'<div><h3>{escape(entry.name)}</h3><div class="pair">{tables}</div></div>')
    if not blocks:
        return []
    return [
        "<p>The share of each kind of image (rows) that the discriminator gives each name (columns), in the first log "
        "line's steps and in the last one's. A discriminator that knows its images has ones on the diagonal. Where it "
        "cannot tell the kinds apart, all rows are alike, and it is right by chance: a third of the time.</p>",
        f'<div class="matrices">{"".join(blocks)}</div>',
    ]


def _matrix(caption: str, shares: list[list[float]]) -> str:
    rows = "".join(
        f"<tr><td>{kind}</td>"
        + "".join(f'<td style="background: rgba(46, 110, 200, {share * 0.6:.2f})">{share:.2f}</td>' for share in row)
        + "</tr>"
        for kind, row in zip(KINDS, shares, strict=True)
    )
    heads = "".join(f"<th>{kind}</th>" for kind in KINDS)
    return f"<table><caption>{caption}</caption><tr><th>is, named</th>{heads}</tr>{rows}</table>"


def _yaml(settings: dict[str, Any]) -> str:
    return escape(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ---- the page's pictures


@torch.no_grad()
def _pictures(entry: Entry, data: DataConfig) -> Panels:
    """What a system makes of the same held-out images and prior draws as the others."""
    system, shards = models.load(entry.runs[0].folder), data.open(data.tests)[0]
    real = read(shards, permutation(len(shards), 0)[: ROWS * COLUMNS], data.size, data.channels).image
    z = torch.randn(ROWS * COLUMNS, *system.latent_shape, generator=torch.Generator().manual_seed(0))
    return panels(system, [real], z) | {"interpolated": interpolation_rows(system, real, z, ROWS, COLUMNS)}


def _figures(entries: list[Entry], pictures: dict[str, Panels]) -> list[str]:
    figures = "".join(
        f"<figure><h3>{escape(entry.name)}</h3>{_image(grid(pictures[entry.name], COLUMNS), entry.name)}</figure>"
        for entry in entries
        if entry.name in pictures
    )
    return [
        "<p>Of each system's first seed: the same held-out images and the same draws from the prior for all. "
        "Interpolations go straight between the codes of two held-out images, or, without an encoder, along the sphere "
        "between two draws.</p>",
        f'<div class="systems">{figures}</div>',
    ]


def _curves(entries: list[Entry]) -> list[str]:
    """FID and prior gap by step where there is more than one evaluation; each kind of judge's loss beside chance."""
    colours = {entry.name: f"C{i}" for i, entry in enumerate(entries)}
    drawn: list[tuple[str, str, bool]] = [
        *(("FID, lower is better", "fid", True), ("prior gap, lower is better", "prior_gap", True)),
        *((f"{mode} judge's loss; dashed: chance", f"{mode}/judge", False) for mode in ("binary", "ternary")),
    ]
    least = {"fid": 2, "prior_gap": 2}
    shown = [
        (title, key, log, lines)
        for title, key, log in drawn
        if (lines := {e.name: c for e in entries if len((c := e.curve(key))[0]) >= least.get(key, 1)})
    ]
    if not shown:
        return []
    rows = (len(shown) + 1) // 2
    figure = Figure((12, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    named: dict[str, Line2D] = {}
    for (title, key, log, lines), axis in zip(shown, axes, strict=False):
        for name, (steps, values) in lines.items():
            axis.plot(steps, values, color=colours[name], label=name, linewidth=1.4, marker="o" if log else "", ms=3)
        if not log:
            _chance(axis, entries, key.replace("judge", "chance"))
        axis.set(title=title, xlabel="step", yscale="log" if log else "linear")
        if log:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        named |= dict(zip(lines, axis.lines, strict=False))
    for axis in list(axes)[len(shown) :]:
        axis.set_visible(False)
    order = [name for name in colours if name in named]
    figure.legend([named[name] for name in order], order, loc="outside upper center", ncols=7)
    return ["<p>The mean over the seeds.</p>", _image(_drawn(figure), "curves over steps")]


def _chance(axis: Axes, entries: list[Entry], key: str) -> None:
    """What the judge's loss cannot fall below where all kinds look alike; several where settings differ."""
    for level in {round(values[-1], 4) for entry in entries if (values := entry.curve(key)[1])}:
        axis.axhline(level, color="black", linestyle="--", linewidth=1)


def _overview(entries: list[Entry], pictures: dict[str, Panels]) -> Figure:
    """The table, and below it what each system reconstructs and generates."""
    made = [entry for entry in entries if entry.name in pictures]
    heights = [0.5 + 0.34 * (len(entries) + 1), 0.9 * (len(made) + 1)]
    figure = Figure((17, sum(heights)), layout="constrained")
    halves = figure.subfigures(2, 1, height_ratios=heights)
    assert isinstance(halves, np.ndarray)
    _draw_table(halves[0].subplots(), entries)
    axes = halves[1].subplots(len(made) + 1, 2, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for axis in axes.flat:
        axis.set_axis_off()
    real = pictures[made[0].name]["real"]
    for axis, images in zip(axes[0], (real, real[COLUMNS:]), strict=True):
        _draw_strip(axis, images, "real")
    for row, entry in zip(axes[1:], made, strict=True):
        for axis, title in zip(row, KINDS[1:], strict=True):
            if title in pictures[entry.name]:
                _draw_strip(axis, pictures[entry.name][title], f"{entry.name}, {title}")
    return figure


def _draw_strip(axis: Axes, images: torch.Tensor, title: str) -> None:
    strip = np.asarray(grid({"": images[:COLUMNS]}, COLUMNS))[20:]  # without the title's line
    axis.imshow(strip, interpolation="nearest")
    axis.set_title(title, fontsize=8, loc="left", pad=2)


def _draw_table(axis: Axes, entries: list[Entry]) -> None:
    axis.set_axis_off()
    text, bold = [], []
    for row, entry in enumerate(entries, 1):
        cells = [entry.name]
        for column, measure in enumerate(MEASURES, 1):
            mean = entry.mean(measure.key)
            cells.append(DASH if mean is None else number(mean, measure.digits))
            if entry.name in best(entries, measure):
                bold.append((row, column))
        text.append(cells)
    heads = ["", *(f"{measure.head} {measure.arrow}" for measure in MEASURES)]
    table = axis.table(text, colLabels=heads, loc="center", cellLoc="right", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.auto_set_column_width(list(range(len(heads))))
    table.scale(1, 1.4)
    for place in bold:
        table[place].set_text_props(weight="bold")


def _drawn(figure: Figure) -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    return Image.open(content)


def _image(image: Image.Image, name: str) -> str:
    content = io.BytesIO()
    image.convert("RGB").save(content, "PNG", optimize=True)
    text = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{text}">'
