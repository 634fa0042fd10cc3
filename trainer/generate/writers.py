"""Pictures as files."""

import math
from pathlib import Path

import torch

from trainer.generate.panels import Blocks
from trainer.log.pictures import grid, picture


def write(blocks: Blocks, out: Path) -> set[Path]:
    """Write a PNG for each name, with its panels side by side; return the paths."""
    written = set()
    for names, panels in blocks:
        for name, *images in zip(names, *panels.values(), strict=True):
            path = out / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(torch.cat(images, dim=-1)).save(path)
            written.add(path)
    return written


def write_grid(blocks: Blocks, path: Path) -> set[Path]:
    """Write a single PNG that shows all images; return its path."""
    parts = [panels for _, panels in blocks]
    whole = {title: torch.cat([panels[title] for panels in parts]) for title in parts[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(whole, columns=math.ceil(math.sqrt(len(next(iter(whole.values())))))).save(path)
    return {path}
