"""launch/container: one machine's start script, and what the image is built of. No test here builds the image."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import NETWORKS, ROOT, SMALL, THREADS, wait_until

CONTAINER = ROOT / "launch" / "container"
CODES = {"finished": 0, "stopped": 75, "refused": 2}


@pytest.fixture
def start(digits, tmp_path):
    """Start start.sh on the CPU with small settings, with a run folder of its own."""

    def run(*arguments: str, **settings: str) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PET_")}
        environment |= {
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": THREADS,
            "RUN_DIR": str(tmp_path / "run"),
            "ACCELERATE_USE_CPU": "true",  # also where there is a GPU, which the tests hide
            **settings,
        }
        data = ["--data.train", str(digits / "train"), "--data.test", str(digits / "test")]
        words = ["bash", str(CONTAINER / "start.sh"), "--system", "AE", *data, *SMALL, *NETWORKS, *arguments]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return run


@pytest.mark.parametrize(
    ("settings", "named"),
    [({}, "RUN_DIR is not set"), ({"RUN_DIR": "x", "NODES": "2"}, "NODES is 2, and MASTER_ADDR is not set")],
)
def test_what_is_missing_is_named(settings, named):
    environment = {"PATH": os.environ["PATH"], **settings}
    done = subprocess.run(["bash", str(CONTAINER / "start.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == CODES["refused"]
    assert done.stderr.startswith(f"error: {named}")


TRAINER = """#!/bin/bash
case "$*" in
    *"import torch"*) echo 0 && exit ;;
    -*) exec "$REAL" "$@" ;;
    *--dry_run*) exit "$PLANNED" ;;
esac
[ -z "$STATE" ] || echo "$STATE" >"$RUN_DIR/state.new"
[ -z "$STATE" ] || mv "$RUN_DIR/state.new" "$RUN_DIR/state"
exit "$CODE"
"""


@pytest.fixture
def ended(tmp_path):
    """The exit code of start.sh where a trainer that leaves `state`, or none, ends with `code`."""

    def run(url: str, before: str, planned: int, state: str, code: int, **more: str) -> int:
        python = tmp_path / "python"
        python.write_text(TRAINER.replace("$RUN_DIR", str(tmp_path)))
        python.chmod(0o755)
        if before:
            (tmp_path / "state").write_text(before)
        settings = {"PYTHON": python, "RUN_DIR": f"{url}{tmp_path}", "REAL": sys.executable, "PATH": os.environ["PATH"]}
        settings |= {"PLANNED": planned, "STATE": state, "CODE": code, "ACCELERATE_USE_CPU": "true"}
        stub = {key: str(value) for key, value in settings.items()} | more
        return subprocess.run(["bash", str(CONTAINER / "start.sh")], env=stub, capture_output=True).returncode

    return run


STARTS = [
    ("", 0, "finished", 0, 0),
    ("stopped", 0, "stopped", 75, 75),
    ("stopped", 0, "", 137, 1),  # it was killed before it had the folder
    ("stopped", 0, "", 2, 2),
    ("diverged", 0, "", 137, 1),
    ("", 0, "diverged", 1, 2),
    ("running", 0, "failed", 1, 1),
    ("", 2, "", 0, 2),
    ("", 137, "", 0, 1),
    ("finished", 1, "finished", 0, 1),
]


@pytest.mark.parametrize(("before", "planned", "state", "code", "expected"), STARTS)
def test_the_exit_code_follows_from_what_this_start_did(ended, before, planned, state, code, expected):
    assert ended("", before, planned, state, code) == expected


def test_a_trainer_that_ends_before_the_script_looks_has_its_code(ended):
    slow = {"BASH_FUNC_kill%%": '() { sleep 0.2; builtin kill "$@"; }'}
    assert ended("", "stopped", 0, "", 2, **slow) == 2


@pytest.mark.parametrize(("before", "planned", "state", "code", "expected"), STARTS[:4])
def test_so_it_does_where_the_run_is_at_a_url(ended, before, planned, state, code, expected):
    assert ended("file://", before, planned, state, code) == expected


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_to_the_script_alone_saves_and_the_same_command_goes_on(start, tmp_path, processes):
    state = tmp_path / "run" / "state"
    process = start("--trainer.steps", "1000000", PROCESSES=processes)
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() or process.poll() is not None)
    process.terminate()
    output, _ = process.communicate(timeout=240)
    assert (process.returncode, state.read_text().strip()) == (75, "stopped"), output
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    steps = str(int(saved.name.removeprefix("step_")) + 2)
    process = start("--trainer.steps", steps, PROCESSES=processes)
    output, _ = process.communicate(timeout=240)
    assert (process.returncode, state.read_text().strip()) == (0, "finished"), output
    assert f"at step {int(saved.name.removeprefix('step_'))} of {steps}" in output


@pytest.mark.slow
def test_settings_that_are_refused_are_told_apart(start):
    process = start("--trainer.batch_size", "0", PROCESSES="2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "batch_size" in output


def test_the_image_is_built_of_what_there_is():
    text = (CONTAINER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    kept = re.findall(r"^!(.*)$", (CONTAINER / "Dockerfile.dockerignore").read_text(), re.M)
    assert {*copied} == {*kept}
    (extras,) = re.findall(r"'\.\[(.*)\]'", text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*extras.split(",")} <= {*known}
    assert re.search(r"^USER [1-9]\d*$", text, re.M)
    (entry,) = re.findall(r'^ENTRYPOINT \["/opt/vaegan-trainer/(.*)"\]$', text, re.M)
    assert os.access(ROOT / entry, os.X_OK)


def manifests() -> list[Path]:
    return [ROOT / "launch" / "kubernetes" / name for name in ("jobset.yaml", "trainjob.yaml")]


def assert_kept(stated, parsed) -> None:
    """Assert that all that is stated was parsed; defaults may have been added."""
    if isinstance(stated, dict):
        assert {*stated} <= {*parsed}
        for key, value in stated.items():
            assert_kept(value, parsed[key])
    elif isinstance(stated, list):
        for one, other in zip(stated, parsed, strict=True):
            assert_kept(one, other)
    else:
        assert parsed == stated


@pytest.mark.parametrize("path", manifests(), ids=lambda path: path.stem)
def test_a_manifest_follows_its_schema(path):
    """The models of Kubeflow's own API have JobSet's, too; they drop what they do not know."""
    from kubeflow_trainer_api import models

    kind = {"JobSet": models.JobsetV1alpha2JobSet, "TrainJob": models.TrainerV1alpha1TrainJob}
    stated = yaml.safe_load(path.read_text())
    assert_kept(stated, kind[stated["kind"]].from_dict(stated).to_dict())


def test_the_jobset_acts_on_the_scripts_exit_codes():
    spec = yaml.safe_load(manifests()[0].read_text())["spec"]
    (job,) = spec["replicatedJobs"]
    job = job["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [CODES["refused"]]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment["NODES"] == str(job["completions"]) == str(job["parallelism"])
    assert pod["terminationGracePeriodSeconds"] > 150  # PET_SHUTDOWN_TIMEOUT of start.sh
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_spot_task_recovers_what_was_preempted():
    task = yaml.safe_load((ROOT / "launch" / "skypilot" / "task.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [CODES["stopped"]]
    assert (ROOT / "launch" / "container" / "start.sh").exists()
    done = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
