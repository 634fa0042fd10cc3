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


def strip(path: Path, side: int = 32) -> tuple[torch.Tensor, ...]:
    """The grey pictures [side, side] in a row of a titled grid, which shows smaller ones than 64 pixels enlarged."""
    scale, gap, title = 64 // side, 2, 20
    shown = torch.from_numpy(np.array(Image.open(path).convert("L")))[title:]
    assert shown.shape[0] == side * scale
    return tuple(column[::scale, : side * scale : scale] for column in shown.split(side * scale + gap, 1))
