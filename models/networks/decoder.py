"""Codes to images."""

from torch import Tensor, nn

from models.networks.blocks import Norm, channels_at, halvings, initialize, normalization


class Decoder(nn.Module):
    """One linear layer to 4..7 pixels, then transposed convolutions up (the generator of DCGAN, Radford et al. 2016).

    Args:
        image_size: pixels a side
        channels: of the image
        latent_dim: numbers per code
        width: channels before the last transposed convolution
        norm: normalisation before every activation
    """

    def __init__(self, image_size: int, channels: int, latent_dim: int, width: int, norm: Norm = "group"):
        super().__init__()
        size, levels = halvings(image_size)
        widths = [channels_at(width, level) for level in reversed(range(levels))]
        self.stem = nn.Linear(latent_dim, widths[0] * size**2)
        self.size = size
        layers: list[nn.Module] = []
        for wide, narrow in zip(widths, [*widths[1:], channels], strict=True):
            last = nn.ConvTranspose2d(wide, narrow, 4, 2, 1)
            layers += [normalization(norm, wide), nn.ReLU(), last]
        self.trunk = nn.Sequential(*layers, nn.Tanh())
        initialize(self, 0.0)
        nn.init.xavier_normal_(last.weight)

    def forward(self, z: Tensor) -> Tensor:
        """[n, latent_dim] -> [n, channels, size, size] in [-1, 1]."""
        return self.trunk(self.stem(z).unflatten(1, (-1, self.size, self.size)))
