"""The kl family: encoder and decoder of diffusers' AutoencoderKL (Rombach et al. 2022, appendix E), by its names.

The weights have the names and shapes that diffusers gives them, so that weights move between the two libraries as they
are; `quant_conv` and `post_quant_conv` belong to the encoder and to the decoder. The decoder does not bound its images.
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from models.losses import at_least_fp32
from models.networks.blocks import ResidualBranch
from models.networks.config import ImageSize, NetworkConfig
from models.networks.residual import RESIDUAL
from models.settings import check

GROUPS, EPSILON = 32, 1e-6  # of every normalization


def level_widths(config: NetworkConfig) -> list[int]:
    """Return the channels of each level, the largest images first; raise a ValueError that names an unfit setting."""
    stride, multipliers, width = config.stride, config.multipliers, config.width
    assert stride is not None  # as NetworkConfig.check() has found
    widths = [width * times for times in multipliers or (2 ** min(i, 2) for i in range(stride.bit_length()))]
    fits = all(wide > 0 and wide % GROUPS == 0 for wide in widths)
    name, value = ("multipliers", [*(multipliers or ())]) if width % GROUPS == 0 else ("width", width)
    check(fits, f"networks.{name}", value, f"a multiple of {GROUPS} channels at every level of family kl, got {widths}")
    return widths


class KLEncoder(nn.Module):
    """Levels of residual blocks that halve the size of the image between them, then attention, and a map of codes."""

    def __init__(self, config: NetworkConfig, image_size: ImageSize, channels: int, outputs: int):
        super().__init__()
        config.check(image_size)
        self.config, self.image_size, self.channels = config, image_size, channels
        widths = level_widths(config)
        self.conv_in = nn.Conv2d(channels, widths[0], 3, 1, 1)
        self.down_blocks = nn.ModuleList(
            _Level(narrow, wide, config.blocks, downsamplers=[_Downsample(wide)] if i < len(widths) - 1 else [])
            for i, (narrow, wide) in enumerate(pairwise([widths[0], *widths]))
        )
        self.mid_block = _Middle(widths[-1], config.mid_attention)
        self.conv_norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, 1, 1)
        self.quant_conv = nn.Conv2d(outputs, outputs, 1) if config.quant_conv else None

    def forward(self, image: Tensor) -> Tensor:
        """Map images [n, channels, height, width] to [n, outputs, h, w]."""
        hidden = self.conv_in(image)
        for level in self.down_blocks:
            hidden = level(hidden)
        hidden = self.conv_out(nn.functional.silu(self.conv_norm_out(self.mid_block(hidden))))
        return hidden if self.quant_conv is None else self.quant_conv(hidden)


class KLDecoder(nn.Module):
    """Attention over the map of codes, then levels of residual blocks that double the size between them."""

    def __init__(self, config: NetworkConfig, image_size: ImageSize, channels: int, latent_dim: int):
        super().__init__()
        config.check(image_size)
        widths = level_widths(config)[::-1]
        self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 1) if config.quant_conv else None
        self.conv_in = nn.Conv2d(latent_dim, widths[0], 3, 1, 1)
        self.mid_block = _Middle(widths[0], config.mid_attention)
        self.up_blocks = nn.ModuleList(
            _Level(wide, narrow, config.blocks + 1, upsamplers=[_Upsample(narrow)] if i < len(widths) - 1 else [])
            for i, (wide, narrow) in enumerate(pairwise([widths[0], *widths]))
        )
        self.conv_norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, 1, 1)

    @property
    def last(self) -> nn.Conv2d:
        return self.conv_out

    def forward(self, z: Tensor) -> Tensor:
        """Map codes [n, latent_dim, h, w] to images [n, channels, height, width], in [-1, 1] but for their errors."""
        hidden = self.mid_block(self.conv_in(z if self.post_quant_conv is None else self.post_quant_conv(z)))
        for level in self.up_blocks:
            hidden = level(hidden)
        return at_least_fp32(self.conv_out(nn.functional.silu(self.conv_norm_out(hidden))))


class _Level(nn.Module):
    """Residual blocks of one size, then what changes the size, under the name that diffusers gives it."""

    def __init__(self, channels: int, outputs: int, blocks: int, **resamplers: list[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(channels if i == 0 else outputs, outputs) for i in range(blocks))
        for name, modules in resamplers.items():
            self.add_module(name, nn.ModuleList(modules))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            assert isinstance(part, nn.ModuleList)
            for block in part:
                x = block(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, attention: bool):
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(channels)] if attention else [])
        self.resnets = nn.ModuleList([_Residual(channels, channels), _Residual(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        for block in (first, *self.attentions, second):
            x = block(x)
        return x


class _Residual(ResidualBranch):
    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), nn.Conv2d(channels, outputs, 3, 1, 1)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.conv_shortcut = nn.Conv2d(channels, outputs, 1) if channels != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(nn.functional.silu(self.norm1(x)))
        hidden = self.conv2(nn.functional.silu(self.norm2(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class _Attention(ResidualBranch):
    """x + attention of one head over positions; its fused kernels have no second derivative, which none needs here."""

    recomputable = False  # a backward pass would choose its kernel anew

    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = _norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [n, 1 head, positions, channels]
        mixed = scaled_dot_product_attention(self.to_q(hidden), self.to_k(hidden), self.to_v(hidden))
        # In this order the sum has the memory format of its first part, as in diffusers, and later layers round alike.
        return self.to_out[0](mixed[:, 0]).transpose(1, 2).unflatten(2, x.shape[2:]) + x


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, EPSILON)


# Discriminators of whole images are those of the residual family.
OPTIONS = ("blocks", "multipliers", "quant_conv", "mid_attention")
KL = RESIDUAL._replace(options=OPTIONS, encoder=KLEncoder, decoder=KLDecoder, bounded=False)
