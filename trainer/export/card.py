"""The model card: README.md, which the Hugging Face hub shows."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.redact import printable
from models import System
from trainer.measures import NAMED, OF_NEIGHBOURS

SCORE = re.compile(r"eval/([a-z_]+?)(\d+)(k?)((?:/[^/]+)*)")  # what was measured, on how many images, by what
DEVIATION = re.compile(r"(eval/[a-z]+)_std(\d.*)")  # of a score over parts of the images
# How Markdown marks up: punctuation, but for what is harmless within a line.
MARKUP = re.compile(r"[!-,:-@\[-`{-~]|(?<=www)\.", re.IGNORECASE)


def plain(text: str) -> str:
    """Return a text, which a stranger may have written, as Markdown that shows it: on one line, without markup."""
    return MARKUP.sub(r"\\\g<0>", printable(text, keep=""))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # it is Markdown, not HTML: every text that others write goes through `plain`
)
TEMPLATES.filters["plain"] = plain


def card(system: System, metadata: dict[str, Any], settings: dict[str, Any], **content: Any) -> str:
    """Return the text of a model card; `content` are the fields of card.md.j2 that are not made here."""
    return TEMPLATES.get_template("card.md.j2").render(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        settings=yaml.safe_dump(_without_paths(settings), sort_keys=False),  # indented, its lines are no markup
        kind=type(system).__name__,
        encodes=system.can("posterior"),
        translates=system.can("translate"),
        draws=system.can("sample") and system.judged_by == "fid",
        latent_shape=system.latent_shape,
        classes=system.classes,
        label=", label" if system.classes else "",
        **content,
    )


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without the places of this machine, which say more of it than of the model."""
    nested = {key: _without_paths(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: value for key, value in nested.items() if not _is_place(value)}


def _is_place(value: Any) -> bool:
    return any(isinstance(one, str) and os.path.isabs(one) for one in (value if isinstance(value, list) else [value]))


def tags(system: System, library: str, license_: str | None) -> dict[str, Any]:
    """Return a card's metadata: what the hub files the model under."""
    if system.can("translate"):
        task = "image-to-image"
    else:
        task = "image-feature-extraction" if type(system).__name__ == "AE" else "unconditional-image-generation"
    metadata = {"license": license_, "library_name": library, "pipeline_tag": task}
    kinds = ["vaegan-trainer", "safetensors", type(system).__name__.lower()]
    return {key: value for key, value in metadata.items() if value} | {"tags": kinds}


def score_rows(scores: dict[str, float], few: bool = False) -> list[dict[str, Any]]:
    """Return the rows of the table of scores, with their deviations; other names than those of scores are left out.

    So are those that a few held-out images flatter.
    """
    deviations = {DEVIATION.sub(r"\1\2", name): value for name, value in scores.items() if DEVIATION.match(name)}
    rows = []
    for name, value in scores.items():
        if (match := SCORE.fullmatch(name)) and not DEVIATION.match(name):
            key, number, thousands, by = match.groups()
            if few and key in OF_NEIGHBOURS:
                continue
            measure, parts = NAMED.get(key), by.strip("/").split("/")
            shown = [value, deviations[name]] if name in deviations else [value]
            head = f"{measure.head} {measure.arrow}" if measure else key.replace("_", " ")
            way = f" ({parts.pop(0)})" if parts[0] in ("a2b", "b2a") else ""  # of a translation
            rows.append(
                {
                    "name": head + way,
                    "value": " ± ".join(measure.text(one) if measure else f"{one:.4g}" for one in shown),
                    "images": f"{int(number) * (1000 if thousands else 1):,}",
                    "extractor": "/".join(parts),
                }
            )
    return rows
