"""The residual family: residual blocks that train without normalization, and self-attention."""

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention

from models.networks.blocks import SLOPE, Family, ResidualBranch, normalization
from models.networks.config import NetworkConfig, Norm


class Residual(ResidualBranch):
    """x + branch(x) of a 1x1, a grouped 3x3 and a 1x1 convolution (R3GAN, Huang et al. 2024, figure 2).

    It starts as the identity, its first weights scaled down by the network's `blocks` (Fixup, Zhang et al. 2019).
    """

    def __init__(self, channels: int, norm: Norm, blocks: int):
        super().__init__()
        hidden, self.blocks = 2 * channels, blocks
        self.branch = nn.Sequential(
            *(normalization(norm, channels), nn.Conv2d(channels, hidden, 1), nn.LeakyReLU(SLOPE)),
            *(nn.Conv2d(hidden, hidden, 3, 1, 1, groups=max(1, hidden // 16)), nn.LeakyReLU(SLOPE)),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def zero_init_residual(self) -> None:
        first, second, last = (module for module in self.branch if isinstance(module, nn.Conv2d))
        for convolution in (first, second):
            convolution.weight.data.mul_(self.blocks ** (-1 / 4))  # -1 / (2 * 3 layers - 2)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x  # a sum has the memory format of its first term


class Attention(ResidualBranch):
    """x + self-attention over positions, one head per 64 channels; it starts as the identity (Zhang et al. 2019)."""

    recomputable = False  # a backward pass would choose its kernel anew

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // 64)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def zero_init_residual(self) -> None:
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        mixed = scaled_dot_product_attention(q, k, v)  # all [n, heads, positions, channels of a head]
        return self.out(mixed.transpose(-1, -2).flatten(1, 2).unflatten(2, x.shape[2:])) + x


class Resample(nn.Module):
    """Halve the size by averaging or double it bilinearly, with a 1x1 convolution if the channels change."""

    def __init__(self, channels: int, outputs: int, scale: float):
        super().__init__()
        self.scale = scale
        self.mix = nn.Conv2d(channels, outputs, 1, bias=False) if outputs != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.scale < 1:
            return self.mix(avg_pool2d(x, 2))
        return interpolate(self.mix(x), scale_factor=self.scale, mode="bilinear", align_corners=False)


def down(config: NetworkConfig, side: int, channels: int, levels: int) -> list[nn.Module]:
    made: list[list[nn.Module]] = []
    narrow, size = config.width, side
    for level in range(levels):
        wide = config.channels(level)
        made.append([_blocks(config, narrow, size, levels), Resample(narrow, wide, 0.5)])
        narrow, size = wide, size // 2
    made[0].insert(0, nn.Conv2d(channels, config.width, 3, 1, 1))
    made[-1] += [_blocks(config, narrow, size, levels), nn.LeakyReLU(SLOPE)]
    return [nn.Sequential(*parts) for parts in made]


def up(config: NetworkConfig, widths: list[int], size: int, channels: int) -> tuple[list[nn.Module], nn.Conv2d]:
    parts = [_blocks(config, widths[0], size, len(widths))]
    for wide, narrow in zip(widths, [*widths[1:], widths[-1]], strict=True):
        size *= 2
        parts += [Resample(wide, narrow, 2), _blocks(config, narrow, size, len(widths))]
    return [*parts, nn.LeakyReLU(SLOPE)], nn.Conv2d(config.width, channels, 3, 1, 1)


def _blocks(config: NetworkConfig, channels: int, size: int, levels: int) -> nn.Module:
    parts = [Residual(channels, config.norm, config.blocks * (levels + 1)) for _ in range(config.blocks)]
    return nn.Sequential(*parts, *([Attention(channels)] if size in config.attention else []))


RESIDUAL = Family(down, up, options=("norm", "blocks", "attention"))
