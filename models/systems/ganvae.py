"""The GAN-VAE: first the generator, then the encoder, z -> x -> z'; half of a CycleGAN."""

from typing import NamedTuple

from torch import Tensor

from models import losses
from models.adversary import Adversary, check_patches
from models.networks import ImageSize, NetworkConfig, build_decoder, build_encoder
from models.settings import DiscriminatorConfig, OptimizerConfig, check_not_negative
from models.system import Autoencoding, Batch, Loss, Player, System


class Passes(NamedTuple):
    prior: Tensor
    generated: Tensor
    mean: Tensor
    log_variance: Tensor


class GANVAE(Autoencoding, System):
    """A GAN with an encoder of its images, trained on generator_loss(G(z)) + latent_weight * (-log q(z | G(z))).

    The second term bounds the mutual information of z and G(z) from below (Chen et al. 2016, eq. 4, for the whole z).
    The encoder is trained on generated images only.

    Args:
        latent_weight: weight of -log q(z | G(z)), in nats per number of the code; raise it for codes that are read back
            better, lower it for better samples
    """

    averaged = ("encoder", "decoder")
    architecture = ("latent_dim", "networks", "classes")

    def __init__(
        self,
        image_size: ImageSize,
        channels: int,
        latent_dim: int = 32,
        networks: NetworkConfig = NetworkConfig(),
        latent_weight: float = 1.0,
        generator: OptimizerConfig = OptimizerConfig(),
        binary: DiscriminatorConfig = DiscriminatorConfig(),
        classes: int = 0,
    ):
        super().__init__()
        self.classes = classes
        check_not_negative(latent_weight=latent_weight)
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        self.latent_weight, self.optimizer = latent_weight, generator
        self.encoder = build_encoder(networks, image_size, channels, 2 * latent_dim)
        self.decoder = build_decoder(networks, image_size, channels, latent_dim, classes)
        self.adversary = Adversary(self, "binary", binary, networks, image_size, channels)
        check_patches(networks, self.adversary)

    def passes(self, batch: Batch) -> Passes:
        prior = batch.normal("prior", self.latent_shape)
        generated = self.decoder(prior, *self.told(batch.label))
        return Passes(prior, generated, *self.posterior(generated))

    def discriminator_loss(self, batch: Batch, passes: Passes) -> Loss:
        return self.adversary.discriminator_loss(batch, batch.image, {"generated": passes.generated})

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        generator_loss = self.adversary.generator_loss(batch, batch.image, {"generated": passes.generated})
        latent = losses.gaussian_likelihood(passes.prior, passes.mean, passes.log_variance) / passes.prior[0].numel()
        loss = self.adversary.weight(batch) * generator_loss + self.latent_weight * latent
        return Loss(loss, {"generator_loss/binary": generator_loss, "latent": latent})

    def players(self) -> list[Player]:
        generator = Player("generator", ("decoder", "encoder"), self.loss, self.optimizer)
        return [self.adversary.player(self.discriminator_loss), generator]
