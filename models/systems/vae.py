"""The variational autoencoder: a KL term pulls the posterior to N(0, I), from which samples are drawn."""

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import losses
from models.codes import CodesConfig, CodeTerms
from models.losses import Likelihood
from models.networks import ImageSize, NetworkConfig, build_decoder, build_encoder
from models.networks.families import family_of
from models.settings import OptimizerConfig, check, check_kl, check_unused
from models.system import Autoencoding, Batch, Loss, Player, System


class Passes(NamedTuple):
    mean: Tensor
    log_variance: Tensor
    z: Tensor
    reconstructed: Tensor


class LogScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, _: Tensor) -> Tensor:
        """Return log s of a likelihood's scale s; DDP's forward needs an input, which changes nothing."""
        return self.log_scale.clone()


class VAE(Autoencoding, System):
    """Variational autoencoder (Kingma & Welling 2014), trained on -log p(x|z) + kl_weight * KL(q(z|x) || N(0, I)).

    Args:
        likelihood: distribution p(x|z) of a pixel: gaussian (squared error), laplace (absolute error) or bernoulli
            (cross-entropy in [0, 1], for black and white images)
        learned_scale: learn the one scale of the gaussian or laplace likelihood, which balances reconstruction and KL
            by itself (Rybkin et al. 2021); otherwise it is 1
        kl_weight: weight of the KL term, in nats per image. 1 gives the evidence lower bound; less gives sharper
            reconstructions, more a better fit to the prior (beta-VAE, Higgins et al. 2017)
    """

    averaged = ("encoder", "decoder")

    def __init__(
        self,
        image_size: ImageSize,
        channels: int,
        latent_dim: int = 32,
        networks: NetworkConfig = NetworkConfig(),
        likelihood: Likelihood = "gaussian",
        learned_scale: bool = False,
        kl_weight: float = 1.0,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        autoencoder: OptimizerConfig = OptimizerConfig(),
        codes: CodesConfig | None = None,
    ):
        super().__init__()
        check_kl(kl_weight, kl_warmup, free_bits)
        networks.check(image_size, discriminator=False)
        if likelihood == "bernoulli":
            check_unused("while system.likelihood is bernoulli", learned_scale=(learned_scale, False))
            bounded = family_of(networks).bounded
            check(bounded, "likelihood", likelihood, f"another, as images of family {networks.family} are not bounded")
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        self.likelihood: Likelihood = likelihood
        self.judged_by = "fid" if kl_weight else "rfid"
        self.kl_weight, self.kl_warmup, self.free_bits = kl_weight, kl_warmup, free_bits
        self.optimizer = autoencoder
        self.encoder = build_encoder(networks, image_size, channels, 2 * latent_dim)
        self.decoder = build_decoder(networks, image_size, channels, latent_dim)
        if learned_scale:
            self.scale = LogScale()
        self.code_terms = CodeTerms(self, codes)

    def passes(self, batch: Batch) -> Passes:
        mean, log_variance = self.posterior(batch.image)
        z = losses.reparameterize(mean, log_variance, batch.normal("posterior", self.latent_shape))
        return Passes(mean, log_variance, z, self.decoder(self.code_terms.noised(batch, z)))

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        log_scale = self.scale(passes.reconstructed) if hasattr(self, "scale") else None
        distance = partial(losses.likelihood, self.likelihood, log_scale=log_scale)
        reconstruction = distance(batch.image, passes.reconstructed)
        kl = losses.gaussian_kl(passes.mean, passes.log_variance, self.free_bits)
        codes = self.code_terms.loss(batch, passes.z, reconstruction, distance)
        loss = reconstruction + self.kl_weight * batch.ramp(0, self.kl_warmup) * kl + codes.value
        scale = {} if log_scale is None else {"scale": log_scale.exp()}
        return Loss(loss, {"reconstruction": reconstruction, "kl": kl} | codes.terms | scale, codes.statistics)

    def players(self) -> list[Player]:
        return [Player("autoencoder", tuple(self.networks()), self.loss, self.optimizer, after=self.code_terms.after)]

    def check_frozen(self, names: Collection[str]) -> None:
        self.code_terms.check_frozen(names)
