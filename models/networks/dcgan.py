"""The dcgan family: strided convolutions, light enough for CPUs (Radford et al. 2016)."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import nn

from models.networks.blocks import SLOPE, Family, normalization
from models.networks.config import NetworkConfig


def strided(
    config: NetworkConfig, channels: int, strides: list[int], norm: Callable[[int], nn.Module] | None
) -> list[nn.Module]:
    """Return a 4x4 convolution for each stride, normalized but for the first."""
    made: list[nn.Module] = []
    for level, stride in enumerate(strides):
        width = config.channels(level)
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride, 1)]
        parts += [norm(width)] if norm and level else []
        made.append(nn.Sequential(*parts, nn.LeakyReLU(SLOPE)))
        channels = width
    return made


def down(config: NetworkConfig, side: int, channels: int, levels: int) -> list[nn.Module]:
    return strided(config, channels, [2] * levels, partial(normalization, config.norm))


def up(
    config: NetworkConfig, widths: list[int], size: int, channels: int
) -> tuple[list[nn.Module], nn.ConvTranspose2d]:
    parts: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        parts += [normalization(config.norm, wide), nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1)]
    parts += [normalization(config.norm, widths[-1]), nn.ReLU()]
    return parts, nn.ConvTranspose2d(config.width, channels, 4, 2, 1)


DCGAN = Family(down, up, slope=0.0)
