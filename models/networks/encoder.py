"""Images to codes."""

from torch import Tensor, nn

from models.networks.blocks import Norm, channels_at, halvings, initialize, normalization


class Encoder(nn.Module):
    """Strided convolutions down to 4..7 pixels, then one linear layer (the shape of DCGAN, Radford et al. 2016).

    Args:
        image_size: pixels a side
        channels: of the image
        outputs: numbers per image: the code's, or twice that for a posterior's mean and log-variance
        width: channels after the first convolution
        norm: normalisation after every convolution but the first
    """

    def __init__(self, image_size: int, channels: int, outputs: int, width: int, norm: Norm = "group"):
        super().__init__()
        size, levels = halvings(image_size)
        layers: list[nn.Module] = []
        for level in range(levels):
            wide = channels_at(width, level)
            layers += [nn.Conv2d(channels, wide, 4, 2, 1)]
            layers += [normalization(norm, wide)] if level else []
            layers += [nn.LeakyReLU(0.2)]
            channels = wide
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(channels * size**2, outputs)
        initialize(self, 0.2)
        nn.init.xavier_normal_(self.head.weight)

    def forward(self, image: Tensor) -> Tensor:
        """[n, channels, size, size] -> [n, outputs]."""
        return self.head(self.trunk(image).flatten(1))
