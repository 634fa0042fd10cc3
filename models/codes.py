"""Codes for the next model: terms that make maps of codes smooth, and a decoder that forgives that model's errors."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, normalize, relu

from models.losses import at_least_fp32
from models.networks.dino import DINO
from models.resize import resize
from models.settings import WeightsFile, check, check_not_negative, check_unused
from models.system import Batch, Loss, System, Terms


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
        alignment: weight of the alignment of codes with features of the image in a frozen vision transformer of DINO
            (the VF loss of VA-VAE, Yao et al. 2025), times the ratio of the norms of the reconstruction's gradient at
            the codes and of its own, both of the step before. Usual is 0.1; it pays with many channels. 0 turns it off
        margins: cosine similarity, and difference of similarities, beyond which alignment asks for no more
        dino_weights: file of the vision transformer that alignment needs, as for perceptual_weights of dino
    """

    equivariance: float = 0.0
    scale_equivariance: float = 0.0
    noise: float = 0.0
    alignment: float = 0.0
    margins: tuple[float, float] = (0.5, 0.25)
    dino_weights: WeightsFile | None = None


class CodeTerms:
    """What the settings `codes` add to a system with a `decoder` of codes; without settings, nothing.

    Raises:
        ValueError: a setting is out of its range, or needs a map of codes.
    """

    def __init__(self, system: System, config: CodesConfig | None):
        self.system, self.config = system, config or CodesConfig()
        # msgspec, which reads checkpoints, leaves defaults to the class, so that vars() would not have them.
        settings = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        names = ("equivariance", "scale_equivariance", "noise", "alignment")
        check_not_negative("codes.", **{name: settings[name] for name in names})
        check(min(self.config.margins) >= 0, "codes.margins", [*self.config.margins], "two numbers, 0 or more")
        maps = len(system.latent_shape) == 3
        for name in ("equivariance", "scale_equivariance", "alignment"):
            needed = f"2, 4, 8 or 16 while system.codes.{name} is {settings[name]}, as it needs a map of codes"
            check(maps or not settings[name], "networks.latent_stride", "null", needed)
        self._add_alignment(self.config)

    def _add_alignment(self, config: CodesConfig) -> None:
        weights, system = config.dino_weights, self.system
        if bool(config.alignment) != (weights is not None):
            raise ValueError(
                f"system.codes.alignment is {config.alignment} and system.codes.dino_weights is "
                f"{weights or 'null'}: set both or neither"
            )
        if weights is None:
            check_unused("while system.codes.alignment is 0", **{"codes.margins": (config.margins, (0.5, 0.25))})
            return
        system.register_buffer("alignment_weight", torch.ones(()))  # from the gradients of the step before
        if weights:  # a system that is only used needs neither
            dino = DINO(weights, "system.codes.dino_weights")
            system.add_module("dino_codes", dino)
            system.add_module("alignment", nn.Linear(system.latent_shape[0], dino.width, bias=False))

    def noised(self, batch: Batch, z: Tensor) -> Tensor:
        """Return what is decoded in training in place of the codes z."""
        if not self.config.noise:
            return z
        noise = batch.normal("code noise", self.system.latent_shape)
        return add_noise(z, noise, self.config.noise * batch.normal("code noise deviation", ()))

    def loss(
        self, batch: Batch, z: Tensor, reconstruction: Tensor, distance: Callable[[Tensor, Tensor], Tensor]
    ) -> Loss:
        """Return the weighted sum of the terms of codes z of the batch's images, the terms, and what `after` needs.

        Args:
            batch: the images, and the draws of their transforms; all images of a step are transformed alike
            z: their codes
            reconstruction: the loss whose gradient is compared with the alignment's
            distance: of an image and its reconstruction
        """
        terms, statistics = self._terms(batch, z, distance), {}
        weighted = {name: getattr(self.config, name) * term for name, term in terms.items()}
        if self.config.alignment:
            statistics["code_gradients"] = code_gradients(z, reconstruction, terms["alignment"])
            terms["alignment_weight"] = self.system.get_buffer("alignment_weight").clone()
            weighted["alignment"] = terms["alignment_weight"] * weighted["alignment"]
        return Loss(sum(weighted.values(), reconstruction.new_zeros(())), terms, statistics)

    def _terms(self, batch: Batch, z: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Terms:
        terms = {}
        if self.config.alignment:
            with torch.no_grad():
                features = self.system.get_submodule("dino_codes")(batch.image)[-1]
            features = adaptive_avg_pool2d(features, (z.shape[2], z.shape[3]))
            projected = at_least_fp32(self.system.get_submodule("alignment")(z.movedim(1, 3))).movedim(3, 1)
            terms["alignment"] = alignment(z, projected, features, self.config.margins)
        if not (self.config.equivariance or self.config.scale_equivariance):
            return terms
        u = batch.common("code transform", 3)
        eighths, turns, coarse = 2 + int(6 * u[0]), int(4 * u[1]), (2, 4)[int(2 * u[2])]
        apart = partial(equivariance, self.system.get_submodule("decoder"), batch.image, z, distance)
        if self.config.equivariance:
            terms["equivariance"] = apart(eighths, turns)
        if self.config.scale_equivariance:
            terms["scale_equivariance"] = apart(coarse, 0)
        return terms

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that the player of these terms trains besides its own."""
        return ("alignment",) if self.config.dino_weights else ()

    def after(self, statistics: Terms) -> None:
        """Update the weight of the alignment (Yao et al. 2025, at the encoder's last layer in place of the codes)."""
        if self.config.alignment:
            reconstruction, aligned = statistics["code_gradients"].sqrt()
            kept, ratio = self.system.get_buffer("alignment_weight"), reconstruction / (aligned + 1e-4)
            # fp16 may overflow now and then, and codes within all margins have no gradient.
            sound = ratio.isfinite() & aligned.isfinite() & (aligned > 0)
            kept.copy_(torch.where(sound, ratio.clamp(max=1e8), kept))

    def check_frozen(self, names: Collection[str]) -> None:
        """Raise a ValueError if a term needs the encoder to be trained, and it is among these networks."""
        fits = not self.config.alignment or "encoder" not in names
        check(fits, "codes.alignment", self.config.alignment, "0, as the encoder, which it aligns, is not trained")


def code_gradients(z: Tensor, reconstruction: Tensor, aligned: Tensor) -> Tensor:
    """Return the mean squared norms, over images, of the gradients of two losses at the image's code z, [2]."""
    (of_reconstruction,) = torch.autograd.grad(reconstruction, z, retain_graph=True)
    # The alignment is a mean over positions, and fp16 has a small range: its gradient is scaled up on its way.
    positions = z[:, 0].numel()
    (of_alignment,) = torch.autograd.grad(positions * aligned, z, retain_graph=True)
    gradients = of_reconstruction, of_alignment / positions
    return torch.stack([len(z) * gradient.square().sum() for gradient in gradients])


def add_noise(z: Tensor, noise: Tensor, deviation: Tensor) -> Tensor:
    """Return z + |deviation| * noise of codes [n, ...], deviations [n] (RAE, Zheng et al. 2025, arXiv 2510.11690)."""
    return z + deviation.abs().view(-1, *[1] * (z.dim() - 1)) * noise


def alignment(z: Tensor, projected: Tensor, features: Tensor, margins: tuple[float, float]) -> Tensor:
    """Return the VF loss of codes z_i and features f_i at the positions i of an image (Yao et al. 2025, 2501.01423).

    It is the mean of relu(1 - m1 - cos(W z_i, f_i)) plus that of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m2).

    Args:
        z: maps of codes [n, channels, h, w]
        projected: W z, [n, width, h, w]
        features: f, [n, width, h, w]
        margins: m1, m2
    """
    unit_z, unit_f = (normalize(x.flatten(2), dim=1) for x in (z, features))
    apart = (unit_z.mT @ unit_z - unit_f.mT @ unit_f).abs()
    point = relu(1 - margins[0] - cosine_similarity(projected, features)).mean()
    return point + relu(apart - margins[1]).mean()


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
