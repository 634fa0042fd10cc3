"""Images to codes and codes to images."""

import math

import torch
from torch import Tensor, nn

from models.losses import at_least_fp32
from models.networks.blocks import SLOPE, ClassVectors, initialize
from models.networks.config import ImageSize, NetworkConfig, sides
from models.networks.families import family_of
from models.settings import check


def build_encoder(config: NetworkConfig, image_size: ImageSize, channels: int, outputs: int) -> nn.Module:
    """Return the encoder of the settings' family, which maps images to [n, outputs] or [n, outputs, h, w]."""
    return (family_of(config).encoder or Encoder)(config, image_size, channels, outputs)


def build_decoder(
    config: NetworkConfig, image_size: ImageSize, channels: int, latent_dim: int, classes: int = 0
) -> nn.Module:
    """Return the decoder of the settings' family, which maps codes to images; `last` is its last layer.

    With `classes` it maps codes and labels; codes must be vectors then.
    """
    if classes:
        check(classes > 1, "classes", classes, "0 (none) or 2 or more")
        check(config.stride is None, "classes", classes, "0 while codes are maps (system.networks.latent_stride)")
        own = f"0 with system.networks.family {config.family}, whose decoder is its own"
        check(family_of(config).decoder is None, "classes", classes, own)
        return Decoder(config, image_size, channels, latent_dim, classes)
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
    """One layer from the code, then levels that each double the size up to the image.

    With `classes`, a code is followed by the vector of its class, of as many numbers and the same size at first.
    """

    def __init__(self, config: NetworkConfig, image_size: ImageSize, channels: int, latent_dim: int, classes: int = 0):
        super().__init__()
        config.check(image_size)
        levels, family = config.levels(image_size), family_of(config)
        widths = [config.channels(level) for level in reversed(range(levels))]
        self.sides = tuple(side >> levels for side in sides(image_size))
        self.flat = not config.latent_stride
        self.classes = ClassVectors(classes, latent_dim) if classes else None
        wide, latent_dim = widths[0], latent_dim * (2 if classes else 1)
        self.stem = (
            nn.Linear(latent_dim, wide * math.prod(self.sides)) if self.flat else nn.Conv2d(latent_dim, wide, 3, 1, 1)
        )
        trunk, self.last = family.up(config, widths, min(self.sides), channels)
        self.trunk = nn.Sequential(*trunk)
        initialize(self, family.slope)
        nn.init.xavier_normal_(self.last.weight)
        if self.classes is not None:
            nn.init.normal_(self.classes.weight)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Map codes [n, latent_dim] (or [n, latent_dim, h, w]) to images [n, channels, height, width] in [-1, 1].

        `label`, int64 [n], is needed with `classes` only.
        """
        hidden = self.stem(z if self.classes is None else torch.cat([z, self.classes(label).to(z.dtype)], 1))
        if self.flat:
            hidden = hidden.unflatten(1, (-1, *self.sides))
        # In bf16 tanh is 1 from 3.5 on, so a wrong pixel there would have no gradient.
        return at_least_fp32(self.last(self.trunk(hidden))).tanh()
