"""The average of a length that was not averaged in training, made of a run's checkpoints: see trainer/posthoc.py."""

from pathlib import Path

import torch
from torch import Tensor

from models import System, manifest
from trainer.checkpoint.files import list_checkpoints
from trainer.posthoc import MISFIT, POWER, check_length, coefficients, misfit


@torch.no_grad()
def set_average(system: System, checkpoint: Path, length: float) -> None:
    """Give a system the averages of a length at a checkpoint's step, made of those of its run's checkpoints until then.

    Raises:
        ValueError: the length is out of its range, or the run kept no averages to make it of.
    """
    check_length("--ema_length", length)
    last = manifest.read(checkpoint)["step"]
    found = [(path, content) for path in list_checkpoints(checkpoint.parent) if (content := manifest.read(path))]
    end = f".{system.averaged[0]}.safetensors"
    kept = [
        (path, content, name.removesuffix(end))
        for path, content in found
        for name in sorted(content["files"])
        if content["step"] <= last and name.startswith(POWER) and name.endswith(end)
    ]
    if not kept:
        raise ValueError(
            f"--ema_length {length:g}: the run of {checkpoint} kept no averages to make others of; train with "
            "--trainer.ema_lengths [0.05,0.1] and --trainer.keep_every"
        )
    snapshots = [(int(content["step"]), float(kind.removeprefix(POWER))) for _, content, kind in kept]
    weights = coefficients(snapshots, last, length)
    if (off := misfit(snapshots, weights, last, length)) > MISFIT:
        lengths = ", ".join(f"{one:g}" for one in sorted({one for _, one in snapshots}))
        raise ValueError(
            f"--ema_length {length:g} cannot be made of averages of the lengths {lengths} in {len(snapshots)} files: "
            f"their combination would be off by {off:.0%}, and at most {MISFIT:.0%} is expected. Name a length nearer "
            "to these, or train with a smaller --trainer.keep_every and --trainer.save_every to keep more checkpoints"
        )
    for network in system.averaged:
        parts = [manifest.tensors(path, content, f"{kind}.{network}.safetensors") for path, content, kind in kept]
        for name, own in system.get_submodule(network).state_dict().items():
            terms: list[Tensor] = [weight * part[name].double() for weight, part in zip(weights, parts, strict=True)]
            own.copy_(torch.stack(terms).sum(0))
