"""LPIPS of two images."""

import torch
from torch import Tensor

from models.networks.perceptual import Perceptual
from trainer.batch import normalize


class LPIPS:
    """LPIPS of uint8 images (Zhang et al. 2018) by torchvision's file of vgg16 weights, which `setting` names.

    Raises:
        ValueError: the file is missing, or holds other weights.
    """

    name = "lpips_vgg"

    def __init__(self, weights: str, device: torch.device, setting: str = "evaluate.lpips"):
        self.network = Perceptual("lpips", weights, setting).to(device)
        self.sha256 = self.network.sha256

    def __call__(self, image: Tensor, other: Tensor) -> Tensor:
        """Return the distances [n] of images [n, 1 or 3, h, w] of at least 16 pixels a side."""
        return self.network.each(normalize(image), normalize(other))
