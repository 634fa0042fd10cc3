"""The wheel, in an environment that has nothing but what it requires, used from a folder far from the repository.

PYTHONS="/path/to/python3.12 /path/to/python3.13" in the environment tries it with other versions of Python.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NETWORKS, ROOT, THREADS

PYTHONS = os.environ.get("PYTHONS", sys.executable).split()
UV = [sys.executable, "-m", "uv"]
COMMANDS = f"""
data.prepare digits digits
trainer.main --system VAEGAN {shlex.join(NETWORKS)} --data.train digits/train --data.test digits/test \
    --data.channels 1 --data.workers 0 --trainer.batch_size 8 --trainer.steps 2 --trainer.run_dir run \
    --evaluate.every 2 --evaluate.num 16 --evaluate.extractor demo-random --evaluate.metrics [fid]
trainer.report run
trainer.generate sample run --out samples --num 2
trainer.export run export --num 16
"""


def call(*words: object, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": THREADS}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copied(to: Path) -> Path:
    """A folder of what the Dockerfile copies into the image, of which the wheel must be built there, too."""
    lines = re.findall(r"^COPY (.*)$", (ROOT / "launch" / "container" / "Dockerfile").read_text(), re.M)
    to.mkdir()
    for name in (name for line in lines for name in line.split()[:-1]):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, to / name)
    return to


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_trains_reports_and_exports_without_the_repository(tmp_path, version):
    call(*UV, "build", "--quiet", "--wheel", "--out-dir", tmp_path, copied(tmp_path / "source"), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(tmp_path / "source")
    call(*UV, "venv", "--quiet", "--python", version, "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    install = ["pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "constraints.txt", wheel]
    call(*UV, *install, cwd=tmp_path)
    for line in COMMANDS.strip().splitlines():
        call(python, "-m", *shlex.split(line), cwd=tmp_path)
    found = call(python, "-c", "import models; print(models.__file__); models.load('export')", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(tmp_path / "env")
    assert (tmp_path / "run" / "report.html").stat().st_size > 0
    assert len([*(tmp_path / "samples").glob("*.png")]) == 2
