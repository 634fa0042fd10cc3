"""A comparison trains the missing runs, and its page and results.json show the numbers of the runs."""

import hashlib
import json
import re
import shutil
import signal
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT, TRAIN, Ranks

from trainer.compare import runs
from trainer.compare.__main__ import configure, main
from trainer.compare.settings import plan_runs
from trainer.evaluate.extractors import demo_cnn
from trainer.log.metrics_file import read_metrics

RECIPE = ROOT / "launch" / "recipes" / "compare-digits.yaml"
TERNARY = {"class_path": "VAEGAN", "init_args": {"discriminator": "ternary", "adversarial_weight": 10}}
SMALL = {
    "trainer": {"steps": 10, "batch_size": 8, "log_every": 5, "trackers": []},
    "evaluate": {"every": 5, "num": 64, "extractor": "demo-cnn"},
}
START = runs.start
COMMON = {"networks": {"family": "dcgan", "width": 8}, "latent_dim": 4}


def recipe(folder: Path, digits: Path, **settings) -> Path:
    data = {"train": str(digits / "train"), "test": str(digits / "test"), "channels": 1, "workers": 0}
    chosen = {"out": "out", "seeds": [0, 1], "jobs": 2, "common": COMMON, "systems": {"GAN": {"class_path": "GAN"}}}
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({"data": data, **SMALL, "compare": chosen | settings}))
    return path


def call(path: Path) -> str:
    """Return what a comparison in this process prints."""
    handler, said = signal.getsignal(signal.SIGTERM), StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with redirect_stdout(said):
            main(["--config", str(path)])
    finally:
        signal.signal(signal.SIGTERM, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
    return said.getvalue()


class Forked(Ranks):
    """A forked process with the methods of subprocess.Popen that the comparison calls."""

    def poll(self) -> int:
        self.returncode = self.wait().returncode
        return self.returncode


@pytest.fixture(scope="module")
def compared(tmp_path_factory, digits, warm):
    """A small comparison; its demo-cnn is untrained, which is as good here and saves the training."""
    path = recipe(tmp_path_factory.mktemp("compare"), digits, systems={"GAN": {"class_path": "GAN"}, "T": TERNARY})
    fitted = []

    def fit(train, test, data, path, **_):
        facts = {"accuracy": 1.0, "data": demo_cnn.identity(train, test, data)}
        path.write_bytes(safetensors.torch.save(demo_cnn.DemoCNN(1, 10).state_dict(), {"demo-cnn": json.dumps(facts)}))
        fitted.append(path)

    def start(run, environment):
        run.folder.mkdir(parents=True)
        (run.folder / "recipe.yaml").write_text(run.config.yaml)
        arguments = f"arguments = ['--config', {str(run.folder / 'recipe.yaml')!r}]"
        return Forked(warm, run.folder / "log.txt", f"{arguments}\n{TRAIN}", env=environment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.evaluate.extractors.build.fit", fit)
        patch.setattr(runs, "start", start)
        (path.parent / "out").mkdir()
        said = call(path)
        yield SimpleNamespace(path=path, out=path.parent / "out", said=said, fitted=fitted)


def test_all_runs_are_trained_and_scored_alike(compared):
    assert compared.said.count("trained in") == 4
    assert len(compared.fitted) == 1
    sha256 = hashlib.sha256(compared.fitted[0].read_bytes()).hexdigest()
    folders = [compared.out / name / f"seed_{seed}" for name in ("GAN", "T") for seed in (0, 1)]
    assert [line["extractor_sha256"] for folder in folders for line in read_metrics(folder)[-1:]] == [sha256] * 4


def test_the_page_holds_all_that_it_shows(compared):
    page = (compared.out / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 3  # two systems' pictures and the curves
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|url\(|@import", page)
    assert "reconstructed</th>" in page  # the confusion matrix
    assert (compared.out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_numbers_are_the_runs_own(compared):
    results = json.loads((compared.out / "results.json").read_text())
    assert len(results["runs"]) == 4
    for run in results["runs"]:
        last = read_metrics(compared.out / run["system"] / f"seed_{run['seed']}")[-1]
        assert run["step"] == last["step"] == 10
        assert run["fid"] == last["eval/fid64/demo-cnn-v1"]
        assert run.get("prior_gap") == last.get("eval/prior_gap359")
        assert ("rfid" in run) == (run["system"] == "T")
    fids = [run["fid"] for run in results["runs"] if run["system"] == "T"]
    assert results["means"]["T"]["fid"] == pytest.approx(sum(fids) / 2)


def test_only_what_is_missing_is_trained(compared, monkeypatch):
    pages = []  # whose figures take seconds
    monkeypatch.setattr("trainer.compare.page.write_page", lambda entries, *_: pages.append(entries))

    def metrics() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in compared.out.glob("*/*/metrics.jsonl")}

    before = metrics()
    assert "4 runs" in (said := call(compared.path))
    assert "0 to train" in said
    assert metrics() == before
    gone = compared.out / "T" / "seed_1"
    kept = read_metrics(gone)[-1]
    shutil.rmtree(gone)
    said = call(compared.path)
    assert "1 to train" in said
    assert "[1/1] T, seed 1: trained" in said
    assert len(compared.fitted) == 1
    assert {path for path, time in metrics().items() if time != before[path]} == {gone / "metrics.jsonl"}
    without = yaml.safe_load(compared.path.read_text())
    without["data"]["train"] = str(compared.out / "moved")
    (compared.path.with_name("without.yaml")).write_text(yaml.safe_dump(without))
    assert "0 to train" in call(compared.path.with_name("without.yaml")), "a page needs no training images"
    assert read_metrics(gone)[-1]["eval/prior_gap359"] == pytest.approx(kept["eval/prior_gap359"])
    assert [[len(entry.runs) for entry in page] for page in pages] == [[2, 2]] * 3, "each call writes all runs' page"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"compare": {"systems": {"GAN": {"class_path": "GAN", "init_args": {"binary": {"lr": 0.5}}}}}},
            "system.binary.lr: 0.0002 in the checkpoint, 0.5 now",
        ),
        ({"data": {}}, "data.train: shards of fingerprint "),
    ],
    ids=["settings", "data"],
)
def test_a_run_with_other_settings_or_data_is_no_part_of_it(compared, capsys, change, words):
    changed = yaml.safe_load(compared.path.read_text())
    for section, settings in change.items():
        changed[section] |= settings
    if "data" in change:
        changed["data"]["train"] = changed["data"]["test"]
    path = compared.path.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(changed))
    with pytest.raises(SystemExit) as stopped:
        call(path)
    assert stopped.value.code == 1
    assert words in capsys.readouterr().err


def test_a_failed_run_is_told_and_the_rest_goes_on(tmp_path, digits, monkeypatch, capsys):
    broken = tmp_path / "main.py"
    broken.write_text("import sys\nsys.exit('warning\\nerror: no loss')\n")
    monkeypatch.setattr(runs, "MAIN", broken)
    monkeypatch.setattr(runs, "start", START)
    monkeypatch.setattr(runs, "fit_extractor", lambda settings: None)
    with pytest.raises(SystemExit) as stopped:
        call(recipe(tmp_path, digits))
    told = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "[2/2] GAN, seed" in told
    assert told.count("failed with exit code 1: no loss") == 2
    assert "error: 2 of 2 runs failed: " in told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"systems": {}}, ["compare.systems is empty"]),
        ({"systems": {"A": {"class_path": "WGAN"}}}, ['compare.systems, "A"', "WGAN", "one of AE"]),
        ({"systems": {"A": {"class_path": "AE", "init_args": {"lr": 1}}}}, ['compare.systems, "A"', "system.lr"]),
        ({"systems": {"A": {"class_path": "VAE", "init_args": {"kl_weight": -1}}}}, ['"A"', "kl_weight is -1"]),
        ({"systems": {"A/B": {"class_path": "AE"}}}, ['"A/B"', "folder"]),
        ({"systems": {"A": "AE"}}, ["compare.systems", "dict"]),
        ({"seeds": [1, 1]}, ["compare.seeds", "[1, 1]", "different"]),
        ({"seed": [1]}, ["compare", "option 'seed'"]),
        ({"jobs": 0}, ["compare.jobs"]),
    ],
)
def test_mistakes_are_named(tmp_path, digits, capsys, settings, words):
    with pytest.raises(SystemExit) as stopped:
        call(recipe(tmp_path, digits, **settings))
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert told.startswith("error: ")
    assert len(told.splitlines()) <= 2
    assert all(word in told for word in words), told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["compare-digits", pytest.param("compare-mnist", marks=pytest.mark.slow)])
def test_the_recipes_plan_seven_systems_from_three_seeds(name):
    settings = configure(["--config", str(ROOT / "launch" / "recipes" / f"{name}.yaml")])
    assert len(plan_runs(settings)) == 21


def test_the_command_line_overrides_the_file():
    over = ["--trainer.steps", "60", "--compare.out", "here", "--compare.seeds", "[4, 5]"]
    settings = configure([*over, "--config", str(RECIPE)])
    assert (settings.trainer.steps, settings.compare.seeds, settings.out) == (60, [4, 5], Path.cwd() / "here")
