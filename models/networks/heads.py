"""Features of a trained network to logits."""

import torch
from torch import Tensor, nn

from models.networks.blocks import SLOPE, ResidualBranch, initialize
from models.networks.spectral_norm import add_spectral_norm


class Heads(nn.Module):
    """A light discriminator for each of four maps of features (Sauer et al. 2023, StyleGAN-T, section 3.2).

    GroupNorm takes the place of the paper's BatchNorm, whose statistics would depend on how a batch is split. The
    convolutions are 3x3 where the authors' code has circular ones of 9 tokens, and it always applies spectral norm,
    which is a setting here.
    """

    def __init__(self, width: int, logits: int, spectral_norm: bool = False):
        super().__init__()
        self.trunks = nn.ModuleList(nn.Sequential(_layer(width, 1), _Residual(width)) for _ in range(4))
        self.heads = nn.ModuleList(nn.Conv2d(width, logits, 1) for _ in range(4))
        initialize(self, SLOPE)
        if spectral_norm:
            add_spectral_norm(self)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map features [n, width, h, w] to the logits [n, logits, positions] of all heads."""
        parts = zip(self.trunks, self.heads, maps, strict=True)
        return torch.cat([head(trunk(features)).flatten(2) for trunk, head, features in parts], 2)


class _Residual(ResidualBranch):
    def __init__(self, width: int):
        super().__init__()
        self.branch = _layer(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)) / 2**0.5


def _layer(width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(width, width, kernel, 1, kernel // 2)
    return nn.Sequential(convolution, nn.GroupNorm(width // 32, width), nn.LeakyReLU(SLOPE))
