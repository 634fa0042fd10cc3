"""Latents of an image as the bytes of a shard's member: safetensors with names, or one npy array."""

import io
import json
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


def pack(latents: dict[str, Tensor], form: str) -> list[bytes]:
    """Return the latents of each of some images as bytes: equal ones give equal bytes.

    Args:
        latents: tensors [n, *shape] of one shape and type, by name: `mean`, perhaps `log_variance`, and perhaps those
            of the mirrored images after them
        form: `safetensors`, or `npy`: [copies, arrays, *shape], where the copies are the image and its mirror image,
            and the arrays mean and log-variance
    """
    first, names = {name: values[0] for name, values in latents.items()}, [*latents]
    if form == "safetensors":
        whole = safetensors.torch.save(first)
        head = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        names.sort(key=lambda name: head[name]["data_offsets"])
    else:
        stacked = torch.stack([*first.values()])
        copies, file = 1 + any(name.startswith(MIRRORED) for name in names), io.BytesIO()
        np.save(file, stacked.view(copies, -1, *stacked.shape[1:]).numpy())
        whole = file.getvalue()
    # All have the same head, which takes longer to make than numbers take to copy.
    rows = torch.cat([latents[name].flatten(1) for name in names], 1).view(torch.uint8).numpy()
    return [whole[: len(whole) - rows.shape[1]] + row.tobytes() for row in rows]


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
