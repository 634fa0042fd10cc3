"""Images to logits."""

from torch import Tensor, nn

from models.networks.blocks import channels_at, halvings, initialize


class Discriminator(nn.Module):
    """Strided convolutions down to 4..7 pixels without normalisation, then one linear layer.

    Args:
        image_size: pixels a side
        channels: of the image
        logits: outputs per image
        width: channels after the first convolution
    """

    def __init__(self, image_size: int, channels: int, logits: int, width: int):
        super().__init__()
        size, levels = halvings(image_size)
        self.levels = nn.ModuleList()
        for level in range(levels):
            wide = channels_at(width, level)
            self.levels.append(nn.Sequential(nn.Conv2d(channels, wide, 4, 2, 1), nn.LeakyReLU(0.2)))
            channels = wide
        self.head = nn.Linear(channels * size**2, logits)
        initialize(self, 0.2)
        nn.init.xavier_normal_(self.head.weight)

    def forward(self, image: Tensor, feature_layer: int | None = None) -> Tensor:
        """[n, channels, size, size] -> logits [n, logits], or level `feature_layer`'s activations [n, c, h, w]."""
        hidden = image
        for level, layer in enumerate(self.levels):
            hidden = layer(hidden)
            if level == feature_layer:
                return hidden
        return self.head(hidden.flatten(1))
