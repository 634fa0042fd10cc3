"""Latents of an image as the bytes of a shard's member: safetensors with names, or one npy array."""

import io
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

FORMATS = ("safetensors", "npy")
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NPY = b"\x93NUMPY"  # the first bytes of an npy file
MIRRORED = "mirrored_"  # before the names of a mirrored image's latents


class Description(NamedTuple):
    """What is counted of a sample's latents: places across and down (1 if they are no map), type and format."""

    width: int
    height: int
    mode: str
    format: str


def pack(latents: dict[str, Tensor], form: str) -> bytes:
    """Return latents as bytes: equal ones give equal bytes.

    Args:
        latents: tensors of one shape and type, by name: `mean`, perhaps `log_variance`, and perhaps those of the
            mirrored image after them
        form: `safetensors`, or `npy`: [copies, arrays, *shape], where the copies are the image and its mirror image,
            and the arrays mean and log-variance
    """
    if form == "safetensors":
        return safetensors.torch.save(latents)
    file, copies = io.BytesIO(), 1 + any(name.startswith(MIRRORED) for name in latents)
    stacked = torch.stack([*latents.values()])
    np.save(file, stacked.view(copies, -1, *stacked.shape[1:]).numpy())
    return file.getvalue()


def unpack(content: bytes) -> dict[str, Tensor]:
    """Return the latents in some bytes, by name as `pack` takes them; a stranger may have made them.

    Raises:
        ValueError: They are no latents, or damaged.
    """
    try:
        if content.startswith(NPY):
            array = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
            names = [f"{copy}{name}" for copy in ("", MIRRORED) for name in ("mean", "log_variance")[: array.shape[1]]]
            found = dict(zip(names, array.flatten(0, 1), strict=False))
        else:
            found = safetensors.torch.load(content)
        mean = found["mean"]
    except Exception as error:  # each library raises nearly anything on damaged bytes
        raise ValueError(f"it holds no latents: {error or type(error).__name__}") from error
    if any(one.shape != mean.shape or one.dtype != mean.dtype for one in found.values()):
        raise ValueError("its latents have several shapes or types")
    if not mean.isfinite().all():
        raise ValueError("its latents are not finite")
    return found


def describe(latents: dict[str, Tensor], form: str) -> Description:
    """Return what is counted of latents."""
    mean = latents["mean"]
    names: dict[Any, str] = {kind: name for name, kind in TYPES.items()}
    width, height = (mean.shape[-1], mean.shape[-2]) if mean.dim() > 1 else (1, 1)
    return Description(width, height, names.get(mean.dtype, str(mean.dtype)), form)
