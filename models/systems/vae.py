"""The variational autoencoder: the posterior is pulled to N(0, I), samples come from that prior."""

from typing import NamedTuple

from torch import Tensor

from models import losses
from models.losses import Likelihood
from models.networks import Decoder, Encoder, NetworkConfig
from models.networks.blocks import Scale
from models.settings import OptimizerConfig, check_effect, check_positive, check_weights
from models.system import Batch, Loss, Player, System


class Passes(NamedTuple):
    mean: Tensor
    log_variance: Tensor
    reconstructed: Tensor


class VAE(System):
    """Variational autoencoder (Kingma & Welling 2014); it lowers -log p(x|z) + b KL(q(z|x) || N(0, I)).

    Args:
        image_size: pixels a side, from the data
        channels: 1 or 3, from the data
        latent_dim: numbers per code, or per position of it
        networks: settings of the networks
        likelihood: p(x|z) of a pixel: gaussian, laplace, or bernoulli (of pixels in [0, 1])
        learned_scale: learn the likelihood's one scale, which is 1 otherwise (Rybkin et al. 2021)
        kl_weight: b of the beta-VAE (Higgins et al. 2017); 1 is the evidence lower bound
        kl_warmup: steps in which b rises from 0
        free_bits: nats that each number of a code may hold at no cost (Kingma et al. 2016)
        autoencoder: optimizer of encoder and decoder, and of the scale

    Raises:
        ValueError: a size or weight is out of its range, or an option has no effect as set.
    """

    averaged = ("encoder", "decoder")

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int = 32,
        networks: NetworkConfig = NetworkConfig(),
        likelihood: Likelihood = "gaussian",
        learned_scale: bool = False,
        kl_weight: float = 1.0,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        autoencoder: OptimizerConfig = OptimizerConfig(),
    ):
        super().__init__()
        check_positive(latent_dim=latent_dim)
        check_weights(kl_weight=kl_weight, kl_warmup=kl_warmup, free_bits=free_bits)
        networks.check_without_discriminator(image_size)
        if not kl_weight:
            check_effect("system.kl_weight is 0", kl_warmup=(kl_warmup, 0), free_bits=(free_bits, 0.0))
        if learned_scale and likelihood == "bernoulli":
            raise ValueError("system.learned_scale has no effect while system.likelihood is bernoulli")
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        self.likelihood: Likelihood = likelihood
        self.kl_weight, self.kl_warmup, self.free_bits = kl_weight, kl_warmup, free_bits
        self.optimizer = autoencoder
        self.encoder = Encoder(networks, image_size, channels, 2 * latent_dim)
        self.decoder = Decoder(networks, image_size, channels, latent_dim)
        if learned_scale:
            self.scale = Scale()

    def passes(self, batch: Batch) -> Passes:
        mean, log_variance = self.posterior(batch.image)
        z = losses.reparameterize(mean, log_variance, batch.normal("posterior", self.latent_shape))
        return Passes(mean, log_variance, self.decoder(z))

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        log_scale = self.scale(passes.reconstructed) if hasattr(self, "scale") else None
        reconstruction = losses.likelihood(self.likelihood, batch.image, passes.reconstructed, log_scale)
        kl = losses.gaussian_kl(passes.mean, passes.log_variance, self.free_bits)
        loss = reconstruction + self.kl_weight * batch.ramp(0, self.kl_warmup) * kl
        scale = {} if log_scale is None else {"scale": log_scale.exp()}
        return Loss(loss, {"reconstruction": reconstruction, "kl": kl} | scale)

    def players(self) -> list[Player]:
        return [Player("autoencoder", tuple(self.networks()), self.loss, self.optimizer)]

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = losses.at_least_fp32(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decoder(self.posterior(image)[0])
