"""The pages about other tools: each command and each line of Python on them runs, in order, on tiny runs."""

import importlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

from data.prepare.build import prepare
from data.shards.reader import Shards

USING = "docs/using-models.md"
PAGES = [
    pytest.param("README.md", "From and to other tools", id="README"),
    pytest.param(USING, "Start from weights", id="weights"),
    pytest.param(USING, "Export a model", id="export", marks=pytest.mark.slow),
    pytest.param(USING, "Encode a data set to latents", id="encode"),
]
RUNS = {"runs/digits-vaegan-ternary": "VAEGAN", "runs/photos": "VAEGAN"}  # what stands for the runs that a page names
SHORTER = {"trainer.export": ["--num", "16"], "trainer.encode": ["--workers", "0"]}
SHORT = ["--evaluate.every", "0", "--data.size", "32", "--data.channels", "1", "--data.workers", "0"]
NEW = ["--trainer.batch_size", "2", "--trainer.steps", "1"]
SMALL_KL = ["--system.networks.latent_stride", "2", "--system.networks.blocks", "1", "--data.size", "[32, 48]"]


@pytest.fixture
def do(here, tiny_run, digits, tmp_path, monkeypatch):
    """Run a command as it is written, in a folder with tiny runs and a few digits; training makes few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "PHOTOS").mkdir()
    for i in range(16):
        (tmp_path / "PHOTOS" / f"{i}.png").write_bytes(Shards(digits / "test").image(i))
    prepare("PHOTOS", tmp_path / "datasets" / "photos", test_fraction=0.5)
    (tmp_path / "datasets" / "clothing256").symlink_to("photos")
    for name, system in RUNS.items():
        (tmp_path / name).symlink_to(tiny_run(system))

    def run(words: list[str]) -> None:
        match words:
            case ["python", "-m", module, *arguments]:
                importlib.import_module(f"{module}.command").main([*arguments, *SHORTER.get(module, [])])
            case ["python", "trainer/main.py", *arguments]:
                short = [*SHORT, *(["--trainer.steps", "4"] if "--config" in arguments else NEW)]
                short += SMALL_KL if "kl" in arguments else []
                done = here(*arguments, *short, small=[])
                assert done.returncode == 0, done.stderr
            case ["cp", *_]:
                subprocess.run(words, check=True)
            case _:
                raise AssertionError(f"no such command is known here: {shlex.join(words)}")

    return run


@pytest.mark.parametrize(("page", "title"), PAGES)
def test_the_commands_of_a_page_run(do, page, title):
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", (ROOT / page).read_text(), re.M | re.S)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", section, re.M | re.S)
    assert blocks
    for language, text in blocks:
        if language == "python":
            exec(compile(text, page, "exec"), {})
        else:
            for line in text.replace("\\\n", " ").splitlines():
                do(shlex.split(line, comments=True))
