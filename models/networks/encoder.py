"""Images to codes."""

from torch import Tensor, nn

from models.networks.blocks import SLOPE, NetworkConfig, channels_at, down, initialize


class Encoder(nn.Module):
    """Halvings of the image (in the dcgan family those of Radford et al. 2016), then one layer.

    Args:
        settings: of the networks
        image_size: pixels a side
        channels: of the image
        outputs: numbers per code: the code's, or twice that for a posterior's mean and log-variance
    """

    def __init__(self, settings: NetworkConfig, image_size: int, channels: int, outputs: int):
        super().__init__()
        settings.check(image_size)
        levels = settings.levels(image_size)
        self.trunk = nn.Sequential(*down(settings, image_size, channels, levels))
        wide, self.flat = channels_at(settings.width, levels - 1), not settings.latent_stride
        positions = (image_size // 2**levels) ** 2
        self.head = nn.Linear(wide * positions, outputs) if self.flat else nn.Conv2d(wide, outputs, 3, 1, 1)
        initialize(self, SLOPE)
        nn.init.xavier_normal_(self.head.weight)

    def forward(self, image: Tensor) -> Tensor:
        """[n, channels, size, size] -> [n, outputs], or [n, outputs, h, w] where codes are maps."""
        hidden = self.trunk(image)
        return self.head(hidden.flatten(1) if self.flat else hidden)
