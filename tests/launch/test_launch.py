"""What is in launch/: accelerate reads its configurations as meant, and a job script does what a run's end asks for."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT

CONFIGURATIONS = ROOT / "launch" / "accelerate"
SLURM = ROOT / "launch" / "slurm"

# ---- accelerate

MANY = [
    *("--num_machines", "3", "--num_processes", "24", "--machine_rank", "1"),
    *("--main_process_ip", "10.0.0.1"),
]
MEANT = {
    "cpu": ([], {"use_cpu": True, "multi_gpu": False, "num_processes": 1, "num_machines": 1, "mixed_precision": "no"}),
    "one_gpu": ([], {"use_cpu": False, "multi_gpu": False, "num_processes": 1, "num_machines": 1}),
    "one_node": (
        ["--num_processes", "8"],
        {"use_cpu": False, "multi_gpu": True, "num_processes": 8, "num_machines": 1},
    ),
    "many_nodes": (
        MANY,
        {"use_cpu": False, "multi_gpu": True, "num_processes": 24, "num_machines": 3, "rdzv_backend": "static"},
    ),
}


def launched(name, *flags):
    """What `accelerate launch` makes of a configuration and flags."""
    path = CONFIGURATIONS / f"{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *flags, "trainer/main.py"])
    return vars(_validate_launch_command(arguments)[0])


@pytest.mark.parametrize("name", MEANT)
def test_a_configuration_is_what_accelerate_makes_of_it(name):
    flags, meant = MEANT[name]
    found = launched(name, *flags)
    meant = {"mixed_precision": "bf16", "dynamo_backend": "no"} | meant
    assert {key: found[key] for key in meant} == meant


@pytest.mark.parametrize("name", ["one_node", "many_nodes"])
def test_a_number_of_processes_is_not_guessed(name):
    with pytest.raises(ValueError, match="num_processes"):
        launched(name)


def test_every_configuration_is_tested():
    assert {path.stem for path in CONFIGURATIONS.glob("*.yaml")} == MEANT.keys()


# ---- shell


def test_the_python_inside_the_job_script_runs(monkeypatch, capsys):
    code = (SLURM / "common.sh").read_text().split("<<'END'\n")[1].split("\nEND\n")[0]
    monkeypatch.setattr(sys, "argv", ["-", "--config", str(ROOT / "launch" / "recipes" / "digits-vae.yaml")])
    monkeypatch.setenv("DATA_CACHE", "/fast")
    exec(code, {})
    run_dir, unlimited, remote, elsewhere, *cache = capsys.readouterr().out.splitlines()
    assert (Path(run_dir).name, unlimited, remote, elsewhere) == ("digits-vae", "True", "False", "False")
    assert cache == ["--data.cache", "/fast"]


# ---- SLURM's part played by stubs: each attempt ends as told; what the script then does is what is tested

PYTHON = """#!/bin/bash
case "$*" in
    *--mistake*) echo "error: no such setting" >&2; exit 2 ;;
    -*) printf '%s\\n' "$RUN" True "$REMOTE" "$REMOTE" --data.cache "$DATA_CACHE" ;;
    *--odd*) echo "error: ${*: -1} processes do not fit" >&2; exit 2 ;;
    *--down*) echo planned >>"$STUBS/planned"; exit 1 ;;
    *) echo planned for "${*: -1}" ;;
esac
"""
SRUN = """#!/bin/bash
echo "$@" >>"$STUBS/srun"
case " $* " in *" check "*)
    [ -z "$SHARED" ] || echo "$SHARED" >>"$STUBS/shared"
    [ -z "$BAD_NODE" ] || { echo "error: node n1: $BAD_NODE" >&2; exit "${BAD_CODE:-1}"; }
    exit 0 ;;
esac
attempt=$(grep -c ' train ' "$STUBS/srun")
read -r step state < <(sed -n "${attempt}p" "$STUBS/attempts")
echo "$GPUS $PROCESSES $ACCELERATE_CONFIG $PET_RDZV_ID $PORT" >>"$STUBS/launched"
[ "$state" != unlaunched ] || exit 1 # srun made no step, and no log of it
echo "error: on attempt $attempt" >"$(grep -o "$RUN/logs/[^/]*" <<<"$*")/n0.log"
[ "$state" = locked ] || echo "process 1 on n0, SLURM job $SLURM_JOB_ID, since" >"$RUN/.lock"
path=$RUN/checkpoints/$(printf 'step_%08d' "$step")
mkdir -p "$path" && touch "$path/manifest.json"
[[ $state =~ killed|locked ]] || echo "$state" >"$RUN/state"
[ "$state" = finished ]
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$STUBS/scontrol"
case "$1 $2" in
    "show hostnames") printf '%s\\n' n0 n1 ;;
    "show node") echo "   NodeAddr=10.0.0.$((${3#n} + 1)) NodeHostName=$3" ;;
    requeue*) exit "${REFUSED:-0}" ;;
esac
"""
SQUEUE = """#!/bin/bash
echo "$LEFT"
"""


@pytest.fixture
def job(tmp_path):
    """Run a job script where SLURM's commands and the trainer are stubs.

    Each of `attempts` is the newest checkpoint's step and the state that one leaves.
    """
    stubs, run_dir, bin_dir = tmp_path, tmp_path / "run", tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)

    def submit(*arguments, attempts=(), script="many_nodes.sh", **environment):
        (stubs / "attempts").write_text("".join(f"{step} {state}\n" for step, state in attempts))
        slurm = {"JOB_ID": 7, "NNODES": 2, "JOB_NODELIST": "n[0-1]", "CPUS_ON_NODE": 4, "SUBMIT_DIR": ROOT}
        slurm = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        mine = {"STUBS": stubs, "RUN": run_dir, "PYTHON": bin_dir / "python", "PATH": f"{bin_dir}:{os.environ['PATH']}"}
        mine |= {"LEFT": "UNLIMITED", "REMOTE": "False", "BAD_NODE": "", "SLURM_GPUS_PER_NODE": "0", "TMPDIR": "/tmp"}
        environment = slurm | mine | environment
        copy = tmp_path / "slurm_script"  # SLURM runs a copy elsewhere
        shutil.copy(SLURM / script, copy)
        command = ["bash", copy, *arguments]
        done = subprocess.run(command, env={k: str(v) for k, v in environment.items()}, capture_output=True, text=True)

        def told(name):
            return (stubs / name).read_text().splitlines() if (stubs / name).exists() else []

        trained = [line for line in told("srun") if " train " in line]
        requeued = [line for line in told("scontrol") if line.startswith("requeue")]
        launched = [line.split() for line in told("launched")]
        return SimpleNamespace(
            code=done.returncode, said=done.stdout + done.stderr, trained=trained, requeued=requeued, launched=launched
        )

    submit.run_dir = run_dir
    return submit


def test_a_finished_run_ends_the_job(job):
    done = job(attempts=[(50, "finished")])
    assert (done.code, len(done.trained), done.requeued) == (0, 1, [])


def test_a_stopped_run_is_requeued(job):
    done = job(attempts=[(50, "stopped")])
    assert (done.code, len(done.trained), done.requeued) == (0, 1, ["requeue 7"])


def test_of_an_array_only_the_task_is_requeued(job):
    task = {
        "SLURM_ARRAY_JOB_ID": 7,
        "SLURM_ARRAY_TASK_ID": 1,
        "script": "array.sh",
    }  # the last task has the array's number
    done = job("a.yaml", "b.yaml", "--", "--trainer.steps", "9", attempts=[(50, "stopped")], **task)
    assert (done.code, done.requeued) == (0, ["requeue 7_1"])
    assert done.trained[0].endswith(" --config b.yaml --trainer.steps 9")


def test_a_refused_requeue_is_told(job):
    done = job(attempts=[(50, "stopped")], REFUSED=1)
    assert done.code == 1
    assert "job 7 cannot be requeued: submit it again to resume from step 50" in done.said


def test_a_diverged_run_is_not_tried_again(job):
    done = job(attempts=[(50, "diverged")])
    assert (done.code, len(done.trained), done.requeued) == (1, 1, [])
    assert "diverged" in done.said


def test_a_run_that_fails_but_advances_is_tried_again(job):
    done = job(attempts=[(0, "failed"), (50, "killed"), (60, "failed"), (90, "finished")])
    assert (done.code, len(done.trained)) == (0, 4)
    assert "error: on attempt 3" in done.said


def test_a_run_that_fails_twice_at_one_place_is_given_up(job):
    done = job(attempts=[(50, "failed"), (80, "failed"), (80, "failed"), (90, "finished")])
    assert (done.code, len(done.trained)) == (1, 3)
    assert "failed again with no checkpoint after step 80" in done.said


def test_an_earlier_state_is_not_taken_for_this_ones(job):
    """The last attempt was killed before it could say anything."""
    job.run_dir.mkdir()
    state = job.run_dir / "state"
    state.write_text("finished\n")
    os.utime(state, (1, 1))
    done = job(attempts=[(0, "killed"), (0, "killed")])
    assert (done.code, len(done.trained)) == (1, 2)


def test_of_another_jobs_run_neither_checkpoints_nor_state_count(job):
    """Two jobs started at once: this one is refused the folder, and must not take the other's progress for its own."""
    job.run_dir.mkdir()
    (job.run_dir / ".lock").write_text("process 9 on n5, SLURM job 77, since")
    done = job(attempts=[(50, "locked"), (80, "locked"), (90, "locked")])
    assert (done.code, len(done.trained), done.requeued) == (1, 2, [])
    assert "failed again before it had the run folder" in done.said


def test_a_step_that_slurm_could_not_start_is_tried_again(job):
    done = job(attempts=[(0, "unlaunched"), (9, "finished")])
    assert (done.code, len(done.trained)) == (0, 2)


def test_what_may_pass_is_tried_three_times(job, tmp_path):
    sleep = tmp_path / "bin" / "sleep"
    sleep.write_text("#!/bin/sh\n")
    sleep.chmod(0o755)
    done = job("--down", attempts=[(9, "finished")])
    assert (done.code, done.trained) == (1, [])
    assert (tmp_path / "planned").read_text().splitlines() == ["planned"] * 3


def test_a_signal_to_the_check_of_the_nodes_requeues(job):
    done = job(attempts=[(9, "finished")], BAD_NODE="signal", BAD_CODE=75)
    assert (done.code, done.trained, done.requeued) == (0, [], ["requeue 7"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")
def test_a_node_keeps_no_images_where_a_stranger_may_change_them(tmp_path):
    cache, shared = tmp_path / "cache", tmp_path / "shared"
    shared.touch()
    known = {"SHARED": shared, "RUN_DIR": tmp_path, "PYTHON": sys.executable, "GPUS": "0", "SLURMD_NODENAME": "n0"}
    known |= {"DATA_CACHE": cache, "PATH": os.environ["PATH"]}
    check = partial(
        subprocess.run,
        ["bash", str(SLURM / "node.sh"), "check"],
        env={name: str(value) for name, value in known.items()},
        capture_output=True,
        text=True,
    )
    assert (check().returncode, cache.stat().st_mode & 0o777) == (0, 0o700)
    os.chown(cache, 12345, -1)
    done = check()
    assert done.returncode == 1
    assert f"node n0: DATA_CACHE is {cache}, a folder of the user" in done.stderr


@pytest.mark.parametrize("remote", ["True", "False"])
def test_nodes_share_the_folder_unless_the_runs_is_at_a_url(job, tmp_path, remote):
    assert job(attempts=[(9, "finished")], REMOTE=remote).code == 0
    assert (tmp_path / "shared").exists() == (remote == "False")


def test_the_name_of_a_checkpoint_runs_nothing(job, tmp_path):
    """bash's arithmetic would run a command in it."""
    for name in (f"step_1+a[$(touch {tmp_path.name})]", "step_00000007"):
        (job.run_dir / "checkpoints" / name).mkdir(parents=True)
        (job.run_dir / "checkpoints" / name / "manifest.json").touch()
    done = job(attempts=[(9, "finished")])
    assert "from step 7" in done.said
    assert not (ROOT / tmp_path.name).exists()


def test_each_attempt_meets_anew(job):
    done = job(attempts=[(0, "failed"), (9, "finished")], SLURM_RESTART_COUNT=3)
    assert [line[3:] for line in done.launched] == [["7.3.1", "20071"], ["7.3.2", "20072"]]


def test_arguments_win_over_what_the_script_adds(job):
    done = job(
        "--data.cache",
        "/fast",
        "--name",
        "two words",
        attempts=[(9, "finished")],
        DATA_CACHE="/local",
        LEFT="1-02:03:04",
    )
    added = "train --data.cache /local --trainer.time_limit 1561:04"  # two minutes less
    assert done.trained[0].endswith(f"{added} --data.cache /fast --name two words")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_GPUS_PER_NODE": "0"}, ["0", "1", "cpu"]),
        ({"SLURM_GPUS_PER_NODE": "0", "PROCESSES": "4"}, ["0", "4", "cpu"]),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "a100:4"}, ["4", "4", "many_nodes"]),
        ({"SLURM_GPUS_PER_NODE": "", "GPUS": "8", "SLURM_NNODES": "1"}, ["8", "8", "one_node"]),
        ({"SLURM_GPUS_ON_NODE": "1", "SLURM_NNODES": "1"}, ["1", "1", "one_gpu"]),
    ],
)
def test_the_launch_follows_from_nodes_and_gpus(job, environment, expected):
    gpus, processes, configuration, *_ = job(attempts=[(9, "finished")], **environment).launched[0]
    assert [gpus, processes, Path(configuration).stem] == expected


def test_a_dry_run_plans_and_looks_at_the_nodes_only(job):
    done = job("--dry_run")
    assert (done.code, done.trained) == (0, [])
    assert "planned for 2" in done.said


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"PYTHON": "/no/python"}, [], "/no/python does not exist: run make setup"),
        ({"SLURM_GPUS_PER_NODE": ""}, [], "GPUS must be the number of GPUs per node"),
        ({"REPO": "/no/where"}, [], "submit from the repository"),
        ({"ACCELERATE_CONFIG": "/no.yaml"}, [], "ACCELERATE_CONFIG is /no.yaml"),
        ({}, ["--mistake"], "no such setting"),
        ({"PROCESSES": "3"}, ["--odd"], "6 processes do not fit"),
        ({"BAD_NODE": "has no GPU"}, [], "node n1: has no GPU"),
        ({"RUN": "/proc/run"}, [], "the run folder /proc/run cannot be written"),
        (
            {"script": "array.sh", "SLURM_ARRAY_TASK_ID": "2"},
            ["a.yaml", "b.yaml"],
            "use sbatch --array 0-1 ... for 2 recipes",
        ),
        ({"script": "array.sh"}, ["a.yaml", "b.yaml"], "sbatch --array 0-1"),
        ({"script": "array.sh", "SLURM_ARRAY_TASK_ID": "0"}, [], "a recipe is missing"),
        (
            {"script": "array.sh", "SLURM_ARRAY_TASK_ID": "0"},
            ["a.yaml", "b.yaml", "--", "--trainer.run_dir", "x"],
            "the same folder for 2 recipes",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_trains(job, environment, arguments, message):
    done = job(*arguments, attempts=[(9, "finished")], **environment)
    assert (done.code, done.trained, done.requeued) == (2, [], [])
    assert message in done.said
