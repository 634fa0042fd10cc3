"""What a feature extractor is, and helpers of several."""

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

BATCH = 64  # images that an extractor is given at once


class Extractor(Protocol):
    name: str
    dim: int
    classes: int  # 0: it names none, so there is no inception score
    sha256: str  # of its weights' file
    resize: str  # how it brings images to the size of its network

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]: ...


def coloured(image: Tensor) -> Tensor:
    """Images [n, 1 or 3, h, w] in three channels."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image


def bicubic(image: Tensor, size: int) -> Tensor:
    """uint8 images, resized by Pillow's bicubic filter, but that it clips between its two passes and this does not."""
    resized = interpolate(image.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def digest_of(network: nn.Module) -> str:
    """sha256 of a network's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
