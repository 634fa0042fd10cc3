"""The document that `make bench` writes, and that each of its sections runs."""

import sys

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.common import bar

DOCUMENT = "# Benchmarks\n\nWords.\n\n## Step: A\n\nold\n\n## Step: AB\n\nother\n\n# Next\n\nend\n"


def test_a_section_replaces_that_of_its_machine_only():
    found = benchmarks.replaced(DOCUMENT, "Step: A", "new\n\n| a |\n")
    assert found == DOCUMENT.replace("old", "new\n\n| a |")
    assert benchmarks.replaced(found, "Step: AB", "last") == found.replace("other", "last")
    added = benchmarks.replaced(DOCUMENT, "Run: A", "new")
    assert added == DOCUMENT + "\n## Run: A\n\nnew\n"
    assert benchmarks.replaced(added, "Run: A", "newer") == added.replace("new\n", "newer\n")


def test_a_missed_bar_is_bold():
    assert [bar(found, 0.92)[0] for found in (0.92, 0.9196)] == ["0.92", "**0.920**"]
    assert [bar(found, 1.3, most=True)[0] for found in (1.3, 1.31)] == ["1.30", "**1.310**"]


@pytest.mark.slow
@pytest.mark.parametrize("section", ["step", "run", "growth"])
def test_a_section_runs(monkeypatch, tmp_path, section):
    out = tmp_path / "tables.md"
    monkeypatch.setattr(sys, "argv", ["bench", section, "--small", "--rounds", "1", "--out", str(out)])
    benchmarks.main()
    assert benchmarks.machine() in out.read_text()
    assert out.read_text().count("---|") > 5
