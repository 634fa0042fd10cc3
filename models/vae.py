"""The variational autoencoder: the posterior is pulled to N(0, I), samples come from that prior."""

from typing import NamedTuple

from torch import Tensor

from models import losses
from models.networks import Decoder, Encoder
from models.networks.blocks import Norm
from models.system import Batch, Loss, Optimizer, Player, System, check_positive, check_weights


class Passes(NamedTuple):
    mean: Tensor
    log_variance: Tensor
    reconstructed: Tensor


class VAE(System):
    """Variational autoencoder (Kingma & Welling 2014); it lowers -log N(x; G(z), I) + b KL(q(z|x) || N(0, I)).

    Args:
        image_size: pixels a side, from the data
        channels: 1 or 3, from the data
        latent_dim: numbers per code
        width: channels of the first convolution; they double with each halving of the size, up to eight times
        norm: normalisation in encoder and decoder
        kl_weight: b of the beta-VAE (Higgins et al. 2017); 1 is the evidence lower bound
        autoencoder: optimizer of encoder and decoder

    Raises:
        ValueError: a size or weight is out of its range.
    """

    averaged = ("encoder", "decoder")

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int = 32,
        width: int = 32,
        norm: Norm = "group",
        kl_weight: float = 1.0,
        autoencoder: Optimizer = Optimizer(),
    ):
        super().__init__()
        check_positive(latent_dim=latent_dim, width=width)
        check_weights(kl_weight=kl_weight)
        self.latent_dim = latent_dim
        self.kl_weight = kl_weight
        self.encoder = Encoder(image_size, channels, 2 * latent_dim, width, norm)
        self.decoder = Decoder(image_size, channels, latent_dim, width, norm)
        self.optimizer = autoencoder

    def passes(self, batch: Batch) -> Passes:
        mean, log_variance = self.encoder(batch.image).chunk(2, dim=1)
        z = losses.reparameterize(mean, log_variance, batch.normal("posterior", (self.latent_dim,)))
        return Passes(mean, log_variance, self.decoder(z))

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        reconstruction = losses.squared_error(batch.image, passes.reconstructed)
        kl = losses.gaussian_kl(passes.mean, passes.log_variance)
        return reconstruction + self.kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}

    def players(self) -> list[Player]:
        return [Player("autoencoder", ("encoder", "decoder"), self.loss, self.optimizer)]

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image)[:, : self.latent_dim])  # the posterior's mean
