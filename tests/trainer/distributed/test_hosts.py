"""Two machines with addresses of their own, one launcher on each, and the network between them cut for real."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NETWORKS, ROOT, SMALL

from trainer.checkpoint import files as checkpoint_files

STEPS = 200
# In a machine of its own: its name, and what the others are called.
ENTER = 'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"'


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True)


class Hosts:
    """Network namespaces `a` and `b`, joined by a cable."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.spaces = {name: f"hosts{os.getpid()}{name}" for name in "ab"}
        self.names = folder / "hosts"
        self.names.write_text("127.0.0.1 localhost\n10.88.0.1 a\n10.88.0.2 b\n")

    def __enter__(self):
        for space in self.spaces.values():
            ip("netns", "add", space)
        ends = [("netns", space, "name", "eth0") for space in self.spaces.values()]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, space in enumerate(self.spaces.values(), 1):
            ip("-n", space, "addr", "add", f"10.88.0.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
        self.cable("up")
        return self

    def __exit__(self, *error: object) -> None:
        for space in self.spaces.values():
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=True).stdout
            for pid in map(int, pids.split()):
                os.kill(pid, signal.SIGKILL)
            ip("netns", "del", space)

    def cable(self, state: str) -> None:
        for space in self.spaces.values():
            ip("-n", space, "link", "set", "eth0", state)

    def launch(self, attempt: str, *arguments) -> dict[str, subprocess.Popen]:
        """One launcher on each, of one process."""
        launch = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "launch/accelerate/cpu.yaml"),
            *("--num_cpu_threads_per_process", "1", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"),
            *("--main_process_ip", "10.88.0.1", "--main_process_port", "29500"),
        ]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        started = {}
        for rank, (name, space) in enumerate(self.spaces.items()):
            enter = ["nsenter", f"--net=/run/netns/{space}", "unshare", "--uts", "--mount", "bash", "-ec", ENTER, "-"]
            own = ["--machine_rank", rank, ROOT / "trainer/main.py"]
            command = [*enter, self.names, name, *launch, *own, *arguments]
            with open(self.folder / f"{attempt}.{name}.log", "w") as log:
                started[name] = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
        return started

    def said(self, attempt: str) -> dict[str, str]:
        return {name: (self.folder / f"{attempt}.{name}.log").read_text() for name in self.spaces}


@pytest.fixture
def hosts(tmp_path):
    missing = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(missing) or 'no more'} (Debian: apt install iproute2 util-linux)")
    with Hosts(tmp_path) as made:
        yield made


@pytest.mark.slow
def test_when_the_network_is_cut_both_sides_say_so_and_the_restarted_run_ends_as_one_that_was_never_cut(
    hosts, main, digits, tmp_path
):
    settings = ["--system", "VAE", "--trainer.steps", STEPS, "--trainer.save_every", 10, "--trainer.timeout", 10]
    arguments = ["--data.train", digits / "train", *SMALL, *NETWORKS, *settings, "--trainer.run_dir", tmp_path / "cut"]
    checkpoints = tmp_path / "cut" / "checkpoints"

    launched = hosts.launch("first", *arguments)
    try:
        while not checkpoint_files.list_checkpoints(checkpoints):
            assert all(launcher.poll() is None for launcher in launched.values()), hosts.said("first")
        hosts.cable("down")
        codes = {name: launcher.wait(60) for name, launcher in launched.items()}
    finally:
        for launcher in launched.values():
            launcher.kill()
    said = hosts.said("first")
    assert 0 not in codes.values()
    assert "process 1 on b is gone or stands still (trainer.timeout 10 s)" in said["a"]
    assert "the machine of process 0 on a, or the network to it, is gone or stands still" in said["b"]
    assert (tmp_path / "cut" / "state").read_text() == "failed\n"
    reached = int(checkpoint_files.list_checkpoints(checkpoints)[0].name[5:])
    assert reached < STEPS

    hosts.cable("up")
    launched = hosts.launch("second", *arguments)
    assert [launcher.wait(200) for launcher in launched.values()] == [0, 0], hosts.said("second")
    assert f"Resuming at step {reached} of {STEPS}" in "".join(hosts.said("second").values())

    done = main(*settings, "--trainer.run_dir", tmp_path / "whole", processes=2)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        checkpoint_files.load(tmp_path / name / "checkpoints" / f"step_{STEPS:08d}")[0] for name in ("cut", "whole")
    )
    assert ours.keys() == theirs.keys()
    for file in theirs:
        assert ours[file].keys() == theirs[file].keys()
        assert all(ours[file][name].equal(theirs[file][name]) for name in theirs[file]), file
