"""Images to logits."""

from dataclasses import replace

from torch import Tensor, nn

from models.networks.blocks import (
    SLOPE,
    NetworkConfig,
    channels_at,
    down,
    halvings,
    initialize,
    minibatch_stddev,
    normalize_spectrally,
)


class Discriminator(nn.Module):
    """Levels of convolutions, and a verdict on an image, or on each patch of it.

    An image's: halvings without normalisation, then one linear layer. A patch's: 70x70 pixels at 256 and fewer at
    lower sizes (PatchGAN, Isola et al. 2017, section 3.2).

    Args:
        settings: of the networks
        image_size: pixels a side
        channels: of the image
        logits: outputs per verdict
        spectral_norm: divide every weight matrix by its largest singular value
        group: images among which the deviation is shown to the last layer; 0: none is
        halved: halvings of a patch discriminator: 3 for patches of 70 pixels, 2 for 34, 1 for 16; unset: 3 at 256, 2 at
            128, 1 at 64
        instance_norm: in a patch discriminator, after every convolution but the first and the last, as CycleGAN has it
    """

    def __init__(
        self,
        settings: NetworkConfig,
        image_size: int,
        channels: int,
        logits: int,
        spectral_norm: bool = False,
        group: int = 0,
        halved: int | None = None,
        instance_norm: bool = False,
    ):
        super().__init__()
        settings.check(image_size)
        self.patches, self.group = settings.patches, group
        if settings.patches:
            halved = max(1, (image_size // 32).bit_length() - 1) if halved is None else halved
            parts = _patch_levels(halved, channels, settings.width, instance_norm)
            wide = channels_at(settings.width, len(parts) - 1)
            self.head: nn.Module = nn.Conv2d(wide + bool(group), logits, 4, 1, 1)
        else:
            size, levels = halvings(image_size)
            parts = down(replace(settings, norm="none"), image_size, channels, levels)
            self.head = nn.Linear((channels_at(settings.width, levels - 1) + bool(group)) * size**2, logits)
        self.levels = nn.ModuleList(parts)
        initialize(self, SLOPE, zero_init_residual=not spectral_norm)
        nn.init.xavier_normal_(self.head.weight)
        if spectral_norm:
            normalize_spectrally(self)

    def forward(self, image: Tensor, feature_layer: int | None = None) -> Tensor:
        """[n, channels, size, size] -> logits [n, logits], of patches [n, logits, h, w], or a level's activations."""
        hidden = image
        for level, layer in enumerate(self.levels):
            hidden = layer(hidden)
            if level == feature_layer:
                return hidden
        if self.group:
            hidden = minibatch_stddev(hidden, self.group)
        return self.head(hidden if self.patches else hidden.flatten(1))


def _patch_levels(halved: int, channels: int, width: int, instance_norm: bool) -> list[nn.Module]:
    made: list[nn.Module] = []
    for level in range(halved + 1):
        wide = channels_at(width, level)
        parts: list[nn.Module] = [nn.Conv2d(channels, wide, 4, 2 if level < halved else 1, 1)]
        parts += [nn.InstanceNorm2d(wide)] if instance_norm and level else []
        made.append(nn.Sequential(*parts, nn.LeakyReLU(SLOPE)))
        channels = wide
    return made
