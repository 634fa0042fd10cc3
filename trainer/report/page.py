"""The page about runs, in one file. Texts of runs are escaped, and the browser runs no script but the page's own."""

import base64
import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from data.dataset import FEW
from data.files import read
from data.images import decode_whole, header
from trainer.config.resume import flatten
from trainer.log.charts import KINDS
from trainer.log.health import Verdict, few_images, unjudged, verdicts
from trainer.measures import COLUMNS, MISSING
from trainer.report.curves import colour, draw_curves
from trainer.report.results import Entry, Run, differently_scored, score_table
from trainer.run_folder import some_grids

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
SCRIPT = Path(__file__).with_name("slider.js").read_text()
PNG = b"\x89PNG"
LARGEST, PHOTOS = 1 << 24, 1 << 20  # bytes of a sample grid: at most, and from which on it is shown as JPEG
HIDDEN = ("trainer.run_dir", "data.workers")  # differ between runs, and say little about them
MACHINE = {  # what to show: term of the log lines, and its format
    "images per second": ("speed/images_per_second", "{:,.0f}"),
    "waiting for data": ("speed/data_wait", "{:.0%}"),
    "TFLOPS of a process": ("speed/tflops", "{:.3g}"),
    "of the GPU's peak (MFU)": ("speed/mfu", "{:.0%}"),
    "peak memory of the main process": ("speed/host_gb", "{:.1f} GB"),
    "peak memory of its GPU": ("speed/gpu_gb", "{:.1f} GB"),
}


class Frame(NamedTuple):
    """A picture of a run's images at a step, as a data URL."""

    step: int
    url: str


@dataclass
class Page:
    """What a page shows.

    Args:
        title, intro: what it is about
        entries: its columns, of which at least one has a run
        images: pictures of each entry by its name, in the order of their steps
        about_images: what they are
        findings: claims about the entries, as `trainer.compare.findings` makes them
        classes: CSS class of a verdict
        failed: what went wrong, by the name of each failed run
        settings: those to show in full, as plain data
    """

    title: str
    intro: str
    entries: list[Entry]
    images: dict[str, list[Frame]]
    about_images: str
    findings: Sequence[Any] = ()
    classes: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """Return the page as HTML.

        Raises:
            ValueError: a run's config.yaml is damaged.
        """
        trained = [entry for entry in self.entries if entry.runs]
        return TEMPLATES.get_template("page.html.j2").render(
            page=self,
            trained=trained,
            seeds=max(len(entry.runs) for entry in trained),
            script=Markup(SCRIPT),
            script_digest=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
            settings_yaml=yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True),
            health=health(trained),
            unjudged=unjudged,
            scored=any(run.evaluations for entry in trained for run in entry.runs),
            differently_scored=differently_scored(trained),
            few=few_held_out(trained),
            measures=COLUMNS,
            missing=MISSING,
            rows=score_table(trained),
            colours={entry.name: colour(i) for i, entry in enumerate(trained)},
            steps=sorted({frame.step for frames in self.images.values() for frame in frames}),
            curves={
                question: [(curves.title, as_png(curves.figure)) for curves in charts]
                for question, charts in draw_curves(trained).items()
            },
            kinds=KINDS,
            confusions={entry.name: found for entry in trained if (found := entry.confusions())},
            machine=machine(trained),
            differences=setting_differences(trained) if len(trained) > 1 else {},
        )


def report(entries: list[Entry]) -> str:
    """Return the page about runs, one in each entry; raises what `Page.render` does, and OSError."""
    runs = {entry.name: entry.runs[0] for entry in entries}
    title = next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs"
    images = {name: grids(run) for name, run in runs.items()}
    about = "Rows and columns are the same images and the same draws from the prior at every step."
    intro = " ".join(
        f"{name}: {progress(run)}." if len(runs) > 1 else f"{progress(run)}." for name, run in runs.items()
    )
    settings = {name: run.settings for name, run in runs.items()}
    return Page(title, intro, entries, images, about, settings=settings).render()


def progress(run: Run) -> str:
    """Return what was trained, how far it is, and its state."""
    settings, step = flatten(run.settings), run.step
    of = f" of {steps:,}" if isinstance(steps := settings.get("trainer.steps"), int) else ""
    system = str(settings.get("system.class_path", "")).rpartition(".")[2]
    return ", ".join(filter(None, [system, f"step {step:,}{of}", run.status]))


def grids(run: Run) -> list[Frame]:
    """Return sample grids of a run, at most FRAMES, evenly over its steps; files that are none are left out."""
    found = sorted(path for path in run.folder.glob("samples/step_*.png") if path.stem[5:].isdecimal())
    frames = []
    for path in some_grids(found):
        with suppress(OSError, ValueError):
            header(content := read(path, LARGEST))
            if content.startswith(PNG):
                frames.append(Frame(int(path.stem[5:]), data_url(content)))
    return frames


def health(entries: list[Entry]) -> dict[str, list[Verdict]]:
    """Return the verdicts on each run by its name, symptoms first."""
    found = {}
    for entry in entries:
        for run in entry.runs:
            name = entry.name if len(entry.runs) == 1 else f"{entry.name}, seed {run.seed}"
            judged = verdicts(run.lines, run.settings, run.status)
            found[name] = sorted(judged, key=lambda verdict: not verdict.found)
    return found


def few_held_out(entries: list[Entry]) -> dict[str, list[str]]:
    """Return the entries whose first run was scored by few held-out images, by a warning of it."""
    found = dict[str, list[str]]()
    for entry in entries:
        evaluations = entry.runs[0].evaluations
        if evaluations and (number := evaluations[-1]["held_out_images"]) < FEW:
            found.setdefault(few_images(number), []).append(entry.name)
    return found


def machine(entries: list[Entry]) -> dict[str, list[str]]:
    """Return by what is shown, a text for each entry: the median over its first run's log lines; without empty rows."""
    rows = {}
    for title, (term, form) in MACHINE.items():
        values = [entry.runs[0].median(term) for entry in entries]
        if any(value is not None for value in values):
            rows[title] = [MISSING if value is None else form.format(value) for value in values]
    return rows


def setting_differences(entries: list[Entry]) -> dict[str, list[Any]]:
    """Return the settings in which the entries' first runs differ: by name, the value of each.

    A setting that some lack is among them only if all have the same system, or those that have it differ.
    """
    flat = [flatten(entry.runs[0].settings) for entry in entries]
    same = len({settings.get("system.class_path") for settings in flat}) == 1
    rows = {}
    for name in dict.fromkeys(name for settings in flat for name in settings if name not in HIDDEN):
        values = [settings[name] for settings in flat if name in settings]
        if any(value != values[0] for value in values) or (same and len(values) < len(flat)):
            rows[name] = [settings.get(name, MISSING) for settings in flat]
    return rows


def data_url(png: bytes) -> str:
    """Return a PNG file as a data URL; a large one becomes a JPEG, which has about a tenth of its bytes."""
    kind, content = "png", io.BytesIO(png)
    if len(png) > PHOTOS:
        kind, content = "jpeg", io.BytesIO()
        decode_whole(png).convert("RGB").save(content, "JPEG", quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def as_png(picture: Image.Image | Figure) -> str:
    """Encode a picture as PNG in base64, for a data URL."""
    content = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(content, dpi=120)
    else:
        picture.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()
