"""Sizes of images and of maps of codes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps [n, channels, h, w] in another size [h, w], by antialiased bilinear interpolation.

    It is a product with matrices, as torch's own interpolation has no deterministic gradient on CUDA.
    """
    with torch.autocast(x.device.type, enabled=False):
        for side, axis in zip(size, (2, 3), strict=True):
            if side != x.shape[axis]:
                eye = torch.eye(x.shape[axis], dtype=x.dtype, device=x.device)[None, None]
                matrix = interpolate(eye, (side, x.shape[axis]), mode="bilinear", antialias=True)[0, 0]
                x = (x.transpose(axis, 3) @ matrix.T).transpose(axis, 3)
    return x
