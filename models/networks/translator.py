"""Images to images."""

import torch
from torch import Tensor, nn

from models.losses import at_least_fp32
from models.networks.blocks import InstanceNorm, ResidualBranch, initialize


class Translator(nn.Module):
    """CycleGAN's generator: 7x7, two halvings, residual blocks, two doublings, 7x7 (Zhu et al. 2017, appendix 7.2)."""

    def __init__(self, channels: int, width: int, blocks: int):
        super().__init__()
        wide = 4 * width
        self.trunk = nn.Sequential(
            *_layer(_ReflectConv(channels, width, 7), width),
            *_layer(nn.Conv2d(width, 2 * width, 3, 2, 1), 2 * width),
            *_layer(nn.Conv2d(2 * width, wide, 3, 2, 1), wide),
            *(_Block(wide) for _ in range(blocks)),
            *_layer(nn.ConvTranspose2d(wide, 2 * width, 3, 2, 1, output_padding=1), 2 * width),
            *_layer(nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1), width),
        )
        self.last = _ReflectConv(width, channels, 7)
        initialize(self, 0.0)
        nn.init.xavier_normal_(self.last.weight)

    def forward(self, image: Tensor) -> Tensor:
        # In bf16 tanh is 1 from 3.5 on, so a wrong pixel there would have no gradient.
        return at_least_fp32(self.last(self.trunk(image))).tanh()


class _ReflectConv(nn.Conv2d):
    """A convolution over reflected edges."""

    def __init__(self, channels: int, outputs: int, kernel: int):
        super().__init__(channels, outputs, kernel, 1, kernel // 2, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(x)
        # torch has no deterministic gradient of reflection padding on a GPU, but it has one of slices.
        margin = self.kernel_size[0] // 2
        for axis in (2, 3):
            first, last = x.narrow(axis, 1, margin), x.narrow(axis, -1 - margin, margin)
            x = torch.cat([first.flip(axis), x, last.flip(axis)], axis)
        return nn.functional.conv2d(x, self.weight, self.bias)


class _Block(ResidualBranch):
    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(
            *_layer(_ReflectConv(channels, channels, 3), channels),
            *_layer(_ReflectConv(channels, channels, 3), channels)[:-1],
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


def _layer(convolution: nn.Module, channels: int) -> list[nn.Module]:
    return [convolution, InstanceNorm(channels), nn.ReLU()]
