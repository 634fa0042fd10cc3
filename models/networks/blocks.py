"""Parts that the networks share."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.networks.config import NetworkConfig, Norm

SLOPE = 0.2  # of every leaky ReLU


class Family(NamedTuple):
    """How the networks of a family halve and double the size of an image.

    Args:
        down: (config, image_size, channels, levels) -> a module per level, which halves the size and has
            `config.channels(level)` outputs
        up: (config, widths, size, channels) -> modules that double the size from `size` on, and the last convolution,
            with `channels` outputs; widths are the channels of the levels, the widest first
        slope: negative slope of the decoder's (leaky) ReLUs
        options: names of settings that not every family has and this one uses
    """

    down: Callable[[NetworkConfig, int, int, int], list[nn.Module]]
    up: Callable[[NetworkConfig, list[int], int, int], tuple[list[nn.Module], nn.Conv2d | nn.ConvTranspose2d]]
    slope: float = SLOPE
    options: tuple[str, ...] = ()


class ResidualBranch(nn.Module):
    """A module x + branch(x) that can start as the identity."""

    def zero_init_residual(self) -> None:
        raise NotImplementedError


def normalization(kind: Norm, channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, channels // 8), channels) if kind == "group" else nn.Identity()


def initialize(network: nn.Module, slope: float, zero_init_residual: bool = True) -> None:
    """Draw weights from He's normal initialization and set biases to zero (He et al. 2015, eq. 14).

    `slope` is the negative slope of the network's ReLUs. Residual branches start at 0 unless `zero_init_residual` is
    off, as it must be before spectral norm, which cannot normalize 0.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            # A stride-2 transposed convolution feeds each output from a quarter of its kernel.
            mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(module, nn.ConvTranspose2d) else "fan_in"
            nn.init.kaiming_normal_(module.weight, a=slope, mode=mode)
            if isinstance(module, nn.ConvTranspose2d):
                module.weight.data.mul_(2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in network.modules():
            if isinstance(module, ResidualBranch):
                module.zero_init_residual()


def minibatch_stddev(x: Tensor, group: int) -> Tensor:
    """Append to x [n, c, h, w] the mean standard deviation in each run of `group` images (Karras et al. 2018, 3).

    Raises:
        ValueError: n is no multiple of the group.
    """
    if len(x) % group:
        raise ValueError(f"minibatch_stddev {group} does not divide a micro-batch of {len(x)} images")
    runs = (x if x.dtype == torch.float64 else x.float()).unflatten(0, (-1, group))  # 1e-8 is 0 in fp16
    deviation = (runs.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    added = deviation.to(x.dtype).repeat_interleave(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    return torch.cat([x, added], 1)
