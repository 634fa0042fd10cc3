"""The VAE-GAN: discriminators make a VAE's reconstructions and samples sharp."""

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models import losses
from models.losses import MODES, Mode, ModeName
from models.networks import Decoder, Discriminator, Encoder
from models.networks.blocks import Norm, halvings
from models.system import Batch, Loss, Optimizer, Player, System, check_positive, check_weights


class Passes(NamedTuple):
    mean: Tensor
    log_variance: Tensor
    reconstructed: Tensor
    generated: Tensor
    fooling: Tensor  # the reconstructions that carry the adversarial gradient


class VAEGAN(System):
    """VAE-GAN (Larsen et al. 2016), with discriminators that see reconstructions and samples from the prior.

    The `binary` discriminator tells real from fake; the `ternary` one tells real, reconstructed and generated images
    apart, which drives the encoder's codes to match the prior. Each has its own network and its own optimizer.
    Encoder and decoder lower
    reconstruction_weight * reconstruction + kl_weight * KL + adversarial_weight * (mean of the modes' -log p_real).

    Args:
        image_size: pixels a side, from the data
        channels: 1 or 3, from the data
        latent_dim: numbers per code
        width: channels of the first convolution; they double with each halving of the size, up to eight times
        norm: normalisation in encoder and decoder (the discriminators have none)
        discriminator: the modes that play
        reconstruction: measured as 1/2 squared error of pixels, of a discriminator's features, or of both
        feature_discriminator: whose features; needed where both modes play and reconstruction is not "pixels"
        feature_layer: its level whose activations are compared, counted from 0; unset: the last
        reconstruction_weight: of the reconstruction term
        kl_weight: of KL(q(z|x) || N(0, I))
        adversarial_weight: of the adversarial term
        encoder_adversarial: whether the encoder gets the adversarial gradient of its reconstructions
        r1_weight: gamma of R1 on the realness scalar; 0 is off
        autoencoder: optimizer of encoder and decoder
        binary: optimizer of the binary discriminator; unset: the same settings as the autoencoder's
        ternary: optimizer of the ternary discriminator; unset: the same settings as the autoencoder's

    Raises:
        ValueError: a size or weight is out of its range, or an option has no effect as set.
    """

    averaged = ("encoder", "decoder")

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int = 32,
        width: int = 32,
        norm: Norm = "group",
        discriminator: Literal["binary", "ternary", "both"] = "binary",
        reconstruction: Literal["pixels", "features", "both"] = "pixels",
        feature_discriminator: ModeName | None = None,
        feature_layer: int | None = None,
        reconstruction_weight: float = 1.0,
        kl_weight: float = 1.0,
        adversarial_weight: float = 10.0,
        encoder_adversarial: bool = True,
        r1_weight: float = 0.1,
        autoencoder: Optimizer = Optimizer(),
        binary: Optimizer | None = None,
        ternary: Optimizer | None = None,
    ):
        super().__init__()
        check_positive(latent_dim=latent_dim, width=width)
        check_weights(
            reconstruction_weight=reconstruction_weight,
            kl_weight=kl_weight,
            adversarial_weight=adversarial_weight,
            r1_weight=r1_weight,
        )
        self.latent_dim = latent_dim
        self.modes = tuple(MODES.values()) if discriminator == "both" else (MODES[discriminator],)
        self.reconstruction = reconstruction
        self.feature_mode, self.feature_layer = self._features(feature_discriminator, feature_layer, image_size)
        self.reconstruction_weight = reconstruction_weight
        self.kl_weight = kl_weight
        self.adversarial_weight = adversarial_weight
        self.encoder_adversarial = encoder_adversarial
        self.r1_weight = r1_weight
        for name, settings in {"binary": binary, "ternary": ternary}.items():
            if settings is not None and MODES[name] not in self.modes:
                raise ValueError(f"system.{name} has no effect while system.discriminator is {discriminator}")
        self.optimizers = {
            "autoencoder": autoencoder,
            "binary": binary or autoencoder,
            "ternary": ternary or autoencoder,
        }
        self.encoder = Encoder(image_size, channels, 2 * latent_dim, width, norm)
        self.decoder = Decoder(image_size, channels, latent_dim, width, norm)
        for mode in self.modes:
            self.add_module(f"discriminator_{mode.name}", Discriminator(image_size, channels, mode.logits, width))

    def _features(self, name: ModeName | None, layer: int | None, image_size: int) -> tuple[str, int]:
        playing = [mode.name for mode in self.modes]
        if self.reconstruction == "pixels":
            if name is not None or layer is not None:
                raise ValueError(
                    "system.feature_discriminator and system.feature_layer have no effect while system.reconstruction "
                    "is pixels: set it to features or both, or leave them unset"
                )
            return playing[0], 0
        if name is None and len(playing) == 2:
            raise ValueError(
                f"system.reconstruction is {self.reconstruction} and system.discriminator is both: say whose features, "
                "with system.feature_discriminator binary or ternary"
            )
        if name is not None and name not in playing:
            raise ValueError(f"system.feature_discriminator is {name}, but system.discriminator is {playing[0]}")
        levels = halvings(image_size)[1]
        layer = levels - 1 if layer is None else layer
        if not 0 <= layer < levels:
            raise ValueError(f"system.feature_layer is {layer}, expected 0 to {levels - 1} at {image_size} pixels")
        return name or playing[0], layer

    def discriminator(self, mode_name: str) -> nn.Module:
        return self.get_submodule(f"discriminator_{mode_name}")

    def passes(self, batch: Batch) -> Passes:
        mean, log_variance = self.encoder(batch.image).chunk(2, dim=1)
        z = losses.reparameterize(mean, log_variance, batch.normal("posterior", (self.latent_dim,)))
        prior = batch.normal("prior", (self.latent_dim,))
        # Without the encoder's share, the adversarial gradient enters the decoder through a second pass on fixed codes.
        codes = [z, prior] if self.encoder_adversarial else [z, prior, z.detach()]
        images = self.decoder(torch.cat(codes)).chunk(len(codes))
        return Passes(mean, log_variance, images[0], images[1], images[0] if self.encoder_adversarial else images[2])

    def judge(self, mode: Mode, batch: Batch, passes: Passes) -> Loss:
        discriminator = self.discriminator(mode.name)
        image = batch.image.detach().requires_grad_(self.r1_weight > 0)
        real = discriminator(image)
        reconstructed, generated = discriminator(torch.cat([passes.reconstructed, passes.generated])).chunk(2)
        loss = losses.judge(real, reconstructed, generated)
        terms = {"judge": loss, "chance": loss.new_full((), mode.chance)}
        if self.r1_weight > 0:
            terms["r1"] = losses.r1(image, real)
            loss = loss + self.r1_weight * terms["r1"]
        return loss, terms | losses.accuracy(real, reconstructed, generated)

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        terms = self.reconstruction_terms(batch.image, passes.reconstructed)
        reconstruction = torch.stack(list(terms.values())).sum()
        kl = losses.gaussian_kl(passes.mean, passes.log_variance)
        fakes = torch.cat([passes.fooling, passes.generated])
        fools = {f"fool/{mode.name}": losses.fool(self.discriminator(mode.name)(fakes)) for mode in self.modes}
        fool = torch.stack(list(fools.values())).mean()
        loss = self.reconstruction_weight * reconstruction + self.kl_weight * kl + self.adversarial_weight * fool
        return loss, terms | {"kl": kl} | fools

    def reconstruction_terms(self, image: Tensor, reconstructed: Tensor) -> dict[str, Tensor]:
        """-log p(x|z) on pixels, on the features of a discriminator's layer (Larsen et al. 2016, eq. 7), or both."""
        terms = {}
        if self.reconstruction != "features":
            terms["reconstruction"] = losses.squared_error(image, reconstructed)
        if self.reconstruction != "pixels":
            features = partial(self.discriminator(self.feature_mode), feature_layer=self.feature_layer)
            terms["reconstruction/features"] = losses.squared_error(features(image), features(reconstructed))
        return terms

    def players(self) -> list[Player]:
        discriminators = [
            Player(mode.name, (f"discriminator_{mode.name}",), partial(self.judge, mode), self.optimizers[mode.name])
            for mode in self.modes
        ]
        autoencoder = Player("autoencoder", ("encoder", "decoder"), self.loss, self.optimizers["autoencoder"])
        return [*discriminators, autoencoder]

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image)[:, : self.latent_dim])  # the posterior's mean
