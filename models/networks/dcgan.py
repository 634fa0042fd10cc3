"""The dcgan family: strided convolutions, light enough for CPUs (Radford et al. 2016)."""

from itertools import pairwise

from torch import nn

from models.networks.blocks import SLOPE, Family, normalization
from models.networks.config import NetworkConfig


def down(config: NetworkConfig, image_size: int, channels: int, levels: int) -> list[nn.Module]:
    made: list[nn.Module] = []
    for level in range(levels):
        width = config.channels(level)
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1)]
        parts += [normalization(config.norm, width)] if level else []
        made.append(nn.Sequential(*parts, nn.LeakyReLU(SLOPE)))
        channels = width
    return made


def up(config: NetworkConfig, widths: list[int], size: int) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        parts += [normalization(config.norm, wide), nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1)]
    return [*parts, normalization(config.norm, widths[-1]), nn.ReLU()]


DCGAN = Family(down, up, last=lambda width, channels: nn.ConvTranspose2d(width, channels, 4, 2, 1), slope=0.0)
