"""The pictures of a comparison: images of each system, and an overview of all."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import models
from data.loader import read
from data.order import permutation
from trainer.classes import in_turn
from trainer.config.settings import DataConfig
from trainer.log.charts import KINDS
from trainer.log.pictures import GridInputs, Panels, grid, interpolation_rows, panels
from trainer.measures import COLUMNS, MISSING
from trainer.report.results import Cell, Entry

ROWS, IMAGES_PER_ROW = 2, 12  # in a panel


@torch.no_grad()
def draw_panels(entry: Entry, data: DataConfig) -> Panels:
    """Return images of an entry's first run, of the same held-out images and prior draws for every system.

    Raises:
        ValueError, DataError, OSError: the checkpoint or the held-out images cannot be read.
    """
    system, shards = models.load(entry.runs[0].folder), data.open(data.tests)[0]
    num = ROWS * IMAGES_PER_ROW
    real, label, *_ = read(shards, permutation(len(shards), 0)[:num], *data.format)
    z = torch.randn(num, *system.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = GridInputs([real], label, z, in_turn(system, torch.arange(num)))
    return panels(system, inputs) | {"interpolated": interpolation_rows(system, real, z, ROWS, IMAGES_PER_ROW)}


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
    shown = [i for i in range(len(COLUMNS)) if any(cells[i].mean != MISSING for cells in rows.values())]
    heads = ["", *(f"{COLUMNS[i].head} {COLUMNS[i].arrow}" for i in shown)]
    text = [[name, *(cells[i].mean for i in shown)] for name, cells in rows.items()]
    table = axis.table(text, colLabels=heads, loc="center", cellLoc="right", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.auto_set_column_width(list(range(len(heads))))
    table.scale(1, 1.4)
    for row, cells in enumerate(rows.values(), 1):
        for column, i in enumerate(shown, 1):
            if cells[i].is_best:
                table[row, column].set_text_props(weight="bold")
