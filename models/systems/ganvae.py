"""The GAN-VAE: the generator first, the encoder after, z -> x -> z'; half of a CycleGAN."""

from typing import NamedTuple

from torch import Tensor

from models import losses
from models.adversary import Adversary
from models.losses import MODES
from models.networks import Decoder, Discriminator, Encoder, NetworkConfig
from models.settings import DiscriminatorConfig, OptimizerConfig, check_positive, check_weights
from models.system import Batch, Loss, Player, System


class Passes(NamedTuple):
    prior: Tensor
    generated: Tensor
    mean: Tensor
    log_variance: Tensor


class GANVAE(System):
    """A GAN whose images can be read back: generator and encoder lower generator_loss(G(z)) + l (-log q(z | G(z))).

    That bounds the mutual information of z and G(z) from below (Chen et al. 2016, eq. 4, of the whole z). The encoder
    sees generated images only; how well it reconstructs real ones is reported.

    Args:
        image_size: pixels a side, from the data
        channels: 1 or 3, from the data
        latent_dim: numbers per code, or per position of it
        networks: settings of the networks
        latent_weight: l of -log q(z | G(z)) per number of the code
        generator: optimizer of decoder and encoder
        binary: settings of the discriminator

    Raises:
        ValueError: a size or weight is out of its range.
    """

    averaged = ("encoder", "decoder")

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int = 32,
        networks: NetworkConfig = NetworkConfig(),
        latent_weight: float = 1.0,
        generator: OptimizerConfig = OptimizerConfig(),
        binary: DiscriminatorConfig = DiscriminatorConfig(),
    ):
        super().__init__()
        check_positive(latent_dim=latent_dim)
        check_weights(latent_weight=latent_weight)
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        self.latent_weight, self.optimizer = latent_weight, generator
        self.encoder = Encoder(networks, image_size, channels, 2 * latent_dim)
        self.decoder = Decoder(networks, image_size, channels, latent_dim)
        self.discriminator_binary = Discriminator(
            networks, image_size, channels, 1, binary.spectral_norm, binary.minibatch_stddev
        )
        self.adversary = Adversary(self, MODES["binary"], binary, "binary", "discriminator_binary")

    def passes(self, batch: Batch) -> Passes:
        prior = batch.normal("prior", self.latent_shape)
        generated = self.decoder(prior)
        return Passes(prior, generated, *self.posterior(generated))

    def discriminator_loss(self, batch: Batch, passes: Passes) -> Loss:
        return self.adversary.discriminator_loss(batch, batch.image, {"generated": passes.generated})

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        generator_loss = self.adversary.generator_loss(batch, batch.image, {"generated": passes.generated})
        latent = losses.gaussian_likelihood(passes.prior, passes.mean, passes.log_variance) / passes.prior[0].numel()
        return Loss(
            self.adversary.weight(batch) * generator_loss + self.latent_weight * latent,
            {"generator_loss/binary": generator_loss, "latent": latent},
        )

    def players(self) -> list[Player]:
        generator = Player("generator", ("decoder", "encoder"), self.loss, self.optimizer)
        return [self.adversary.player(self.discriminator_loss), generator]

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = losses.at_least_fp32(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decoder(self.posterior(image)[0])
