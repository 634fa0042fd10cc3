"""Parts that the networks share."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from models.networks.config import ImageSize, NetworkConfig, Norm

OPTIONS = ("norm", "blocks", "attention", "multipliers", "quant_conv", "mid_attention")  # settings of some families
SLOPE = 0.2  # of every leaky ReLU


class Family(NamedTuple):
    """How the networks of a family halve and double the size of an image.

    Args:
        down: (config, side, channels, levels) -> a module per level, which halves the size and has
            `config.channels(level)` outputs; `side` is the image's smaller side
        up: (config, widths, side, channels) -> modules that double the size, one per width but for the last
            convolution, which has `channels` outputs; widths are the channels of the levels, the widest first
        slope: negative slope of the decoder's (leaky) ReLUs
        options: the settings among `OPTIONS` that it uses
        encoder: (config, image_size, channels, outputs) -> a network in place of `Encoder`
        decoder: (config, image_size, channels, latent_dim) -> a network in place of `Decoder`; `last` is the layer that
            makes the images
        bounded: whether all decoded images are in [-1, 1]
    """

    down: Callable[[NetworkConfig, int, int, int], list[nn.Module]]
    up: Callable[[NetworkConfig, list[int], int, int], tuple[list[nn.Module], nn.Conv2d | nn.ConvTranspose2d]]
    slope: float = SLOPE
    options: tuple[str, ...] = ("norm",)
    encoder: Callable[[NetworkConfig, ImageSize, int, int], nn.Module] | None = None
    decoder: Callable[[NetworkConfig, ImageSize, int, int], nn.Module] | None = None
    bounded: bool = True


class ResidualBranch(nn.Module):
    """A module x + branch(x).

    Args:
        recomputable: whether activation checkpointing computes it again in backward passes
    """

    recomputable: ClassVar[bool] = True

    def zero_init_residual(self) -> None:
        """Start as the identity, if this module can."""


class ClassVectors(nn.Linear):
    """A learned vector for each class, as a matrix, which spectral norm can divide by its largest singular value."""

    def __init__(self, classes: int, width: int):
        super().__init__(classes, width, bias=False)

    def forward(self, label: Tensor | None) -> Tensor:
        """Map classes, int64 [n], to [n, width]; raise a ValueError if there are none."""
        if label is None:
            raise ValueError(
                f"system.classes is {self.in_features}: give the class of each image, int64 [n] from 0 to "
                f"{self.in_features - 1}, as `label`"
            )
        return embedding(label, self.weight.T)


class InstanceNorm(nn.InstanceNorm2d):
    """Instance normalization (Ulyanov et al. 2016), computed as group normalization with a group for each channel.

    The gradients of torch 2.14's own are wrong, without a word, for a single image in channels_last.
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x, x.shape[1], eps=self.eps)


def normalization(kind: Norm, channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, channels // 8), channels) if kind == "group" else nn.Identity()


def initialize(network: nn.Module, slope: float, zero_init_residual: bool = True) -> None:
    """Draw weights from He's normal initialization for ReLUs with a negative slope (He et al. 2015, eq. 14).

    Residual branches start at 0 unless spectral norm follows, which cannot normalize 0.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            transposed = isinstance(module, nn.ConvTranspose2d)
            nn.init.kaiming_normal_(module.weight, a=slope, mode="fan_out" if transposed else "fan_in")
            if transposed:  # with stride 2, each output is fed from a quarter of the kernel
                module.weight.data.mul_(2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in network.modules():
            if isinstance(module, ResidualBranch):
                module.zero_init_residual()


def minibatch_stddev(x: Tensor, group: int) -> Tensor:
    """Append to x [n, c, h, w] the mean standard deviation in each run of `group` images (Karras et al. 2018, 3)."""
    if len(x) % group:
        raise ValueError(f"minibatch_stddev {group} does not divide a micro-batch of {len(x)} images")
    runs = (x if x.dtype == torch.float64 else x.float()).unflatten(0, (-1, group))  # 1e-8 is 0 in fp16
    deviation = (runs.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    added = deviation.to(x.dtype).repeat_interleave(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    return torch.cat([x, added], 1)
