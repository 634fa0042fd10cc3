"""The interface of feature extractors, and helpers that several of them use."""

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

BATCH = 64  # images that an extractor gets at once


class Extractor(Protocol):
    """A network that maps images, uint8 [n, 1 or 3, h, w], to float32 features [n, D] and logits [n, K]."""

    name: str  # part of every score's name
    dim: int  # D
    classes: int  # K, or 0 if the logits are no classes, so that there is no inception score
    sha256: str  # checksum of the weights
    resize: str  # how the extractor brings images to its size

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]: ...


def to_rgb(image: Tensor) -> Tensor:
    """Return images [n, 1 or 3, h, w] with three channels."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image


def resize(image: Tensor, size: int, mode: str) -> Tensor:
    """Return uint8 images, resized as by Pillow's filter `mode`, except that Pillow also clips between its passes."""
    resized = interpolate(image.float(), (size, size), mode=mode, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def weights_sha256(network: nn.Module) -> str:
    """Return the sha256 of a network's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
