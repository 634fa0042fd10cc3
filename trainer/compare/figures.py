"""The pictures of a comparison: images of each system, curves of its training, and an overview of all."""

from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

import models
from data.loader import read
from data.order import permutation
from trainer.compare.results import COLUMNS, KINDS, Cell, Entry
from trainer.config.settings import DataConfig
from trainer.log.pictures import Panels, grid, interpolation_rows, panels

matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
matplotlib.rcParams |= {"grid.alpha": 0.25, "legend.frameon": False}

ROWS, IMAGES_PER_ROW = 2, 12  # in a panel


@torch.no_grad()
def draw_panels(entry: Entry, data: DataConfig) -> Panels:
    """Return images of an entry's first run, of the same held-out images and prior draws for every system.

    Raises:
        ValueError, DataError, OSError: the checkpoint or the held-out images cannot be read.
    """
    system, shards = models.load(entry.runs[0].folder), data.open(data.tests)[0]
    real = read(shards, permutation(len(shards), 0)[: ROWS * IMAGES_PER_ROW], data.size, data.channels).image
    z = torch.randn(ROWS * IMAGES_PER_ROW, *system.latent_shape, generator=torch.Generator().manual_seed(0))
    return panels(system, [real], z) | {"interpolated": interpolation_rows(system, real, z, ROWS, IMAGES_PER_ROW)}


class Chart(NamedTuple):
    """A curve per system over the training steps: of a score, on a logarithmic axis, or of a loss."""

    title: str
    key: str  # of a measure, or of a term of the log lines
    chance: str = ""  # the term of the log lines that has a loss's chance level


CHARTS = [
    Chart("FID (lower is better)", "fid"),
    Chart("prior gap (lower is better)", "prior_gap"),
    Chart("loss of the binary discriminator (dashed: chance level)", "binary/discriminator_loss", "binary/chance"),
    Chart("loss of the ternary discriminator (dashed: chance level)", "ternary/discriminator_loss", "ternary/chance"),
]


def draw_curves(entries: list[Entry]) -> Figure | None:
    """Return the charts that have any curve, None if there are none. A single score makes no curve."""
    drawn = []
    for chart in CHARTS:
        fewest, curves = 1 if chart.chance else 2, {entry.name: entry.curve(chart.key) for entry in entries}
        if curves := {name: curve for name, curve in curves.items() if len(curve[0]) >= fewest}:
            drawn.append((chart, curves))
    if not drawn:
        return None
    rows = (len(drawn) + 1) // 2
    figure = Figure((12, 3.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    colours = {entry.name: f"C{i}" for i, entry in enumerate(entries)}
    lines: dict[str, Line2D] = {}
    for (chart, curves), axis in zip(drawn, axes, strict=False):
        for name, (steps, values) in curves.items():
            marker = "" if chart.chance else "o"
            (lines[name],) = axis.plot(steps, values, color=colours[name], linewidth=1.4, marker=marker, ms=3)
        axis.set(title=chart.title, xlabel="step")
        if chart.chance:
            _draw_chance(axis, entries, chart.chance)
        else:
            _set_log_scale(axis)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    names = [name for name in colours if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside upper center", ncols=7)
    return figure


def _draw_chance(axis: Axes, entries: list[Entry], key: str) -> None:
    """Draw the loss of a discriminator that cannot tell the kinds apart, once for each level that settings lead to."""
    for level in {round(values[-1], 4) for entry in entries if (values := entry.curve(key)[1])}:
        axis.axhline(level, color="black", linestyle="--", linewidth=1)


def _set_log_scale(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw_overview(rows: dict[str, list[Cell]], pictures: dict[str, Panels]) -> Figure:
    """Return the table of scores above a row of reconstructions and samples of each system that has pictures."""
    heights = [0.5 + 0.34 * (len(rows) + 1), 0.9 * (len(pictures) + 1)]
    figure = Figure((17, sum(heights)), layout="constrained")
    halves = figure.subfigures(2, 1, height_ratios=heights)
    assert isinstance(halves, np.ndarray)
    _draw_table(halves[0].subplots(), rows)
    axes = halves[1].subplots(len(pictures) + 1, 2, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for axis in axes.flat:
        axis.set_axis_off()
    real = next(iter(pictures.values()))["real"]
    for axis, images in zip(axes[0], (real, real[IMAGES_PER_ROW:]), strict=True):
        _draw_strip(axis, images, "real")
    for row, (name, made) in zip(axes[1:], pictures.items(), strict=True):
        for axis, kind in zip(row, KINDS[1:], strict=True):
            if kind in made:
                _draw_strip(axis, made[kind], f"{name}, {kind}")
    return figure


def _draw_strip(axis: Axes, images: torch.Tensor, title: str) -> None:
    strip = np.asarray(grid({"": images[:IMAGES_PER_ROW]}, IMAGES_PER_ROW))[
        20:
    ]  # without the line of the panel's title
    axis.imshow(strip, interpolation="nearest")
    axis.set_title(title, fontsize=8, loc="left", pad=2)


def _draw_table(axis: Axes, rows: dict[str, list[Cell]]) -> None:
    axis.set_axis_off()
    heads = ["", *(f"{measure.head} {measure.arrow}" for measure in COLUMNS)]
    text = [[name, *(cell.mean for cell in cells)] for name, cells in rows.items()]
    table = axis.table(text, colLabels=heads, loc="center", cellLoc="right", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.auto_set_column_width(list(range(len(heads))))
    table.scale(1, 1.4)
    for row, cells in enumerate(rows.values(), 1):
        for column, cell in enumerate(cells, 1):
            if cell.is_best:
                table[row, column].set_text_props(weight="bold")
