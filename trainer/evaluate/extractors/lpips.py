"""LPIPS of two images."""

import torch
from torch import Tensor

from models.networks.perceptual import Perceptual
from trainer.batch import normalize


class LPIPS:
    """LPIPS of uint8 images, by VGG16 (Zhang et al. 2018), of weights from a file.

    Raises:
        ValueError: the file is missing, or holds other weights.
    """

    name = "lpips_vgg"

    def __init__(self, weights: str, device: torch.device):
        self.network = Perceptual("lpips", weights, "evaluate.lpips").to(device)
        self.sha256 = self.network.sha256

    def __call__(self, image: Tensor, other: Tensor) -> Tensor:
        """[n] of images [n, 1 or 3, h, w], of 16 pixels a side or more."""
        return self.network.each(normalize(image), normalize(other))
