"""The GAN: a generator that a discriminator cannot tell from the data."""

from torch import Tensor

from models.adversary import Adversary
from models.losses import MODES
from models.networks import Decoder, Discriminator, NetworkConfig
from models.settings import DiscriminatorConfig, OptimizerConfig, check_positive
from models.system import Batch, Loss, Player, System


class GAN(System):
    """Generative adversarial network (Goodfellow et al. 2014), of the decoder and the binary discriminator.

    It has no encoder, so nothing is reconstructed, and no third class to tell: its one discriminator is binary.

    Args:
        image_size: pixels a side, from the data
        channels: 1 or 3, from the data
        latent_dim: numbers per code, or per position of it
        networks: settings of the networks
        generator: its optimizer
        binary: settings of the discriminator

    Raises:
        ValueError: a size or weight is out of its range.
    """

    averaged = ("decoder",)

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int = 32,
        networks: NetworkConfig = NetworkConfig(),
        generator: OptimizerConfig = OptimizerConfig(),
        binary: DiscriminatorConfig = DiscriminatorConfig(),
    ):
        super().__init__()
        check_positive(latent_dim=latent_dim)
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        if binary.start or binary.ramp:
            raise ValueError(
                "system.binary.start and .ramp have no effect in a GAN, whose generator has no other loss: leave them 0"
            )
        self.optimizer = generator
        self.decoder = Decoder(networks, image_size, channels, latent_dim)
        self.discriminator_binary = Discriminator(
            networks, image_size, channels, 1, binary.spectral_norm, binary.minibatch_stddev
        )
        self.adversary = Adversary(self, MODES["binary"], binary, "binary", "discriminator_binary")

    def passes(self, batch: Batch) -> Tensor:
        return self.decoder(batch.normal("prior", self.latent_shape))

    def discriminator_loss(self, batch: Batch, generated: Tensor) -> Loss:
        return self.adversary.discriminator_loss(batch, batch.image, {"generated": generated})

    def loss(self, batch: Batch, generated: Tensor) -> Loss:
        generator_loss = self.adversary.generator_loss(batch, batch.image, {"generated": generated})
        return Loss(generator_loss, {"generator_loss/binary": generator_loss})

    def players(self) -> list[Player]:
        return [
            self.adversary.player(self.discriminator_loss),
            Player("generator", ("decoder",), self.loss, self.optimizer),
        ]

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)
