"""Settings of encoder, decoder and discriminators, and the image sizes that fit them."""

from dataclasses import dataclass
from typing import Literal

from models.settings import check, check_positive, check_unused

Norm = Literal["none", "group"]
ImageSize = int | tuple[int, int]  # of square images, or height and width, in pixels
SMALLEST, LARGEST = 16, 1024  # pixels of a side
MAX_BLOCKS = 64  # per size: a stranger's checkpoint must not make a machine build networks without end


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture of encoder, decoder and discriminators.

    Args:
        family: residual (residual blocks without normalization, as in R3GAN; for GPUs), dcgan (strided convolutions,
            light enough for CPUs; best with norm group) or kl (encoder and decoder of diffusers' AutoencoderKL, with
            which weights can be exchanged; whole images have residual's discriminators)
        width: channels of the first convolution, which double with each halving of the size, up to 8 times (but see
            multipliers); raise it for detail; compute grows with its square. A multiple of 32 in family kl
        norm: normalization in encoder and decoder, none or group (GroupNorm, Wu & He 2018); discriminators have none.
            BatchNorm is not offered, because its statistics depend on how a batch is split over processes. Family kl
            always has groups
        blocks: residual blocks at each image size, 1 to 64; raise it for a deeper network. Families residual and kl
            (whose decoder has one more, as layers_per_block in diffusers)
        attention: image sizes in pixels, such as [16], after whose residual blocks self-attention follows; costs grow
            with the fourth power of the size. If images are not square, it is their smaller side. Family residual only
        latent_stride: 2, 4, 8 or 16 makes the latent code a map whose sides are the image's divided by this number (4
            and 8 are known as KL-f4 and KL-f8), which keeps more detail; null makes it a vector
        multipliers: channels at each image size of encoder and decoder, the largest size first, as multiples of width:
            [1, 2, 4, 4] halves the size three times, so that latent_stride is 8. null takes latent_stride, and doubles
            the channels up to 4 times. Family kl only
        quant_conv: a 1x1 convolution after the encoder, and one before the decoder, as in Stable Diffusion 1 and 2 and
            SDXL; off in Stable Diffusion 3 and FLUX. Family kl only
        mid_attention: self-attention at the smallest size of encoder and decoder. Family kl only
        patches: discriminators classify overlapping patches (70x70 pixels at 256 and more, 34 at 128, 16 at 64;
            PatchGAN, Isola et al. 2017) instead of whole images: sharper texture, no view of the whole
    """

    family: str = "residual"
    width: int = 32
    norm: Norm = "none"
    blocks: int = 2
    attention: tuple[int, ...] = ()
    latent_stride: Literal[2, 4, 8, 16] | None = None
    multipliers: tuple[int, ...] | None = None
    quant_conv: bool = True
    mid_attention: bool = True
    patches: bool = False

    def check(self, image_size: ImageSize, discriminator: bool = True) -> None:
        """Raise a ValueError that names a setting that does not fit a system with or without a discriminator."""
        side, levels = min(sides(image_size)), _levels(image_size)
        if self.stride is None:
            unset = "2, 4, 8 or 16 (or networks.multipliers, such as [1, 2, 4, 4]), as codes of family kl are maps"
            check(self.family != "kl", "networks.latent_stride", "null", unset)
            halvings(image_size)
        check_positive("networks.", width=self.width, blocks=self.blocks)
        self._check_width(levels)
        check(self.blocks <= MAX_BLOCKS, "networks.blocks", self.blocks, f"{MAX_BLOCKS} at most")
        stride, multipliers = self.latent_stride, list(self.multipliers or ())
        check(not stride or stride <= 2**levels, "networks.latent_stride", stride, f"{2**levels} at most")
        check(len(multipliers) <= levels + 1, "networks.multipliers", multipliers, f"{levels + 1} numbers at most")
        if stride and multipliers:
            expected = f"{stride.bit_length()} numbers, as system.networks.latent_stride is {stride}"
            check(stride == self.stride, "networks.multipliers", multipliers, expected)
        if self.stride:
            check_size(
                image_size, self.stride, "as a map of codes is smaller by system.networks.latent_stride or multipliers"
            )
        if not discriminator:
            check_unused("in a system without a discriminator", **{"networks.patches": (self.patches, False)})
        last = levels if discriminator else self.levels(image_size)
        sizes, attention = [side // 2**level for level in range(last + 1)], list(self.attention)
        check(set(attention) <= set(sizes), "networks.attention", attention, f"some of {sizes}, the networks' sizes")

    def _check_width(self, levels: int) -> None:
        """Raise a ValueError if the channels of a level cannot be divided into groups of 8, or 16 hidden ones."""
        for channels in (self.channels(level) for level in range(levels)):
            groups = max(1, channels // 8)
            fits = self.norm != "group" or channels % groups == 0
            fits = fits and (self.family != "residual" or 2 * channels % groups == 0)
            expected = "a number such as a multiple of 8, as channels are divided into groups"
            check(fits, "networks.width", self.width, expected)

    def latent_shape(self, image_size: ImageSize, latent_dim: int) -> tuple[int, ...]:
        """Return (latent_dim,) of a vector, or (latent_dim, height, width) of a map."""
        check_positive(latent_dim=latent_dim)
        return (latent_dim, *(side // self.stride for side in sides(image_size) if self.stride))

    @property
    def stride(self) -> int | None:
        """The number by which the sides of a map of codes are smaller than the image's; None if codes are vectors."""
        return 2 ** (len(self.multipliers) - 1) if self.multipliers else self.latent_stride

    def levels(self, image_size: ImageSize) -> int:
        """Return how often encoder and decoder halve and double the image size."""
        return self.stride.bit_length() - 1 if self.stride else halvings(image_size)[1]

    def channels(self, level: int) -> int:
        """Return the outputs of level 0, 1, ..., which double with each level up to 8 times the width."""
        return self.width * 2 ** min(level, 3)


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Return height and width."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def halvings(image_size: ImageSize) -> tuple[tuple[int, int], int]:
    """Return (sides, n), such that the image's sides are sides * 2^n and the smaller of `sides` is 4, 5, 6 or 7.

    There networks without a map of codes end.

    Raises:
        ValueError: no n fits; the message says which sizes do.
    """
    height, width = sides(image_size)
    n = _levels(image_size)
    check_size(
        image_size,
        2**n,
        "as networks halve images until the smaller side has 4 to 7 pixels (with maps of codes, and discriminators "
        "of patches, more sizes fit)",
    )
    return (height >> n, width >> n), n


def _levels(image_size: ImageSize) -> int:
    """How often the smaller side can be halved to 4 or more."""
    return max(0, (min(sides(image_size)) // 4).bit_length() - 1)


def check_size(image_size: ImageSize, multiple: int, why: str) -> None:
    """Raise a ValueError that names data.size unless both sides are in range, and multiples of a number."""
    found = sides(image_size)
    if max(found) > LARGEST or min(found) < SMALLEST:
        raise ValueError(
            f"images of {found[0]} x {found[1]} pixels do not fit the networks: expected sides from {SMALLEST} to "
            f"{LARGEST:,}; change data.size"
        )
    if any(side % multiple for side in found):
        # Where sides grow, networks may halve them once more, which fits a square's, and not any two.
        square = found[0] == found[1]
        fitting = [(round(side / multiple) if square else side // multiple) * multiple for side in found]
        nearest = fitting[0] if fitting[0] == fitting[1] else fitting
        raise ValueError(
            f"images of {found[0]} x {found[1]} pixels do not fit the networks: expected multiples of {multiple}, "
            f"{why}; change data.size, such as to {nearest}"
        )
