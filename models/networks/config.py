"""Settings of encoder, decoder and discriminators, and the image sizes that fit them."""

from dataclasses import dataclass
from typing import Literal

Norm = Literal["none", "group"]
MAX_BLOCKS = 64  # per size: a stranger's checkpoint must not make a machine build networks without end


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture of encoder, decoder and discriminators.

    Args:
        family: residual (residual blocks without normalization, as in R3GAN; for GPUs) or dcgan (strided convolutions,
            light enough for CPUs; best with norm group)
        width: channels of the first convolution; they double with each halving of the image size, up to 8 times
            `width`. Raise it for detail; compute grows with its square
        norm: normalization in encoder and decoder, none or group (GroupNorm, Wu & He 2018); discriminators have none.
            BatchNorm is not offered, because its statistics depend on how a batch is split over processes
        blocks: residual blocks at each image size, 1 to 64; raise it for a deeper network. Family residual only
        attention: image sizes in pixels after whose residual blocks self-attention follows, such as [16]; cost grows
            with the fourth power of the size. Family residual only
        latent_stride: null makes the latent code a vector. 2, 4, 8 or 16 makes it a map whose sides are the image's
            divided by this number (4 and 8 are known as KL-f4 and KL-f8), which keeps more detail
        patches: discriminators classify overlapping patches (70x70 pixels at 256, 34 at 128, 16 at 64; PatchGAN, Isola
            et al. 2017) instead of whole images: sharper texture, no view of the whole
    """

    family: str = "residual"
    width: int = 32
    norm: Norm = "none"
    blocks: int = 2
    attention: tuple[int, ...] = ()
    latent_stride: Literal[2, 4, 8, 16] | None = None
    patches: bool = False

    def check(self, image_size: int, discriminator: bool = True) -> None:
        """Raise a ValueError that names the first setting that is out of its range or has no effect.

        `discriminator` is whether the system has one.
        """
        _, levels = halvings(image_size)
        for name in ("width", "blocks"):
            if not getattr(self, name) > 0:
                raise ValueError(f"system.networks.{name} is {getattr(self, name)}, expected more than 0")
        if self.blocks > MAX_BLOCKS:
            raise ValueError(f"system.networks.blocks is {self.blocks}, expected {MAX_BLOCKS} at most")
        if self.latent_stride and self.latent_stride > 2**levels:
            raise ValueError(f"system.networks.latent_stride is {self.latent_stride}, expected {2**levels} at most")
        if self.patches and not discriminator:
            raise ValueError("system.networks.patches has no effect in a system without a discriminator: leave it off")
        last = levels if discriminator else self.levels(image_size)
        sizes = [image_size // 2**level for level in range(last + 1)]
        if not set(self.attention) <= set(sizes):
            raise ValueError(
                f"system.networks.attention is {list(self.attention)}, expected some of {sizes}, the networks' sizes"
            )

    def latent_shape(self, image_size: int, latent_dim: int) -> tuple[int, ...]:
        """Return (latent_dim,) of a vector, or (latent_dim, height, width) of a map.

        Raises:
            ValueError: latent_dim is less than 1.
        """
        if latent_dim < 1:
            raise ValueError(f"system.latent_dim is {latent_dim}, expected more than 0")
        return (latent_dim, *([image_size // self.latent_stride] * 2 if self.latent_stride else []))

    def levels(self, image_size: int) -> int:
        """Return how often encoder and decoder halve and double the image size."""
        return self.latent_stride.bit_length() - 1 if self.latent_stride else halvings(image_size)[1]

    def channels(self, level: int) -> int:
        """Return the channels of level 0, 1, ...: they double with each level, up to 8 times the width."""
        return self.width * 2 ** min(level, 3)


def halvings(image_size: int) -> tuple[int, int]:
    """Return (size, n) with image_size = size * 2^n and a size of 4 to 7, at which networks without a map end.

    Raises:
        ValueError: the image size is outside [32, 256], or no such product.
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
