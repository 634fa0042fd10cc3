"""Runs of `python -m trainer.generate`, in this process."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from trainer.generate.command import main


def generate(capsys, *arguments) -> SimpleNamespace:
    capsys.readouterr()
    try:
        main([*map(str, arguments)])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    return SimpleNamespace(returncode=code, out=said.out, err=said.err)


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)))
