"""Runs of `python -m trainer.generate`, and of other commands, in this process."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from trainer.generate.command import main


def generate(capsys, *arguments) -> SimpleNamespace:
    return run_command(main, capsys, *arguments)


def run_command(command, capsys, *arguments) -> SimpleNamespace:
    """Exit code and outputs of a command's `main`."""
    capsys.readouterr()
    try:
        command([*map(str, arguments)])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    return SimpleNamespace(returncode=code, out=said.out, err=said.err)


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)))
