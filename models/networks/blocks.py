"""Parts that the networks share."""

from typing import Literal

from torch import nn

Norm = Literal["none", "group"]


def halvings(image_size: int) -> tuple[int, int]:
    """(size, n): the image size is size * 2^n, with size from 4 to 7: where a network ends or begins.

    Raises:
        ValueError: the size is out of [32, 256] or not such a product.
    """
    size, n = image_size, 0
    while size > 7 and size % 2 == 0:
        size, n = size // 2, n + 1
    if not 32 <= image_size <= 256 or not 4 <= size <= 7:
        raise ValueError(
            f"an image size of {image_size} pixels does not fit the networks: expected 4, 5, 6 or 7 times a power of "
            "two, from 32 to 256 (such as 32, 48, 64, 96, 128, 256); change data.size"
        )
    return size, n


def channels_at(width: int, level: int) -> int:
    """Channels after `level` + 1 halvings: the width doubles with each, up to eight times."""
    return width * 2 ** min(level, 3)


def normalization(kind: Norm, channels: int) -> nn.Module:
    """The layer that `norm` names. Never BatchNorm: batch statistics would make a run depend on the world size."""
    return nn.GroupNorm(max(1, channels // 8), channels) if kind == "group" else nn.Identity()


def initialize(network: nn.Module, slope: float) -> None:
    """He's normal initialisation for a network of (leaky) ReLUs, zero biases (He et al. 2015, eq. 14)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            # A stride-2 transposed convolution feeds each output from a quarter of its kernel.
            mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(module, nn.ConvTranspose2d) else "fan_in"
            nn.init.kaiming_normal_(module.weight, a=slope, mode=mode)
            if isinstance(module, nn.ConvTranspose2d):
                module.weight.data.mul_(2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
