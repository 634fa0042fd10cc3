"""The GAN: a generator whose images a discriminator cannot tell from real ones."""

from torch import Tensor

from models.adversary import Adversary
from models.networks import Decoder, NetworkConfig
from models.settings import DiscriminatorConfig, OptimizerConfig
from models.system import Batch, Loss, Player, System


class GAN(System):
    """Generative adversarial network (Goodfellow et al. 2014) of a decoder and a binary discriminator.

    It has no encoder, so it reconstructs nothing and no third class of images exists.

    Args:
        image_size: side of the images in pixels; set by data.size
        channels: 1 (grey) or 3 (colour); set by data.channels
        latent_dim: numbers per latent code, or channels of the code's map if networks.latent_stride is set
        networks: architecture of decoder and discriminator
        generator: optimizer of the decoder
        binary: settings of the discriminator
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
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        if binary.start or binary.ramp:
            raise ValueError(
                "system.binary.start and .ramp have no effect in a GAN, whose generator has no other loss: leave them 0"
            )
        self.optimizer = generator
        self.decoder = Decoder(networks, image_size, channels, latent_dim)
        self.adversary = Adversary(self, "binary", binary, networks, image_size, channels)

    def passes(self, batch: Batch) -> Tensor:
        return self.decoder(batch.normal("prior", self.latent_shape))

    def discriminator_loss(self, batch: Batch, generated: Tensor) -> Loss:
        return self.adversary.discriminator_loss(batch, batch.image, {"generated": generated})

    def loss(self, batch: Batch, generated: Tensor) -> Loss:
        generator_loss = self.adversary.generator_loss(batch, batch.image, {"generated": generated})
        return Loss(generator_loss, {"generator_loss/binary": generator_loss})

    def players(self) -> list[Player]:
        generator = Player("generator", ("decoder",), self.loss, self.optimizer)
        return [self.adversary.player(self.discriminator_loss), generator]

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)
