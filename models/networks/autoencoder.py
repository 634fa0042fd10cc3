"""Images to codes and codes to images."""

import math

from torch import Tensor, nn

from models.losses import at_least_fp32
from models.networks.blocks import SLOPE, initialize
from models.networks.config import ImageSize, NetworkConfig, sides
from models.networks.families import family_of


def build_encoder(config: NetworkConfig, image_size: ImageSize, channels: int, outputs: int) -> nn.Module:
    """Return the encoder of the settings' family, which maps images to [n, outputs] or [n, outputs, h, w]."""
    return (family_of(config).encoder or Encoder)(config, image_size, channels, outputs)


def build_decoder(config: NetworkConfig, image_size: ImageSize, channels: int, latent_dim: int) -> nn.Module:
    """Return the decoder of the settings' family, which maps codes to images; `last` is its last layer."""
    return (family_of(config).decoder or Decoder)(config, image_size, channels, latent_dim)


class Encoder(nn.Module):
    """Levels that each halve the size of the image, then one layer, with two outputs per number of a posterior."""

    def __init__(self, config: NetworkConfig, image_size: ImageSize, channels: int, outputs: int):
        super().__init__()
        config.check(image_size)
        levels = config.levels(image_size)
        self.trunk = nn.Sequential(*family_of(config).down(config, min(sides(image_size)), channels, levels))
        width, self.flat = config.channels(levels - 1), not config.latent_stride
        positions = math.prod(side >> levels for side in sides(image_size))
        self.head = nn.Linear(width * positions, outputs) if self.flat else nn.Conv2d(width, outputs, 3, 1, 1)
        initialize(self, SLOPE)
        nn.init.xavier_normal_(self.head.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Map images to [n, outputs], or to [n, outputs, h, w] with a latent_stride."""
        hidden = self.trunk(image)
        return self.head(hidden.flatten(1) if self.flat else hidden)


class Decoder(nn.Module):
    """One layer from the code, then levels that each double the size up to the image."""

    def __init__(self, config: NetworkConfig, image_size: ImageSize, channels: int, latent_dim: int):
        super().__init__()
        config.check(image_size)
        levels, family = config.levels(image_size), family_of(config)
        widths = [config.channels(level) for level in reversed(range(levels))]
        self.sides = tuple(side >> levels for side in sides(image_size))
        self.flat = not config.latent_stride
        wide = widths[0]
        self.stem = (
            nn.Linear(latent_dim, wide * math.prod(self.sides)) if self.flat else nn.Conv2d(latent_dim, wide, 3, 1, 1)
        )
        trunk, self.last = family.up(config, widths, min(self.sides), channels)
        self.trunk = nn.Sequential(*trunk)
        initialize(self, family.slope)
        nn.init.xavier_normal_(self.last.weight)

    def forward(self, z: Tensor) -> Tensor:
        """Map codes [n, latent_dim] (or [n, latent_dim, h, w]) to images [n, channels, height, width] in [-1, 1]."""
        hidden = self.stem(z)
        if self.flat:
            hidden = hidden.unflatten(1, (-1, *self.sides))
        # In bf16 tanh is 1 from 3.5 on, so a wrong pixel there would have no gradient.
        return at_least_fp32(self.last(self.trunk(hidden))).tanh()
