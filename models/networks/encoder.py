"""Images to codes."""

from torch import Tensor, nn

from models.networks.blocks import SLOPE, initialize
from models.networks.config import NetworkConfig
from models.networks.families import family_of


class Encoder(nn.Module):
    """Levels that each halve the size of the image, then one layer.

    `outputs` is the number of outputs per code: latent_dim, or twice that for a posterior's mean and log-variance.
    """

    def __init__(self, config: NetworkConfig, image_size: int, channels: int, outputs: int):
        super().__init__()
        config.check(image_size)
        levels = config.levels(image_size)
        self.trunk = nn.Sequential(*family_of(config).down(config, image_size, channels, levels))
        width, self.flat = config.channels(levels - 1), not config.latent_stride
        positions = (image_size // 2**levels) ** 2
        self.head = nn.Linear(width * positions, outputs) if self.flat else nn.Conv2d(width, outputs, 3, 1, 1)
        initialize(self, SLOPE)
        nn.init.xavier_normal_(self.head.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Map images [n, channels, size, size] to [n, outputs], or to [n, outputs, h, w] with a latent_stride."""
        hidden = self.trunk(image)
        return self.head(hidden.flatten(1) if self.flat else hidden)
