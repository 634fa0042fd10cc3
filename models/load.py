"""A trained system from a run's folder, in two lines: `system = models.load("runs/digits-vae")`."""

import json
from pathlib import Path

import safetensors.torch

from models.system import System


def checkpoint_of(path: str | Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run's folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if (path / "manifest.json").exists():
        return path
    found = sorted((path / "checkpoints").glob("step_*"))
    if not found:
        raise ValueError(
            f"{path} is neither a checkpoint nor a run's folder with one (expected manifest.json or checkpoints/step_*)"
        )
    return found[-1]


def load(path: str | Path) -> System:
    """The system of a checkpoint, or of a run's newest one, in eval mode on the CPU, its averaged weights in place.

    Raises:
        ValueError: there is no checkpoint, or its files are damaged.
    """
    import jsonargparse

    path = checkpoint_of(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--system", type=System)
        settings = manifest["configuration"]["system"]
        for name in ("perceptual", "perceptual_weight", "perceptual_weights"):  # a training loss, needed no more
            settings.get("init_args", {}).pop(name, None)
        system = parser.instantiate(parser.parse_object({"system": settings})).system
        for name, network in system.networks().items():
            averaged = path / f"ema.{name}.safetensors"
            kept = averaged if averaged.exists() else path / f"{name}.safetensors"
            network.load_state_dict(safetensors.torch.load_file(kept))
    except Exception as error:  # each part of a damaged file has an error of its own
        raise ValueError(f"checkpoint {path} cannot be loaded: {error}") from error
    return system.eval().requires_grad_(False)
