"""The job scripts on a real SLURM cluster of two nodes: preempted, killed and refused jobs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import NETWORKS, ROOT, SMALL

from trainer.checkpoint import files as checkpoint_files

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")
STEPS = 240
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def eventually(true, what, seconds=240):
    """Wait until something is true."""
    until = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until, f"not within {seconds} s: {what()}"
        time.sleep(0.1)
    return found


class Cluster:
    """A running one, and what a user says to it."""

    def __init__(self, folder: Path, data: Path):
        self.folder = folder
        # One thread a process, as the run that is compared with has; no settings of the shell that started the test.
        self.environment = {"PATH": SEARCHED, "SLURM_CONF": str(folder / "slurm.conf"), "HOME": os.environ["HOME"]}
        self.environment |= {"REPO": str(ROOT), "PYTHON": sys.executable, "TMPDIR": str(folder)}
        self.data = ["--data.train", str(data / "train"), *SMALL, *NETWORKS]

    def __call__(self, *command: str, **environment: str) -> str:
        environment = self.environment | environment
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, script: str, *arguments, options=(), **environment) -> str:
        """Submit one of the job scripts; returns the job's number."""
        output = ("--output", str(self.folder / "%A.out"), "--cpus-per-task", "1", "--gpus-per-node", "0")
        path = str(ROOT / "launch" / "slurm" / script)
        command = ["sbatch", "--parsable", *output, *options, path, *map(str, arguments)]
        return self(*command, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", number)))

    def said(self, number: str) -> str:
        path = self.folder / f"{number}.out"
        return path.read_text() if path.exists() else ""

    def ended(self, number: str) -> str:
        """Wait until a job is over; returns its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return eventually(lambda: (now := self.job(number)["JobState"]) in over and now, lambda: self.said(number))

    def requeued(self, number: str, restarts: int) -> None:
        """Wait until a job was requeued so often, and have it go on now instead of in two minutes."""
        waiting = {"JobState": "PENDING", "Restarts": str(restarts)}
        eventually(lambda: waiting.items() <= self.job(number).items(), lambda: self.said(number))
        time.sleep(2)  # nodes refuse a job that starts again in the very second in which it ended
        self("scontrol", "update", f"jobid={number}", "StartTime=now")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, digits):
    missing = [name for name in NEEDED if shutil.which(name, path=SEARCHED) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(missing) or 'no more'}: make test-slurm, as root, installs them")
    folder = tmp_path_factory.mktemp("cluster")
    scripts, environment = ROOT / "tests" / "slurm", os.environ | {"PATH": SEARCHED}
    try:
        subprocess.run(["bash", scripts / "up.sh", folder], check=True, env=environment)
        yield Cluster(folder, digits)
    finally:
        subprocess.run(["bash", scripts / "down.sh", folder], check=True, env=environment)


def newest_step(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoint_files.list_checkpoints(run_dir / "checkpoints")), default=0)


def ranks(run_dir: Path) -> list[int]:
    """Processes that train there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if str(run_dir).encode() in words and words[1:2] == [b"-u"]:  # torchrun's ranks
            found.append(int(path.parent.name))
    return sorted(found)


def test_a_job_that_is_preempted_and_killed_ends_as_one_that_never_was(cluster, main, tmp_path):
    """Two nodes, a process each; USR1 as by --signal, then TERM as by preemption, then one process killed with -9."""
    run_dir = tmp_path / "job"
    settings = [
        *("--system", "VAEGAN", "--system.discriminator", "ternary", "--data.workers", 1),
        *("--trainer.steps", STEPS, "--trainer.save_every", 10),
    ]
    number = cluster.submit("many_nodes.sh", *cluster.data, *settings, "--trainer.run_dir", run_dir)

    def after(step: int) -> int:
        """Wait for a checkpoint beyond a step."""
        return eventually(lambda: (now := newest_step(run_dir)) > step and now, lambda: cluster.said(number))

    reached = [0]
    for restarts, name in enumerate(("USR1", "TERM"), 1):
        reached.append(after(reached[-1]))
        cluster("scancel", f"--signal={name}", number)
        cluster.requeued(number, restarts)
        assert (run_dir / "state").read_text() == "stopped\n"
        reached[-1] = after(reached[-1] - 1)
    reached.append(after(reached[-1]))
    os.kill(ranks(run_dir)[0], signal.SIGKILL)

    assert cluster.ended(number) == "COMPLETED"
    said = cluster.said(number)
    assert re.findall(r"attempt (\d), from step (\d+)", said)[0] == ("1", "0")
    begun = [int(step) for step in re.findall(r"attempt \d, from step (\d+)", said)]
    assert len(begun) == 4
    assert begun == sorted(set(begun))  # each goes on from beyond where the one before began
    assert begun[-1] < STEPS
    assert (run_dir / "state").read_text() == "finished\n"

    done = main(*settings, "--trainer.run_dir", tmp_path / "whole", processes=2)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        checkpoint_files.load(tmp_path / name / "checkpoints" / f"step_{STEPS:08d}")[0] for name in ("job", "whole")
    )
    assert ours.keys() == theirs.keys()
    for file in theirs:
        assert ours[file].keys() == theirs[file].keys()
        assert all(ours[file][name].equal(theirs[file][name]) for name in theirs[file]), file


def test_of_an_array_each_task_trains_its_recipe_and_one_alone_is_requeued(cluster, tmp_path):
    recipes = []
    for name in ("first", "second"):
        recipes.append(tmp_path / f"{name}.yaml")
        recipes[-1].write_text(f"system: AE\ntrainer: {{run_dir: {tmp_path / name}}}\n")
    common = [*cluster.data, "--trainer.steps", 300, "--trainer.save_every", 5]
    number = cluster.submit("array.sh", *recipes, "--", *common, options=["--array", "0-1"])
    # The last task has the number of the whole array: to requeue that would requeue both.
    eventually(lambda: any((tmp_path / "second" / "checkpoints").glob("step_*")), lambda: cluster.said(number))
    cluster("scancel", "--signal=USR1", f"{number}_1")
    cluster.requeued(f"{number}_1", 1)
    for task, restarts in ((0, "0"), (1, "1")):
        assert cluster.ended(f"{number}_{task}") == "COMPLETED"
        assert cluster.job(f"{number}_{task}")["Restarts"] == restarts
    for name, jobs in (("first", 1), ("second", 2)):
        assert (tmp_path / name / "state").read_text() == "finished\n"
        assert len(list((tmp_path / name / "logs").iterdir())) == jobs


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--config", "nowhere.yaml"], {}, "nowhere.yaml"),
        (["--system", "AE", "--trainer.stepz", 3], {}, "stepz"),
        (
            ["--system", "AE", "--trainer.batch_size", 9],
            {},
            "trainer.batch_size 9 cannot be dealt evenly to 2 processes",
        ),
        (["--system", "AE"], {"GPUS": "2"}, "error: node n1: PyTorch sees 0 GPUs, and GPUS is 2"),
    ],
)
def test_a_job_that_cannot_train_says_why_at_once(cluster, tmp_path, arguments, environment, message):
    number = cluster.submit(
        "many_nodes.sh",
        *(*cluster.data, *arguments, "--trainer.run_dir", tmp_path / "run"),
        **environment,
    )
    assert cluster.ended(number) == "FAILED"
    assert cluster.job(number)["ExitCode"] == "2:0"
    assert message in cluster.said(number)
    assert "attempt" not in cluster.said(number)
