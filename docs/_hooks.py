"""MkDocs' hooks: pages from elsewhere in the repository, the reference of all settings, formulas without scripts."""

import os
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import models
from trainer.config.settings import DataConfig, EvaluateConfig, TrainerConfig
from trainer.config.words import LINKED, type_in_words, value_in_words

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "launch/README.md": "clusters.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
SECTIONS = {"data": DataConfig, "trainer": TrainerConfig, "evaluate": EvaluateConfig}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)]*)?\)|(!\[[^\]]*\]\()([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> None:
    """List the pages of settings in the navigation."""
    (entry,) = (entry for entry in config.nav or [] if isinstance(entry, dict) and "Settings" in entry)
    entry["Settings"] = ["settings/index.md", *(f"settings/{kind.__name__}.md" for kind in models.SYSTEMS)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not stand in docs/."""
    for source, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "settings/index.md", content=run_settings()))
    for kind in models.SYSTEMS:
        files.append(File.generated(config, f"settings/{kind.__name__}.md", content=system_settings(kind)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead from page to page; name files of the repository that are no page, since the site lacks them."""
    uri = page.file.src_uri
    source = Path({uri: source for source, uri in ELSEWHERE.items()}.get(uri, f"docs/{uri}"))

    def moved(target: str) -> str | None:
        if re.match(r"\w+:", target):
            return target
        path = os.path.normpath(source.parent / target)
        at = ELSEWHERE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(at) or not (ROOT / path).exists():
            return os.path.relpath(at, os.path.dirname(uri) or ".")
        return None

    def replaced(found: re.Match[str]) -> str:
        text, target, anchor, image, picture = found.groups()
        if image:
            return f"{image}{moved(picture)})"
        place = moved(target)
        return text if place is None else f"[{text}]({place}{anchor or ''})"

    parts = re.split(r"(^```.*?^```\n)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


def on_page_content(html: str, **_: Any) -> str:
    r"""Convert formulas, \(inline\) and \[on lines of their own\], to MathML, which browsers draw without a script."""

    def drawn(found: re.Match[str]) -> str:
        text = re.sub(r"&(lt|gt|amp);", lambda escape: {"lt": "<", "gt": ">", "amp": "&"}[escape[1]], found[3])
        return convert(text, display="block" if found[1] == "div" else "inline")

    return re.sub(r'<(div|span) class="arithmatex">\\(\(|\[)(.*?)\\[)\]]</\1>', drawn, html, flags=re.S)


def run_settings() -> str:
    """Return the page of the settings that all systems share."""
    parts = [
        "# Settings of a run\n\nA setting is typed as `--data.size 64`, or stands in a recipe (YAML) as "
        "`data: {size: 64}`. The command line wins over recipes. `--print_config` prints a recipe of all settings. A "
        "system's own are on its page: " + ", ".join(f"[{it.__name__}]({it.__name__}.md)" for it in models.SYSTEMS)
    ]
    for section, kind in SECTIONS.items():
        parts += [f"## {section}", *entries(kind, section)]
    return "\n\n".join(parts) + "\n"


def system_settings(kind: type[models.System]) -> str:
    """Return the page of a system's settings."""
    about = re.split(r"\n\s*Args:", kind.__doc__ or "")[0]
    text = re.sub(r"\n\s+", "\n", about.strip())
    head = [f"# {kind.__name__}", escaped(text), f"`--system {kind.__name__}` takes:"]
    return "\n\n".join([*head, *entries(kind, "system")])


def entries(kind: type, prefix: str) -> Iterator[str]:
    """Yield an entry per setting of a class: how it is typed, its type, its default and its help."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, prefix)
    for action in parser._actions:
        if action.dest in {f"system.{name}" for name in LINKED}:
            continue
        hint = getattr(action, "_typehint", None)
        if hint is None or not action.help or action.help == "==SUPPRESS==":
            continue
        default = "required" if action.required else f"default `{value_in_words(action.default)}`"
        yield f"`--{action.dest}` ({escaped(type_in_words(hint))}; {default})\n:   {escaped(sentence(action.help))}"
        for nested in filter(is_dataclass, getattr(hint, "__args__", ())):
            yield from entries(nested, action.dest)


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def escaped(text: str) -> str:
    """Return plain text of a docstring as Markdown, in which it has no markup but `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<|\[\]$])", r"\\\1", part) for part in parts)
