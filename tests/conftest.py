"""Fixtures: the digits as shards, a small batch, and the real program in a subprocess."""

import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from data.prepare import prepare
from data.shards import Shards
from models import manifest
from trainer.config import Data, configure
from trainer.extractor import fit

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate.yaml")),
    *("--num_cpu_threads_per_process", "1"),
]
NETWORKS = ["--system.networks.family", "dcgan", "--system.networks.width", "8", "--system.latent_dim", "4"]
SMALL = [
    *("--data.channels", "1", "--data.workers", "0"),
    *("--trainer.batch_size", "8", "--trainer.log_every", "2", "--evaluate.every", "0"),
]


def pytest_configure(config) -> None:
    """Every test but those for GPUs is of a CPU, also where there are GPUs."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def leave() -> None:
    """End a rank of a test as trainer/main.py ends a run's."""
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def reseal(checkpoint: Path, **changes) -> None:
    """Make a checkpoint's checksums right again, after its files were changed: as whoever sends it on could."""
    path = checkpoint / "manifest.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"} | changes
    for name in content.get("files", ()):
        content["files"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    path.write_bytes(manifest.sealed(content))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's digits: a folder with `train` and `test` shards."""
    out = tmp_path_factory.mktemp("datasets") / "digits"
    prepare("digits", out)
    return out


@pytest.fixture(scope="session")
def data(digits) -> Data:
    """The digits, as they are read in tests of scores."""
    return Data(str(digits / "train"), str(digits / "test"), 32, 1, 0)


@pytest.fixture(scope="session")
def demo_cnn(data, tmp_path_factory) -> Path:
    """A demo-cnn of the digits, trained for half its steps."""
    path = tmp_path_factory.mktemp("extractor") / "demo-cnn.safetensors"
    fit([Shards(data.train)], [Shards(data.test)], data, path, steps=300)
    return path


@pytest.fixture(scope="session")
def command(digits):
    """Of trainer/main.py on the digits with small settings, and its environment; `processes`: 0 is without a launcher,
    `launch` are the launcher's own options."""

    def make(*arguments, processes: int = 0, small=NETWORKS, env=None, launch=()) -> dict:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(env or {})}
        start = [sys.executable]
        if processes:
            several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
            start = [*LAUNCH, *several, "--num_processes", str(processes), *launch]
        data = ["--data.train", str(digits / "train"), "--data.test", str(digits / "test"), *SMALL, *small]
        settings = [*(data if small else []), *map(str, arguments)]
        return {"args": [*start, str(ROOT / "trainer" / "main.py"), *settings], "env": environment}

    return make


@pytest.fixture(scope="session")
def main(command):
    """Run trainer/main.py: `main("--system", "AE")`, `processes=2` for two ranks of the real launcher."""

    def run(*arguments, cwd=ROOT, **options):
        return subprocess.run(**command(*arguments, **options), capture_output=True, text=True, cwd=cwd, timeout=240)

    return run


class Ranks:
    """Running ranks of one world."""

    def __init__(self, warm, pids: list[int], output: Path):
        self.warm, self.pids, self.output = warm, pids, output
        self.codes: dict[int, int] = {}

    def __call__(self, signal_: int, *which: int, kill=os.kill) -> None:
        """Send a signal to some ranks, or to all; `kill=os.killpg`: to their workers, too."""
        for rank in which or range(len(self.pids)):
            with suppress(ProcessLookupError):
                kill(self.pids[rank], signal_)

    def wait(self) -> SimpleNamespace:
        """Until all have ended: what they wrote, and their exit codes."""
        while len(self.codes) < len(self.pids):
            pid, code = ask(self.warm, "")
            if pid in self.pids:  # others were left behind by a failed test
                self.codes[pid] = code
        codes = [self.codes[pid] for pid in self.pids]
        return SimpleNamespace(returncode=max(codes, key=abs), codes=codes, stderr=self.output.read_text())


def ask(warm: subprocess.Popen, question: str):
    warm.stdin.write(f"{question}\n")
    warm.stdin.flush()
    return json.loads(warm.stdout.readline())


@pytest.fixture(scope="session")
def warm():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "warm.py")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment, cwd=ROOT) as process:
        process.stdout.readline()  # it has imported all
        yield process
        process.kill()


@pytest.fixture
def ranks(warm, digits, tmp_path):
    """Start trainer/main.py's work as a launcher's ranks, which have imported everything already: seconds less than
    `main`, each a process of its own, but without a launcher; returns `Ranks`. `faults`: code that ranks run first."""
    outputs = (tmp_path / f"output.{i}" for i in itertools.count())

    def start(*arguments, processes: int = 1, small=NETWORKS, faults=None) -> Ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        data = ["--data.train", str(digits / "train"), "--data.test", str(digits / "test"), *SMALL, *small]
        output, pids = next(outputs), []
        for rank in range(processes):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            environment = {key: str(value) for key, value in world.items()} if processes > 1 else {}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            question = {"arguments": [*data, *map(str, arguments)], "environment": environment, "output": str(output)}
            question |= {"fault": (faults or {}).get(rank, "")}
            pids.append(ask(warm, json.dumps(question)))
        return Ranks(warm, pids, output)

    return start


@pytest.fixture
def here(digits, capsys):
    """Like `main`, but in this process, which saves the seconds of its imports."""

    def run(*arguments, small=NETWORKS) -> SimpleNamespace:
        from trainer.train import train

        data = ["--data.train", str(digits / "train"), "--data.test", str(digits / "test"), *SMALL, *small]
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        try:
            train(configure([*data, *map(str, arguments)]))
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return SimpleNamespace(returncode=code, stderr=capsys.readouterr().err)

    return run


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
