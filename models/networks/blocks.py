"""Parts that the networks share."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from torch.nn.utils import parametrize

Norm = Literal["none", "group"]
SLOPE = 0.2  # of every leaky ReLU
MOST_BLOCKS = 64  # at a size: a downloaded run's settings must not keep a machine busy without end


@dataclass(frozen=True)
class NetworkConfig:
    """Settings of encoder, decoder and discriminators.

    Args:
        family: residual (blocks without normalisation, as in R3GAN) or dcgan (strided convolutions, light for CPUs)
        width: channels of the first convolution; they double with each halving of the size, up to eight times
        norm: normalisation in encoder and decoder (the discriminators have none)
        blocks: residual blocks at each size
        attention: sizes in pixels at which residual levels have self-attention, such as [16]
        latent_stride: unset: a code is a vector. 4 or 8: it is a map of a fourth or an eighth of the size (KL-f4, f8)
        patches: discriminators judge patches (70x70 pixels at 256), not whole images
    """

    family: Literal["residual", "dcgan"] = "residual"
    width: int = 32
    norm: Norm = "none"
    blocks: int = 2
    attention: tuple[int, ...] = ()
    latent_stride: Literal[2, 4, 8, 16] | None = None
    patches: bool = False

    def check(self, image_size: int) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: naming the setting.
        """
        _, levels = halvings(image_size)
        for name in ("width", "blocks"):
            if not getattr(self, name) > 0:
                raise ValueError(f"system.networks.{name} is {getattr(self, name)}, expected more than 0")
        if self.blocks > MOST_BLOCKS:
            raise ValueError(f"system.networks.blocks is {self.blocks}, expected {MOST_BLOCKS} at most")
        if self.family == "dcgan" and self.blocks != NetworkConfig.blocks:
            raise ValueError("system.networks.blocks has no effect in the dcgan family: take residual, or leave it")
        if self.attention and self.family == "dcgan":
            raise ValueError("system.networks.attention has no effect in the dcgan family: take residual, or leave it")
        sizes = [image_size // 2**level for level in range(levels + 1)]
        if not set(self.attention) <= set(sizes):
            raise ValueError(f"system.networks.attention is {list(self.attention)}, expected some of {sizes}")
        if self.latent_stride and self.latent_stride > 2**levels:
            raise ValueError(f"system.networks.latent_stride is {self.latent_stride}, expected {2**levels} at most")

    def check_without_discriminator(self, image_size: int) -> None:
        """Refuse what only a discriminator would heed.

        Raises:
            ValueError: naming the setting.
        """
        if self.patches:
            raise ValueError("system.networks.patches has no effect in a system without a discriminator: leave it off")
        sizes = [image_size // 2**level for level in range(self.levels(image_size) + 1)]
        if self.latent_stride and not set(self.attention) <= set(sizes):
            raise ValueError(
                f"system.networks.attention is {list(self.attention)}, but encoder and decoder end at {sizes[-1]} "
                f"pixels with a latent_stride of {self.latent_stride}: expected some of {sizes}"
            )

    def latent_shape(self, image_size: int, latent_dim: int) -> tuple[int, ...]:
        """(latent_dim,), or (latent_dim, h, w) where codes are maps."""
        return (latent_dim, *([image_size // self.latent_stride] * 2 if self.latent_stride else []))

    def levels(self, image_size: int) -> int:
        """Halvings from the image to the code."""
        return self.latent_stride.bit_length() - 1 if self.latent_stride else halvings(image_size)[1]


def halvings(image_size: int) -> tuple[int, int]:
    """(size, n): the image size is size * 2^n, with size from 4 to 7: where a network ends or begins.

    Raises:
        ValueError: the size is out of [32, 256] or not such a product.
    """
    size, n = image_size, 0
    while size > 7 and size % 2 == 0:
        size, n = size // 2, n + 1
    if not 32 <= image_size <= 256 or not 4 <= size <= 7:
        raise ValueError(
            f"an image size of {image_size} pixels does not fit the networks: expected 4, 5, 6 or 7 times a power of "
            "two, from 32 to 256 (such as 32, 48, 64, 96, 128, 256); change data.size"
        )
    return size, n


def channels_at(width: int, level: int) -> int:
    """Channels after `level` + 1 halvings: the width doubles with each, up to eight times."""
    return width * 2 ** min(level, 3)


def normalization(kind: Norm, channels: int) -> nn.Module:
    """The layer that `norm` names. Never BatchNorm: batch statistics would make a run depend on the world size."""
    return nn.GroupNorm(max(1, channels // 8), channels) if kind == "group" else nn.Identity()


def initialize(network: nn.Module, slope: float, zero_init_residual: bool = True) -> None:
    """He's normal initialisation for a network of (leaky) ReLUs, zero biases (He et al. 2015, eq. 14).

    Unless not `zero_init_residual`, residual branches begin at 0; a spectral norm cannot divide that by its norm.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            # A stride-2 transposed convolution feeds each output from a quarter of its kernel.
            mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(module, nn.ConvTranspose2d) else "fan_in"
            nn.init.kaiming_normal_(module.weight, a=slope, mode=mode)
            if isinstance(module, nn.ConvTranspose2d):
                module.weight.data.mul_(2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if zero_init_residual and isinstance(module, (Residual, Attention)):
            module.zero_init_residual()


class Residual(nn.Module):
    """x + branch(x): 1x1 to twice the channels, grouped 3x3, 1x1 back, as R3GAN has it (Huang et al. 2024, figure 2).

    It starts as the identity: the last convolution is 0 and the others are shrunk by the number of blocks in the
    network (Fixup, Zhang et al. 2019), which is what lets it train without normalisation.
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
        return x + self.branch(x)


class Attention(nn.Module):
    """x + self-attention over positions, one head per 64 channels; it starts as the identity (Zhang et al. 2019).

    Plain softmax attention: the fused kernels have no second derivative, which R1 needs.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // 64)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def zero_init_residual(self) -> None:
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # [n, heads, c, positions]
        weights = (q.transpose(-1, -2) @ k / q.shape[2] ** 0.5).softmax(-1)
        mixed = v @ weights.transpose(-1, -2)
        return x + self.out(mixed.flatten(1, 2).unflatten(2, x.shape[2:]))


class Resample(nn.Module):
    """Half or twice the size, by mean or bilinearly, and a 1x1 convolution where the channels change."""

    def __init__(self, channels: int, outputs: int, scale: float):
        super().__init__()
        self.scale = scale
        self.mix = nn.Conv2d(channels, outputs, 1, bias=False) if outputs != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.scale < 1:
            return self.mix(avg_pool2d(x, 2))
        return interpolate(self.mix(x), scale_factor=self.scale, mode="bilinear", align_corners=False)


def residuals(settings: NetworkConfig, channels: int, size: int, levels: int) -> nn.Module:
    """The residual blocks at one size of a network of so many levels, and attention where the settings have it."""
    norm, blocks = settings.norm, settings.blocks
    parts: list[nn.Module] = [Residual(channels, norm, blocks * (levels + 1)) for _ in range(blocks)]
    return nn.Sequential(*parts, *([Attention(channels)] if size in settings.attention else []))


def down(settings: NetworkConfig, image_size: int, channels: int, levels: int) -> list[nn.Module]:
    """Levels that each end with half the size: strided convolutions, or residual blocks and means."""
    make = _strided if settings.family == "dcgan" else _residual
    return [nn.Sequential(*parts) for parts in make(settings, image_size, channels, levels)]


def _strided(settings: NetworkConfig, image_size: int, channels: int, levels: int) -> list[list[nn.Module]]:
    made = []
    for level in range(levels):
        wide = channels_at(settings.width, level)
        parts: list[nn.Module] = [nn.Conv2d(channels, wide, 4, 2, 1)]
        parts += [normalization(settings.norm, wide)] if level else []
        made.append([*parts, nn.LeakyReLU(SLOPE)])
        channels = wide
    return made


def _residual(settings: NetworkConfig, image_size: int, channels: int, levels: int) -> list[list[nn.Module]]:
    made: list[list[nn.Module]] = []
    narrow, size = settings.width, image_size
    for level in range(levels):
        wide = channels_at(settings.width, level)
        made.append([residuals(settings, narrow, size, levels), Resample(narrow, wide, 0.5)])
        narrow, size = wide, size // 2
    made[0].insert(0, nn.Conv2d(channels, settings.width, 3, 1, 1))
    made[-1] += [residuals(settings, narrow, size, levels), nn.LeakyReLU(SLOPE)]
    return made


class Spectral(nn.Module):
    """weight / sigma, sigma its largest singular value as estimated so far (Miyato et al. 2018, algorithm 1).

    torch's own iterates in every forward pass, which would make a step depend on the number of micro-batches; here
    `iterate` is called once after every move of the player.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", nn.functional.normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("v", nn.functional.normalize(torch.randn(matrix.shape[1]), dim=0))
        for _ in range(15):
            self.iterate(weight)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        matrix = weight.flatten(1)
        self.v.copy_(nn.functional.normalize(matrix.t() @ self.u, dim=0))
        self.u.copy_(nn.functional.normalize(matrix @ self.v, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight / torch.dot(self.u, weight.flatten(1) @ self.v)


def normalize_spectrally(network: nn.Module) -> None:
    """Divide every weight matrix by its largest singular value."""
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # Unsafe leaves out a trial pass, which has an autocast that networks without memory have none of.
            parametrize.register_parametrization(module, "weight", Spectral(module.weight), unsafe=True)


def iterate_spectra(network: nn.Module) -> None:
    """One power iteration of every spectral norm in a network."""
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            stored = module.parametrizations["weight"]  # type: ignore[index]
            for parametrization in stored:
                if isinstance(parametrization, Spectral):
                    parametrization.iterate(stored.original)  # type: ignore[union-attr]


def minibatch_stddev(x: Tensor, group: int) -> Tensor:
    """x [n, c, h, w] and one more channel: the mean deviation among each run of `group` images (Karras et al. 2018).

    Raises:
        ValueError: n is no multiple of the group.
    """
    if len(x) % group:
        raise ValueError(f"minibatch_stddev {group} does not divide a micro-batch of {len(x)} images")
    runs = (x if x.dtype == torch.float64 else x.float()).unflatten(0, (-1, group))  # 1e-8 is 0 in fp16
    deviation = (runs.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat(
        [x, deviation.to(x.dtype).repeat_interleave(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1
    )


class Scale(nn.Module):
    """One learned number: log s of a likelihood's scale s."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, prediction: Tensor) -> Tensor:
        """log s, the same for every prediction."""
        return self.log_scale.clone()
