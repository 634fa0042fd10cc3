"""The document that `make bench` writes, and that each of its sections runs."""

import sys
from importlib.util import find_spec

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import quality
from benchmarks.common import bar
from trainer.evaluate.evaluator import Evaluator

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "ours, ternary",
        "plain loop, lr 1e-3",
        pytest.param(
            "Pythae, lr 1e-3",
            marks=pytest.mark.skipif(not find_spec("pythae"), reason="Pythae comes with pip install -e '.[bench]'"),
        ),
    ],
)
def test_the_quality_of_each_method_is_scored(monkeypatch, capsys, digits, method):
    options = ["--small", "--rounds", "1", "--extractor", "demo-random", "--methods", method]
    monkeypatch.setattr(sys, "argv", ["quality", "--data", str(digits), *options])
    quality.main()
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {method} |"))
    steps, fid, _ = (float(cell) for cell in row.split("|")[2:5])
    assert steps >= 1
    assert fid > 0


@pytest.mark.slow
def test_without_pythae_its_row_says_what_to_install(monkeypatch, capsys, digits):
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    options = ["--small", "--rounds", "1", "--extractor", "demo-random", "--methods", "Pythae, lr 1e-3"]
    monkeypatch.setattr(sys, "argv", ["quality", "--data", str(digits), *options])
    quality.main()
    assert "| Pythae, lr 1e-3: left out, see `pip install -e '.[bench]'` |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_fid_is_that_of_an_evaluation(digits):
    run = quality.Ours("binary", 1, "no", seed=0)
    evaluator, _ = quality.evaluator_of(digits, 1, "demo-random", "no")
    settings = {"num": evaluator.num, "seed": evaluator.seed, "system": run.ema.system, "metrics": ["fid"]}
    other = Evaluator(evaluator.accelerator, evaluator.extractor, evaluator.references, evaluator.data, **settings)
    assert quality.fid(evaluator, run.sampler()) == other(run.ema.system)["eval/fid10k/demo-random-v1"]
