"""Images to images."""

from torch import Tensor, nn

from models.networks.blocks import initialize


class Translator(nn.Module):
    """CycleGAN's generator: 7x7, two halvings, residual blocks, two doublings, 7x7 (Zhu et al. 2017, appendix 7.2).

    Instance normalisation, whose statistics are each image's own; edges are reflected.

    Args:
        channels: of the images
        width: channels of the first convolution
        blocks: residual blocks; the paper has 6 at 128 pixels and 9 from 256
    """

    def __init__(self, channels: int, width: int, blocks: int):
        super().__init__()
        wide = 4 * width
        self.trunk = nn.Sequential(
            *_layer(nn.Conv2d(channels, width, 7, 1, 3, padding_mode="reflect"), width),
            *_layer(nn.Conv2d(width, 2 * width, 3, 2, 1), 2 * width),
            *_layer(nn.Conv2d(2 * width, wide, 3, 2, 1), wide),
            *(_Block(wide) for _ in range(blocks)),
            *_layer(nn.ConvTranspose2d(wide, 2 * width, 3, 2, 1, output_padding=1), 2 * width),
            *_layer(nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1), width),
        )
        self.last = nn.Conv2d(width, channels, 7, 1, 3, padding_mode="reflect")
        initialize(self, 0.0)
        nn.init.xavier_normal_(self.last.weight)

    def forward(self, image: Tensor) -> Tensor:
        """[n, channels, size, size] in [-1, 1] -> the same of the other domain."""
        return self.last(self.trunk(image)).tanh()


class _Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(
            *_layer(nn.Conv2d(channels, channels, 3, 1, 1, padding_mode="reflect"), channels),
            *_layer(nn.Conv2d(channels, channels, 3, 1, 1, padding_mode="reflect"), channels)[:-1],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _layer(convolution: nn.Module, channels: int) -> list[nn.Module]:
    return [convolution, nn.InstanceNorm2d(channels), nn.ReLU()]
