"""What commands import before they tell a user's mistake: they do so little later than `import torch` takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What a name of trainer.prefetch may be is known to torch-fidelity alone, which takes seconds to import.
MISTAKES = {
    "trainer.main": ["--system", "VAE", "--trainer.batch_siz", "3"],
    "trainer.compare": ["--config", "nowhere.yaml"],
    "trainer.demo": ["nowhere", "--port", "x"],
    "trainer.encode": ["nowhere", "OUT"],
    "trainer.evaluate": ["nowhere"],
    "trainer.export": ["nowhere", "OUT"],
    "trainer.generate": ["nowhere", "--out", "OUT"],
    "trainer.prefetch": ["--nowhere"],
    "trainer.report": ["nowhere"],
    "data.index": ["nowhere", "OUT.json"],
    "data.inspect": ["nowhere"],
    "data.prepare": ["nowhere", "OUT"],
}
# Each takes from a fifth of a second to several.
SLOW = (
    "diffusers gradio matplotlib mlflow onnx onnxruntime pandas scipy sklearn tensorboard torch_fidelity torchmetrics"
)
SLOW += " torchvision transformers wandb torch._dynamo torch._inductor"
MOST = 700  # modules beside torch's; each takes a millisecond or two
# Each command runs in a fork of one process that has imported torch, which takes seconds.
PROBE = """
import json, os, runpy, sys, torch
before, found = {*sys.modules}, {}
for name, arguments in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if not (child := os.fork()):
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        sys.argv, code = [name, *arguments], None
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as stopped:
            code = stopped.code
        os.write(write, json.dumps([code, [*({*sys.modules} - before)]]).encode())
        os._exit(0)
    os.close(write)
    found[f"{name} {' '.join(arguments)}"] = json.load(os.fdopen(read))
    os.waitpid(child, 0)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, tuple[int, list[str]]]:
    """Exit code of each command line, and the modules that it has imported beside torch's."""
    lines = [*MISTAKES.items(), *((name, ["--help"]) for name in ("trainer.main", "trainer.evaluate"))]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(lines)],
        **{"capture_output": True, "text": True, "cwd": tmp_path_factory.mktemp("start"), "timeout": 240},
        env={"PYTHONPATH": str(ROOT), "PATH": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_commands_are_known():
    files = [*ROOT.glob("trainer/**/*.py"), *ROOT.glob("data/**/*.py")]
    commands = [file.relative_to(ROOT) for file in files if '__name__ == "__main__"' in file.read_text()]
    assert {".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in commands} == {*MISTAKES}


def test_no_answer_waits_for_slow_imports(imported):
    for line, (code, modules) in imported.items():
        assert code == (0 if line.endswith("--help") else 2), line
        assert not {*SLOW.split()} & {*modules}, line
        assert len(modules) < MOST, f"{line}: {len(modules)}"


def test_the_trainer_reports_a_mistake_before_it_imports_accelerate(imported):
    """And no command for data uses it at all."""
    for line, (_, modules) in imported.items():
        if line.startswith(("trainer.main", "data.", "trainer.prefetch")):
            assert "accelerate" not in modules, line


def test_torchs_threads_sleep_while_others_compute():
    """They would wait for milliseconds, and take the cores from those that compute on a busy machine."""
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import trainer, torch"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    if "GOMP_" not in done.stderr:
        pytest.skip("This torch computes with another library than GNU's OpenMP.")
    assert "GOMP_SPINCOUNT = '10000'" in done.stderr


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_threads_wait_is_the_users_choice(chosen):
    command = [sys.executable, "-c", "import os, trainer; print(os.environ.get('GOMP_SPINCOUNT'))"]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), **chosen}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120).stdout
    assert shown.strip() == chosen.get("GOMP_SPINCOUNT", "None")
