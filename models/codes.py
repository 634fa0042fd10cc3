"""Codes for the next model: terms that make maps of codes smooth, and a decoder that forgives that model's errors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from models.settings import check, check_not_negative
from models.system import Batch, System, Terms


@dataclass(frozen=True)
class CodesConfig:
    """What makes codes easier for a model that is trained on them. docs/using-models.md says when each helps.

    Args:
        equivariance: weight of the reconstruction of a turned and scaled image from its code, turned and scaled alike,
            as a multiple of the reconstruction's own weight (EQ-VAE, Kouzelis et al. 2025). Usual are 0.25 to 1; raise
            it if `eval/spectrum` is high. 0 turns it off
        scale_equivariance: the same for images at half or a quarter of their size, without turns (Skorokhodov et al.
            2025); usual is 0.25. 0 turns it off
        noise: tau of the noise sigma * n on codes before they are decoded in training, with n from N(0, I) and sigma
            from |N(0, tau^2)| for each image (RAE, Zheng et al. 2025), so that the decoder forgives a generator's
            errors; usual are 0.1 to 0.8. 0 turns it off
    """

    equivariance: float = 0.0
    scale_equivariance: float = 0.0
    noise: float = 0.0


class CodeTerms:
    """What the settings `codes` add to a system with a `decoder` of codes; without settings, nothing.

    Raises:
        ValueError: a setting is out of its range, or needs a map of codes.
    """

    def __init__(self, system: System, config: CodesConfig | None):
        self.system, self.config = system, config or CodesConfig()
        settings = vars(self.config)
        check_not_negative("codes.", **settings)
        maps = len(system.latent_shape) == 3
        for name in ("equivariance", "scale_equivariance"):
            needed = f"2, 4, 8 or 16 while system.codes.{name} is {settings[name]}, as it needs a map of codes"
            check(maps or not settings[name], "networks.latent_stride", "null", needed)

    def noised(self, batch: Batch, z: Tensor) -> Tensor:
        """Return what is decoded in training in place of the codes z."""
        if not self.config.noise:
            return z
        noise = batch.normal("code noise", self.system.latent_shape)
        return add_noise(z, noise, self.config.noise * batch.normal("code noise deviation", ()))

    def terms(self, batch: Batch, z: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Terms:
        """Return the terms of codes z of the batch's images, without their weights; `distance` is the reconstruction's.

        All images of a step are transformed alike.
        """
        if not (self.config.equivariance or self.config.scale_equivariance):
            return {}
        u = batch.common("code transform", 3)
        eighths, turns, coarse = 2 + int(6 * u[0]), int(4 * u[1]), (2, 4)[int(2 * u[2])]
        apart = partial(equivariance, self.system.get_submodule("decoder"), batch.image, z, distance)
        terms = {}
        if self.config.equivariance:
            terms["equivariance"] = apart(eighths, turns)
        if self.config.scale_equivariance:
            terms["scale_equivariance"] = apart(coarse, 0)
        return terms

    def weighted(self, terms: Terms) -> list[Tensor]:
        return [getattr(self.config, name) * value for name, value in terms.items()]


def add_noise(z: Tensor, noise: Tensor, deviation: Tensor) -> Tensor:
    """Return z + |deviation| * noise of codes [n, ...], deviations [n] (RAE, Zheng et al. 2025, arXiv 2510.11690)."""
    return z + deviation.abs().view(-1, *[1] * (z.dim() - 1)) * noise


def equivariance(
    decode: Callable[[Tensor], Tensor],
    image: Tensor,
    z: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
    eighths: int,
    turns: int,
) -> Tensor:
    """Return distance(t(x), D(t(z))) with a transform t of images x and codes z.

    With turns it is the term of EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509), without them that of scale
    equivariance (Skorokhodov et al. 2025, arXiv 2502.14831).

    It is scaled by the area of x over that of t(x), so that a distance that is a sum over pixels counts as at full
    size.

    Args:
        decode: D
        image: x, [n, channels, height, width]
        z: maps of codes [n, channels, h, w]
        distance: of two stacks of images of any size
        eighths: scale of t in eighths; the paper draws it from [1/4, 1). Few scales make few sizes to be compiled
        turns: quarter turns of t
    """
    small = [max(1, round(side * eighths / 8)) for side in z.shape[2:]]
    decoded = decode(resize(z, small).rot90(turns, (2, 3)))
    target = resize(image.rot90(turns, (2, 3)), decoded.shape[2:])
    return distance(target, decoded) * (image[0].numel() / target[0].numel())


def resize(x: Tensor, size: list[int] | torch.Size) -> Tensor:
    """Return maps [n, channels, h, w] in another size [h, w], by antialiased bilinear interpolation.

    It is a product with matrices, as torch's own interpolation has no deterministic gradient on CUDA.
    """
    with torch.autocast(x.device.type, enabled=False):
        for side, axis in zip(size, (2, 3), strict=True):
            eye = torch.eye(x.shape[axis], dtype=x.dtype, device=x.device)[None, None]
            matrix = interpolate(eye, (side, x.shape[axis]), mode="bilinear", antialias=True)[0, 0]
            x = (x.transpose(axis, 3) @ matrix.T).transpose(axis, 3)
    return x
