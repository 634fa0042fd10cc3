"""docs/tutorial.md, followed from its first command to its last, on few images and for few steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, THREADS
from PIL import Image

SET_UP = "make setup\n. .venv/bin/activate\n"  # of the environment that this test runs in
SHORTER = {"--trainer.steps 2000": "--trainer.steps 2", "--evaluate.every 500": "--evaluate.every 2"}
SHORTER |= {"--evaluate.num 300": "--evaluate.num 8 --trainer.batch_size 4", "--num 64": "--num 4"}


@pytest.fixture
def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of code of the tutorial."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.M | re.S)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 40 colour images of several sizes, among them a file that is none."""
    draws = np.random.default_rng(0)
    folder = tmp_path / "PHOTOS"
    folder.mkdir()
    for i in range(40):
        pixels = draws.integers(0, 256, (70 + i, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def test_what_is_tried_is_what_is_trained(blocks):
    tried, trained = (text for _, text in blocks if text.startswith("python trainer/main.py"))
    assert tried.replace(" --dry_run", "") == trained


@pytest.mark.slow
def test_a_reader_gets_from_photos_to_an_export(blocks, photos, monkeypatch, tmp_path):
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": THREADS, "ACCELERATE_USE_CPU": "true"}
    assert blocks[0] == ("", SET_UP)
    for language, text in blocks[1:]:
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        if language == "python":
            exec(compile(text, "docs/tutorial.md", "exec"), scope := {})
            assert scope["images"].shape == (8, 3, 64, 64)
        else:
            done = subprocess.run(["bash", "-euc", text], env=os.environ | settings, capture_output=True, text=True)
            assert done.returncode == 0, f"{text}\n{done.stderr}"
    expected = (
        "runs/photos/report.html out/samples out/reconstructions out/strips out/photos/README.md out/photos-samples"
    )
    assert all((tmp_path / name).exists() for name in expected.split())
