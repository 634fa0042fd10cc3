"""The curves of runs, one picture for each chart."""

import math
import re
from collections.abc import Collection
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter

from trainer.log.charts import QUESTIONS, Chart
from trainer.report.results import Entry

matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
matplotlib.rcParams |= {"grid.alpha": 0.25, "legend.frameon": False, "text.parse_math": False}
STYLES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 4.8, 2.6  # inches, of a chart
ROW, LABELS = 0.16, 0.45  # inches: of a row of its legend, and of the text below its axis
LEFT, DIGIT, PAD = 0.58, 0.08, 0.14  # inches: at least left of a chart, of a digit of a label, and around the label
TAGS = 12  # in a chart
SPAN = 2.5  # highest over lowest value, from which an axis may be logarithmic
SMALLEST, LARGEST = 1e-280, 1e280  # between which the values of a logarithmic axis lie
DECADES = 8  # of a logarithmic axis, up to which each has ticks; half as many have three ticks each
MARKED = 30  # points, up to which each is marked


class Curves(NamedTuple):
    """A chart's title and its picture."""

    title: str
    figure: Figure


def colour(index: int) -> str:
    """Return the colour of the entry at an index as CSS has it."""
    return matplotlib.colors.to_hex(f"C{index % 10}")


def draw_curves(entries: list[Entry]) -> dict[str, list[Curves]]:
    """Return by question the charts that have any curve. Colours are entries; of a single one, they are tags."""
    runs = [run for entry in entries for run in entry.runs]
    tags = [*dict.fromkeys(tag for run in runs for tag in run.tags)]
    extractors = list(dict.fromkeys(line["extractor"] for run in runs for line in run.evaluations))
    drawn = {}
    for question, charts in QUESTIONS.items():
        figures = [
            (title, _draw(chart, shown[:TAGS], entries))
            for chart in charts
            for title, shown in _comparable(chart, tags, extractors).items()
        ]
        if found := [
            Curves(title + ", on a logarithmic axis" * (figure.gca().get_yscale() == "log"), figure)
            for title, figure in figures
            if figure.axes
        ]:
            drawn[question] = found
    return drawn


def _comparable(chart: Chart, tags: list[str], extractors: Collection[str]) -> dict[str, list[str]]:
    """Return a chart's tags by title: scores by other extractors, or of other numbers of images, have another axis."""
    groups, counts = dict[tuple[str, int], list[str]](), dict[tuple[str, ...], list[str]]()
    for tag in chart.of(tags):
        extractor = next((one for one in extractors if tag.endswith(f"/{one}")), "")
        score = re.match(r"(eval/[a-z_]+)(\d+k?)(.*)", tag, re.DOTALL)
        measure, count, rest = score.groups() if score else (tag, "", "")
        of = counts.setdefault((measure, rest), [])
        of += [count] * (count not in of)
        groups.setdefault((extractor, of.index(count)), []).append(tag)
    names = [", ".join(tag.removeprefix("eval/") for tag in group) for group in groups.values()]
    titles = [f"{chart.title}: {name}" for name in names] if len(names) > 1 else [chart.title]
    return dict(zip(titles, groups.values(), strict=False))  # a chart without curves has no groups


def _draw(chart: Chart, tags: list[str], entries: list[Entry]) -> Figure:
    """Return a chart, which has no axes if no curve has two points."""
    figure, lines, one = Figure((WIDTH, HEIGHT)), dict[str, Line2D](), len(entries) == 1
    for i, entry in enumerate(entries):
        for k, tag in enumerate(tags):
            steps, values = entry.curve(tag)
            if len(steps) > 1:
                axis = figure.gca()
                # This one is drawn above an equal one, which it would hide.
                hidden = any(np.array_equal(values, line.get_ydata()) for line in axis.lines)
                colour, style = (f"C{k}", "--" if hidden else "-") if one else (f"C{i}", STYLES[k % len(STYLES)])
                marker = "o" if len(steps) <= MARKED else ""
                (line,) = axis.plot(steps, values, style, color=colour, linewidth=1.3, marker=marker, ms=2.5)
                lines.setdefault(tag, line)
    if lines:
        axis.set_xlabel("step")
        axis.yaxis.set_major_formatter(_number)
        points = np.concatenate([line.get_ydata() for line in axis.lines])
        low, high = float(np.min(points)), float(np.max(points))
        if low == high and abs(high) < LARGEST:  # around one value alone, the limits would be arbitrary
            axis.set_ylim(min(1.1 * low, 0), max(1.1 * high, 0) or float(not high))
        elif chart.log and SMALLEST < low < high / SPAN < LARGEST:
            _set_log_scale(axis, low, high)
        _lay_out(figure, lines, one)
    return figure


def _lay_out(figure: Figure, lines: dict[str, Line2D], colours: bool) -> None:
    """Make room for labels and, of several lines, a legend below; Matplotlib's own layouts take twice the time."""
    names = lines if len(lines) > 1 else {}
    height = HEIGHT + ROW * len(names)
    figure.set_size_inches(WIDTH, height)
    figure.subplots_adjust(bottom=(LABELS + ROW * len(names)) / height, right=0.98, top=1 - 0.08 / height)
    low, high = figure.gca().get_ylim()
    digits = max(len(_number(tick)) for tick in figure.gca().get_yticks() if low <= tick <= high)
    figure.subplots_adjust(left=max(LEFT, digits * DIGIT + PAD) / WIDTH)
    handles = [
        Line2D([], [], color=line.get_color() if colours else "black", linestyle=line.get_linestyle())
        for line in names.values()
    ]
    if handles:
        figure.legend(handles, names, loc="lower left", fontsize=9, borderaxespad=0)


def _set_log_scale(axis: Axes, low: float, high: float) -> None:
    """Make an axis logarithmic, from a tick to a tick: 1, 2, 5, 10 and so on, or, of many decades, powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    each = max(1, math.ceil((last - first) / DECADES))
    parts = (1, 2, 5) if last - first <= DECADES / 2 else (1,)
    ticks = [part * 10.0**power for power in range(first, last + each, each) for part in parts]
    start, end = max(tick for tick in ticks if tick <= low), min(tick for tick in ticks if tick >= high)
    axis.set_yscale("log")
    axis.set_ylim(start, end)
    axis.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if start <= tick <= end]))
    axis.yaxis.set_major_formatter(_number)
    axis.yaxis.set_minor_formatter(NullFormatter())


def _number(value: float, _: float = 0) -> str:
    """Return the label of a tick, without a common factor or offset above the axis."""
    return f"{value:.10g}"
