"""Fixtures: the digits as shards, a small batch, and the real program in a subprocess."""

import fcntl
import gc
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from sample_images import flat

from data.prepare import prepare
from data.shards.reader import Shards, write
from models import manifest
from trainer.config.parser import configure
from trainer.config.settings import DataConfig

ROOT = Path(__file__).resolve().parents[1]
THREADS = os.environ.get("OMP_NUM_THREADS", "1")  # every test must pass on any number
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate.yaml")),
    *("--num_cpu_threads_per_process", "1"),
]
NETWORKS = ["--system.networks.family", "dcgan", "--system.networks.width", "8", "--system.latent_dim", "4"]
CYCLE = ["--system.width", "8", "--system.blocks", "1", "--system.pool", "4"]
KL = ["--system.networks.family", "kl", "--system.networks.multipliers", "[1, 1, 1]", "--system.networks.blocks", "1"]
KL += ["--system.networks.patches", "true", "--system.latent_dim", "4", "--trainer.batch_size", "2"]
TRAIN = """
from trainer.config.parser import configure
from trainer.train import train
raise SystemExit(train(configure(arguments)))
"""
SMALL = [
    *("--data.channels", "1", "--data.workers", "0"),
    *("--trainer.batch_size", "8", "--trainer.log_every", "2", "--evaluate.every", "0", "--trainer.trackers", "[]"),
]
BOARD = ["--trainer.trackers", "[tensorboard]"]  # whose pages take a quarter of a second a run


def wait_until(condition, seconds: float = 120) -> None:
    """Wait for what must come; the limit, far above what a busy machine takes, ends a test that waits in vain."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def pytest_configure(config) -> None:
    """Every test but those for GPUs is of a CPU, also where there are GPUs."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Python need not look again and again whether what was imported is garbage, which takes a tenth of the time."""
    gc.freeze()


def reseal(checkpoint: Path, **changes) -> None:
    """Make a checkpoint's checksums right again, after its files were changed: as whoever sends it on could."""
    path = checkpoint / "manifest.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"} | changes
    for name in content.get("files", ()):
        content["files"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    path.write_bytes(manifest.sealed(content))


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Make a file or folder once for all of pytest's processes: `once(name, make)` calls `make(path)` if it has to."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent

    def path_of(name: str, make) -> Path:
        path = shared / name
        with open(shared / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(path)
        return path

    return path_of


@pytest.fixture(scope="session")
def digits(once) -> Path:
    """scikit-learn's digits: a folder with `train` and `test` shards."""
    return once("digits", lambda path: prepare("digits", path))


@pytest.fixture
def numbered(tmp_path) -> Shards:
    """50 flat images whose grey is their number, in shards of 7."""
    write(
        tmp_path / "numbered",
        ({"__key__": f"{i:03d}", "png": flat(i), "cls": str(i % 3)} for i in range(50)),
        per_shard=7,
    )
    return Shards(tmp_path / "numbered")


@pytest.fixture(scope="session")
def data(digits) -> DataConfig:
    """The digits, as they are read in tests of scores."""
    return DataConfig(str(digits / "train"), str(digits / "test"), 32, 1, 0)


@pytest.fixture(scope="session")
def demo_cnn(data, once) -> Path:
    """A demo-cnn of the digits, trained for a sixth of its steps: 98 % of the held-out ones are told."""
    from trainer.evaluate.extractors.demo_cnn import (
        fit,  # it takes seconds to import, in each process that a test starts
    )

    train, test = [Shards(data.train)], [Shards(data.test)]
    return once("demo-cnn.safetensors", lambda path: fit(train, test, data, path, steps=100))


@pytest.fixture(scope="session")
def vgg16(tmp_path_factory) -> Path:
    """A file of VGG16's weights: random ones in its convolutions, and zeros, of which one is written, behind them."""
    import torchvision

    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).state_dict()
    weights = {
        name: torch.randn(value.shape) / value[0].numel() ** 0.5
        if name.startswith("features.")
        else torch.zeros(()).expand(value.shape)
        for name, value in shapes.items()
    }
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save(weights, path)
    return path


@pytest.fixture
def torchmetrics_lpips(vgg16, monkeypatch) -> torch.nn.Module:
    """torchmetrics' LPIPS, with its own linear layers and that file's VGG16."""
    from torchmetrics.functional.image.lpips import _LPIPS

    for draw in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(f"torch.nn.init.{draw}", lambda tensor, *_, **__: tensor)  # to be replaced anyway
    network = _LPIPS(net="vgg", pnet_rand=True)
    weights = torch.load(vgg16)
    names = {key: f"features.{key.split('.', 1)[1]}" for key in network.net.state_dict()}
    network.net.load_state_dict({key: weights[name] for key, name in names.items()})
    return network


@pytest.fixture(scope="module")
def s3():
    """An S3 API on loopback, to which environment variables lead; fsspec's file system of it."""
    import fsspec
    from moto.server import ThreadedMotoServer

    made = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in keys.items():
            patch.setenv(key, value)
        yield fsspec.filesystem("s3", use_listings_cache=False)
    made.stop()


@pytest.fixture(scope="session")
def command(digits):
    """Of trainer/main.py on the digits with small settings, and its environment; `processes`: 0 is without a launcher,
    `launch` are the launcher's own options."""

    def make(*arguments, processes: int = 0, small=NETWORKS, env=None, launch=()) -> dict:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"OMP_NUM_THREADS": THREADS, "ACCELERATE_USE_CPU": "true", **(env or {})}
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


class Warm:
    """A process that has imported the trainer and forks others: see warm.py."""

    def __init__(self, path: Path):
        self.path = path

    def fork(self, code: str, environment: dict[str, str], output: Path) -> int:
        return self._ask({"code": code, "environment": environment, "output": str(output)})

    def wait(self, pid: int) -> int:
        """The exit code of a fork, when it has ended."""
        while (code := self._ask(pid)) is None:
            time.sleep(0.005)
        return code

    def _ask(self, question: dict | int) -> int | None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.path))
            with connection.makefile("rw") as stream:
                stream.write(f"{json.dumps(question)}\n")
                stream.flush()
                return json.loads(stream.readline())


class Ranks:
    """Running ranks of one world, forked from a warm process.

    Args:
        output: file of what they print
        code: what they run: one text, or a list with one a rank
    """

    def __init__(self, warm: Warm, output: Path, code: str | list[str], processes: int = 1, env=None):
        self.warm, self.output, self.pids = warm, output, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in range(processes):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            environment = {key: str(value) for key, value in world.items()} if processes > 1 else {}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(env or {})}
            self.pids.append(warm.fork(code if isinstance(code, str) else code[rank], environment, output))

    def __call__(self, signal_: int, *which: int, kill=os.kill) -> None:
        """Send a signal to some ranks, or to all; `kill=os.killpg`: to their workers, too."""
        for rank in which or range(len(self.pids)):
            with suppress(ProcessLookupError):
                kill(self.pids[rank], signal_)

    def wait(self) -> SimpleNamespace:
        """Until all have ended: what they wrote, and their exit codes."""
        codes = [self.warm.wait(pid) for pid in self.pids]
        return SimpleNamespace(returncode=max(codes, key=abs), codes=codes, stderr=self.output.read_text())


@pytest.fixture(scope="session")
def warm(once, worker_id) -> Warm:
    """One for all of pytest's processes, which ends after the first of these."""
    environment = os.environ | {"OMP_NUM_THREADS": THREADS, "ACCELERATE_USE_CPU": "true"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    first = os.getpid() if worker_id == "master" else os.getppid()

    def start(path: Path) -> None:
        command = [sys.executable, str(ROOT / "tests" / "warm.py"), str(path), str(first)]
        process = subprocess.Popen(command, stdin=-3, stdout=-3, env=environment, cwd=ROOT, start_new_session=True)
        wait_until(lambda: path.exists() or process.poll() is not None)
        assert process.poll() is None, "it did not start"

    return Warm(once("warm", start))


@pytest.fixture
def forked(warm, tmp_path):
    """Run Python code as the ranks of one world, each a process of its own that has imported the trainer already, so
    that it starts seconds earlier than a launcher's: `forked(code, processes=2)` returns `Ranks`."""
    numbers = itertools.count()
    return lambda *code, **options: Ranks(warm, tmp_path / f"output.{next(numbers)}", *code, **options)


@pytest.fixture
def ranks(forked, digits):
    """Start trainer/main.py's work as a launcher's ranks, without a launcher; returns `Ranks`. `faults`: code that
    ranks run first."""

    def start(*arguments, processes: int = 1, small=NETWORKS, faults=None, env=None) -> Ranks:
        data = ["--data.train", str(digits / "train"), "--data.test", str(digits / "test"), *SMALL, *small]
        codes = [
            f"arguments = {[*data, *map(str, arguments)]!r}\n{(faults or {}).get(rank, '')}\n{TRAIN}"
            for rank in range(processes)
        ]
        return forked(codes, processes=processes, env=env)

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


@pytest.fixture(scope="session")
def tiny_runs() -> dict[str, Path]:
    return {}


@pytest.fixture
def tiny_run(here, digits, tiny_runs, tmp_path_factory):
    """The folder of a tiny run of a system, trained once for all tests, which do not change it; `kl`: of a VAEGAN with
    the networks of that family."""

    def folder(system: str) -> Path:
        if system not in tiny_runs:
            path = tmp_path_factory.mktemp("runs") / system
            kind = "VAEGAN" if system == "kl" else system
            train = ["--system", kind, "--trainer.steps", "3", "--trainer.run_dir", path]
            train += ["--system.binary.lr", "1e-3", "--system.classes", "10"] if system == "GAN" else []
            if system == "CycleGAN":
                sets = [f"[{digits / split}, {digits / split}]" for split in ("train", "test")]
                done = here(*train, "--data.train", sets[0], "--data.test", sets[1], small=CYCLE)
            else:
                done = here(*train, small=KL if system == "kl" else NETWORKS)
            assert done.returncode == 0, done.stderr
            tiny_runs[system] = path
        return tiny_runs[system]

    return folder


@pytest.fixture(autouse=True)
def threads():
    torch.set_num_threads(int(THREADS))
    torch.manual_seed(0)
