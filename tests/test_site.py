"""The site of documentation: what MkDocs' own strict build, in `make lint`, does not see."""

import importlib.util
import re

import pytest
from conftest import ROOT

import models
from trainer.config.parser import parser


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("_hooks", ROOT / "docs" / "_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_setting_of_a_run_with_its_help(hooks):
    page = hooks.run_settings()
    settings = [action for action in parser()._actions if action.dest.partition(".")[0] in hooks.SECTIONS]
    named = [action for action in settings if "." in action.dest]
    assert len(named) > 50
    for action in named:
        assert f"`--{action.dest}`" in page
        assert hooks.escaped(hooks.sentence(action.help)) in page


@pytest.mark.parametrize("kind", models.SYSTEMS, ids=lambda kind: kind.__name__)
def test_the_reference_has_every_argument_of_a_system(hooks, kind):
    page, arguments = hooks.system_settings(kind), kind.__init__.__annotations__
    for name in {*arguments} - {"image_size", "channels", "return"}:
        assert f"`--system.{name}" in page
    if "binary" in arguments:
        assert "`--system.binary.r1_weight` (number or schedule; default" in page


@pytest.mark.parametrize("kind", models.SYSTEMS, ids=lambda kind: kind.__name__)
def test_the_equations_of_every_system_are_on_a_page(kind):
    assert f"\n## {kind.__name__}\n\n$$" in (ROOT / "docs" / "systems.md").read_text()


def test_formulas_become_mathml(hooks):
    html = hooks.on_page_content(r'<span class="arithmatex">\(a &lt; b\)</span>')
    assert html.startswith("<math")
    assert "<mo>&#x0003C;</mo>" in html


def test_the_tests_that_pages_name_exist():
    named = {
        (path, name)
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text())
    }
    assert named
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_prose_has_at_most_120_characters_a_line():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md", *(ROOT / "docs").glob("*.md")]
    long = []
    for page in pages:
        prose = re.sub(r"^```.*?^```$|^\$\$.*?\$\$$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        lines = (line for line in prose.splitlines() if not line.startswith(("|", "![", "[")))
        long += [f"{page.name}: {line}" for line in lines if len(line) > 120]
    assert not long
