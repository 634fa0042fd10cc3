"""A run's folder that was downloaded runs nothing, opens nothing that only it names, and is refused in one block."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from conftest import reseal
from jsonargparse._common import parsing_settings

import models
from models import manifest
from models.load import checkpoint_of
from trainer import schemas
from trainer.checkpoint import files as checkpoint_files
from trainer.compare.__main__ import configure as configure_comparison
from trainer.compare.settings import plan_runs
from trainer.config.parser import configure
from trainer.distributed.exit import user_errors
from trainer.evaluate import command as score_command
from trainer.generate.command import main as generate
from trainer.log.metrics_file import read_metrics

SAMPLES = ["--num", "2"]
KNOWN = "AE, CycleGAN, GAN, GANVAE, VAE, VAEGAN"


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that tells if it is imported, and holds what looks like a system and like its settings."""
    code = (
        "from pathlib import Path\nPath({!r}).touch()\nimport models\nclass V(models.VAE): pass\nV.__name__ = 'VAE'\n"
    )
    (tmp_path / "evil.py").write_text(code.format(str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "evil.V"
    assert not (tmp_path / "ran").exists(), "a stranger's module was imported"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    return {}


@pytest.fixture
def run(here, whole, tmp_path, tmp_path_factory) -> Path:
    """A copy of the folder of a tiny VAE's run, made once."""
    if not whole:
        whole["run"] = tmp_path_factory.mktemp("runs") / "vae"
        done = here("--system", "VAE", "--trainer.steps", "2", "--trainer.run_dir", whole["run"])
        assert done.returncode == 0, done.stderr
    return shutil.copytree(whole["run"], tmp_path / "run")


def manifest_of(run: Path) -> dict:
    return json.loads((checkpoint_of(run) / "manifest.json").read_text())


def told(capsys, work, *arguments) -> str:
    """The one block of text with which a program refuses, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, user_errors():
        work(*arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2, message
    assert message.startswith("error: ")
    assert message.count("error: ") == 1
    assert len(message.splitlines()) <= 2
    return message


def each_use(capsys, run: Path, out: Path) -> dict[str, str]:
    """What each program that reads a checkpoint says of it."""
    with pytest.raises(ValueError, match="cannot be loaded") as refused:
        models.load(run)
    sample = ["sample", str(run), "--out", str(out), *SAMPLES]
    return {
        "models.load": str(refused.value),
        "generate": told(capsys, generate, sample),
        "evaluate": told(capsys, score_command.main, [str(run), "--extractor", "demo-random", *SAMPLES]),
    }


@pytest.mark.parametrize(
    "place",
    [
        ["--system", "evil.V"],
        ["--system", "{class_path: evil.V, init_args: {}}"],
        ["--system", "AE", "--system.networks", "evil.V"],
        ["--system", "AE", "--system.networks", "{class_path: evil.V}"],
        ["--system", "AE", "--system.networks.class_path", "evil.V"],
        ["--system", "VAEGAN", "--system.binary", "{class_path: evil.V}"],
        ["--system", "AE", "--data", "{class_path: evil.V}"],
        ["--system.help", "evil.V"],
        ["--system", "AE", "--dry_run", "--system.autoencoder", "{class_path: evil.V}"],
    ],
)
def test_a_command_line_imports_no_class(capsys, evil, place):
    message = told(capsys, configure, ["--data.train", "nowhere", *place])
    assert evil in message
    if "--system.networks.class_path" not in place:
        assert KNOWN in message


@pytest.mark.parametrize(
    "system",
    [
        {"class_path": "evil.V"},
        {"class_path": "models.load", "init_args": {"path": "nowhere"}},
        {"class_path": "os.system", "init_args": {"command": "touch ran"}},
        {"class_path": "AE", "init_args": {"networks": {"class_path": "evil.V"}}},
        {"class_path": "VAEGAN", "init_args": {"ternary": {"class_path": "evil.V", "init_args": {}}}},
    ],
)
def test_a_file_of_settings_imports_no_class(capsys, evil, tmp_path, system):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"system": system, "data": {"train": "nowhere"}}))
    for more in ([], ["--dry_run"]):
        message = told(capsys, configure, ["--config", str(path), *more])
        assert KNOWN in message
    settings = {
        "data": {"train": "a", "test": "b"},
        "compare": {"out": str(tmp_path / "out"), "systems": {"X": system}},
    }
    path.write_text(yaml.safe_dump(settings))
    assert KNOWN in told(capsys, lambda: plan_runs(configure_comparison(["--config", str(path)])))


def test_a_comparison_imports_no_class_either(capsys, evil, tmp_path, monkeypatch):
    """In a process that has parsed no run's settings yet."""
    monkeypatch.setitem(parsing_settings, "import_path_verdicts", {})
    monkeypatch.setitem(parsing_settings, "import_paths_enforced", False)
    assert evil in told(capsys, configure_comparison, ["--data", "{class_path: evil.V}"])


@pytest.mark.parametrize("name", ["evil.V", "models.load", "models.VAE.eval", "VAE2", "os.system", ""])
def test_a_manifest_imports_no_class(capsys, evil, run, tmp_path, name):
    configuration = manifest_of(run)["configuration"]
    configuration["system"]["class_path"] = name
    reseal(checkpoint_of(run), configuration=configuration)
    for message in each_use(capsys, run, tmp_path / "out").values():
        assert f"system.class_path is {name!r}, expected one of {KNOWN}" in message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("networks", {"class_path": "evil.V", "init_args": {}}),
        ("networks", "evil.V"),
        ("autoencoder", {"class_path": "evil.V"}),
        ("autoencoder", [1]),
        ("latent_dim", "4"),
        ("latent_dim", 10**30),
        ("latent_dim", 10**9),
        ("networks", {"family": "residual", "blocks": 10**12}),
        ("unheard", 1),
    ],
)
def test_settings_in_a_manifest_are_those_of_the_system_alone(capsys, evil, run, tmp_path, setting, value):
    configuration = manifest_of(run)["configuration"]
    configuration["system"]["init_args"][setting] = value
    reseal(checkpoint_of(run), configuration=configuration)
    for message in each_use(capsys, run, tmp_path / "out").values():
        assert re.search(rf"{setting}|does not fit the system's settings|[Oo]verflow", message)


def said(run: Path, section: str, **settings) -> None:
    """Have the manifest of a run say other settings, as a stranger's may."""
    configuration = manifest_of(run)["configuration"]
    configuration[section] |= settings
    reseal(checkpoint_of(run), configuration=configuration)


@pytest.fixture
def program(tmp_path) -> Path:
    """A TorchScript extractor that writes a file whenever it is called, as such files can."""

    class Writing(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.float().flatten(1)[:, :8]

    path = tmp_path / "extractor.pt"
    torch.jit.script(Writing()).save(path)
    return path


def test_an_extractor_that_is_code_is_the_command_lines_alone(capsys, run, program, monkeypatch):
    def loaded(*given, **how):
        raise AssertionError("a stranger's code was loaded")

    said(run, "evaluate", extractor="file", weights=str(program))
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", loaded)
        patch.setattr(torch.export, "load", loaded)
        for arguments in ([], ["--weights", str(program)], ["--extractor", "file"]):
            message = told(capsys, score_command.main, [str(run), *SAMPLES, *arguments])
            assert "the run was scored by extractor file with the file" in message
            assert "name it with --extractor file --weights FILE. It is code" in message
    typed = ["--extractor", "file", "--weights", str(program), "--metrics", "fid"]
    score_command.main([str(run), *SAMPLES, *typed])
    assert f"\nfid2/{program.stem}-" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["inception", "demo-cnn"])
def test_weights_that_only_a_manifest_names_are_not_opened(capsys, run, demo_cnn, kind):
    said(run, "evaluate", extractor=kind, weights=str(demo_cnn))
    message = told(capsys, score_command.main, [str(run), *SAMPLES])
    assert f"with the file '{demo_cnn}'. A file that a run's folder names is not opened: name it with" in message


@pytest.mark.parametrize("name", ["train", "test"])
def test_commands_in_a_manifest_are_not_run(capsys, run, tmp_path, name):
    said(run, "data", **{name: f"pipe:touch {tmp_path / 'ran'}"})
    message = told(capsys, score_command.main, [str(run), "--extractor", "demo-random", *SAMPLES])
    assert f"the run's data.{name}: the run's configuration names pipe:touch" in message
    assert not (tmp_path / "ran").exists()


def test_settings_that_a_runs_first_weights_implied_are_those_of_its_networks_alone(run, program):
    stated = {"networks": {"width": 16}, "autoencoder": {"lr": 9.0}}
    settings = {
        "data": {"size": 64, "test": "pipe:ls"},
        "system": {"class_path": "GAN", "init_args": stated},
        "evaluate": {"extractor": "file", "weights": str(program)},
    }
    reseal(checkpoint_of(run), initial={"sha256": {}, "settings": settings})
    start = ["--system", "VAE", "--data.train", "x", "--trainer.init_from", "hf://a/b", "--trainer.run_dir", str(run)]
    config = configure(start)
    arguments = config.resolved()["system"]["init_args"]
    assert (config.data.size, arguments["networks"]["width"]) == (64, 16)
    assert (config.data.test, config.evaluate.extractor, config.evaluate.weights) == (None, None, None)
    assert arguments["autoencoder"]["lr"] < 1


def test_nothing_is_cached_where_a_manifest_says(capsys, run, tmp_path):
    shard = {"url": "http://127.0.0.1:9/0.tar", "nsamples": 9, "filesize": 20480}
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": [shard]}))
    said(run, "data", test=str(tmp_path / "index.json"), cache=str(tmp_path / "cache"))
    message = told(capsys, score_command.main, [str(run), "--extractor", "demo-random", *SAMPLES])
    assert "(or --cache and --cache_gb of trainer.evaluate)" in message
    assert not (tmp_path / "cache").exists()


def test_a_seed_may_have_any_size(run):
    configuration = json.loads((checkpoint_of(run) / "manifest.json").read_text())["configuration"]
    configuration["trainer"]["seed"] = 10**30
    reseal(checkpoint_of(run), configuration=configuration)
    assert schemas.checkpoint(checkpoint_of(run)).configuration.trainer.seed == 10**30


BOMB = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{}", '{"step": 2}', BOMB, f'{{"step": 2, "files": {BOMB}}}', "\udcff", '{"step": NaN}'],
    ids=range(10),
)
def test_a_manifest_of_another_shape_is_refused_in_one_block(capsys, here, run, tmp_path, text):
    (checkpoint_of(run) / "manifest.json").write_text(text, errors="surrogateescape")
    each_use(capsys, run, tmp_path / "out")
    done = here("--system", "VAE", "--trainer.steps", "3", "--trainer.run_dir", run)
    assert done.returncode == 2
    assert f"all checkpoints in {run / 'checkpoints'} are damaged" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "changes",
    [
        *({"configuration": value} for value in (None, [], {}, {"system": "VAE"}, {"system": {"class_path": 3}})),
        *({"files": value} for value in ({"../manifest.json": "0" * 64}, {"/etc/passwd": "0" * 64}, [], {"a": "b"})),
        *({"step": value} for value in (-1, 2.5, "2", None, 10**30)),
    ],
    ids=str,
)
def test_a_manifest_with_the_right_checksum_is_refused_for_its_shape(capsys, here, run, tmp_path, changes):
    path = checkpoint_of(run) / "manifest.json"
    content = {**manifest_of(run), **changes}
    del content["sha256"]
    path.write_bytes(manifest.sealed(content))
    each_use(capsys, run, tmp_path / "out")
    refused_resume(here, run)


def refused_resume(here, run: Path) -> str:
    done = here("--system", "VAE", "--trainer.steps", "3", "--trainer.run_dir", run)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("section", "value", "words"),
    [
        ("size", 64, "its images have 64 pixels a side and 1 channels, and its system's 32 and 1"),
        ("size", 10**9, "its images have 1000000000 pixels a side"),
        ("size", "32", "size"),
        ("channels", 2, "channels"),
        ("test", {"a": 1}, "test"),
        ("cache_gb", -1, "cache_gb"),
    ],
)
def test_a_manifests_data_settings_have_a_shape(capsys, run, section, value, words):
    said(run, "data", **{section: value})
    message = told(capsys, score_command.main, [str(run), "--extractor", "demo-random", *SAMPLES])
    assert words in message


@pytest.mark.parametrize(
    "changes",
    [
        {"windows": []},
        {"windows": [{"terms": {"a/b": 3}, "sample_checksum": 0, "replaced": []}]},
        {"windows": [{"terms": [], "sample_checksum": 0, "replaced": []}]},
        {"data": []},
        {"data": [{"images": 3}]},
        {"frozen": []},
        {"replaced": "none"},
        {"evaluation_pending": 1},
        {"scalers": [1]},
        {"configuration": {}},
    ],
    ids=str,
)
def test_what_a_run_goes_on_from_has_a_shape(here, run, changes):
    reseal(checkpoint_of(run), **changes)
    refused_resume(here, run)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("decoder", lambda tensors: {"stem.weight": torch.zeros(3)}),
        ("encoder", lambda tensors: tensors | {"unheard": torch.zeros(3)}),
        ("ema.decoder", lambda tensors: {name: value[None] for name, value in tensors.items()}),
        ("ema.decoder", lambda tensors: {name: value.double() for name, value in tensors.items()}),
        ("optimizer.autoencoder", lambda tensors: tensors | {"nobodys.weight.exp_avg": torch.zeros(3)}),
        ("optimizer.autoencoder", lambda tensors: tensors | {"nodot": torch.zeros(3)}),
        ("optimizer.autoencoder", lambda tensors: {name: value.reshape(-1) for name, value in tensors.items()}),
        ("optimizer.autoencoder", lambda tensors: dict(list(tensors.items())[1:])),
    ],
)
def test_tensors_of_other_names_or_shapes_are_refused(capsys, here, run, tmp_path, file, change):
    path = checkpoint_of(run) / f"{file}.safetensors"
    path.write_bytes(safetensors.torch.save(change(safetensors.torch.load_file(path))))
    reseal(checkpoint_of(run))
    assert f"{file}.safetensors does not fit the system's settings" in refused_resume(here, run)
    if file == "ema.decoder":
        for message in each_use(capsys, run, tmp_path / "out").values():
            assert f"{file}.safetensors does not fit the system's settings" in message


def test_a_pipe_in_a_checkpoints_place_is_not_waited_for(capsys, here, run, tmp_path):
    path = checkpoint_of(run) / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    each_use(capsys, run, tmp_path / "out")
    refused_resume(here, run)


ODD = [
    *("3", "[]", "null", '{"step": "2"}', '{"step": -1}', '{"a/b": 1}', '{"step": 1, "a/b": "c"}', BOMB, "\0", "{"),
    *('{"step": 1, "a/b": [1]}', '{"step": 1, "extractor": 3}', '{"step": 1, "extractor": "x", "eval/fid2": 1}'),
    *('{"step": 1, "eval/seconds": 1, "eval/seconds_share": 0, "a": 1}', '{"step": 1, "a/b": 1' + "0" * 400 + "}"),
]


def test_odd_lines_and_scores_are_none(here, run, demo_cnn):
    metrics = run / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.write_text("".join(f"{line}\n" for line in ODD) + kept)
    # The last one stays for the run.
    for scores in ("[]", "{}", '{"scores": {"eval/fid2": "low"}, "evaluation": {}}', "3", BOMB):
        (checkpoint_of(run) / "scores.json").write_text(scores)
        assert checkpoint_files.read_scores(checkpoint_of(run)) is None, scores
    known = [json.loads(line) for line in kept.splitlines()]
    assert [line for line in read_metrics(run) if line not in known] == [json.loads(ODD[-2])]
    evaluate = ["--evaluate.every", "1", "--evaluate.num", "2", "--evaluate.metrics", "[fid]"]
    evaluate += ["--evaluate.extractor", "demo-cnn", "--evaluate.weights"]
    done = here("--system", "VAE", "--trainer.steps", "3", "--trainer.run_dir", run, *evaluate, demo_cnn)
    assert done.returncode == 0, done.stderr
    assert metrics.read_text().startswith(f"{ODD[-2]}\n{kept}")


def test_fewer_steps_than_were_made_are_refused(here, run):
    run_of = ("--system", "VAE", "--trainer.run_dir", run, "--trainer.steps")
    assert here(*run_of, "2").returncode == 0
    assert (run / "state").read_text() == "finished\n"
    done = here(*run_of, "1")
    assert done.returncode == 2
    assert f"trainer.steps is 1, but the run in {run} has already made 2: raise it, or choose" in done.stderr
    assert (run / "state").read_text() == "failed\n"
    assert here(*run_of, "2").returncode == 0
    assert (run / "state").read_text() == "finished\n"


class Mine(models.AE):
    """A system of one's own."""


def test_a_system_of_ones_own_is_known_once_it_is_listed(capsys):
    arguments = ["--data.train", "nowhere", "--system", f"{__name__}.Mine"]
    assert f"class_path {__name__}.Mine is not imported" in told(capsys, configure, arguments)
    models.SYSTEMS.append(Mine)
    try:
        assert type(configure(arguments).system()) is Mine
    finally:
        models.SYSTEMS.remove(Mine)
