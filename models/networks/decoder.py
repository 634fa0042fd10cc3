"""Codes to images."""

from itertools import pairwise

from torch import Tensor, nn

from models.losses import at_least_fp32
from models.networks.blocks import SLOPE, NetworkConfig, Resample, channels_at, initialize, normalization, residuals


class Decoder(nn.Module):
    """One layer from the code, then doublings up to the image (in the dcgan family those of Radford et al. 2016).

    Args:
        settings: of the networks
        image_size: pixels a side
        channels: of the image
        latent_dim: numbers per code
    """

    def __init__(self, settings: NetworkConfig, image_size: int, channels: int, latent_dim: int):
        super().__init__()
        settings.check(image_size)
        levels = settings.levels(image_size)
        widths = [channels_at(settings.width, level) for level in reversed(range(levels))]
        self.size, self.flat = image_size // 2**levels, not settings.latent_stride
        wide = widths[0]
        self.stem = nn.Linear(latent_dim, wide * self.size**2) if self.flat else nn.Conv2d(latent_dim, wide, 3, 1, 1)
        if settings.family == "dcgan":
            trunk = _transposed(settings, widths)
            self.last: nn.Module = nn.ConvTranspose2d(settings.width, channels, 4, 2, 1)
        else:
            trunk = _residual(settings, widths, self.size)
            self.last = nn.Conv2d(settings.width, channels, 3, 1, 1)
        self.trunk = nn.Sequential(*trunk)
        initialize(self, 0.0 if settings.family == "dcgan" else SLOPE)
        nn.init.xavier_normal_(self.last.weight)

    def forward(self, z: Tensor) -> Tensor:
        """[n, latent_dim], or [n, latent_dim, h, w] where codes are maps -> [n, channels, size, size] in [-1, 1]."""
        hidden = self.stem(z)
        if self.flat:
            hidden = hidden.unflatten(1, (-1, self.size, self.size))
        # In half precision tanh would be 1 from 3.5 on, and a wrong pixel there would have no gradient.
        return at_least_fp32(self.last(self.trunk(hidden))).tanh()


def _transposed(settings: NetworkConfig, widths: list[int]) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        parts += [normalization(settings.norm, wide), nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1)]
    return [*parts, normalization(settings.norm, widths[-1]), nn.ReLU()]


def _residual(settings: NetworkConfig, widths: list[int], size: int) -> list[nn.Module]:
    parts = [residuals(settings, widths[0], size, len(widths))]
    for wide, narrow in zip(widths, [*widths[1:], widths[-1]], strict=True):
        size *= 2
        parts += [Resample(wide, narrow, 2), residuals(settings, narrow, size, len(widths))]
    return [*parts, nn.LeakyReLU(SLOPE)]
