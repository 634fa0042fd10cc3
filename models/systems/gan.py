"""The GAN: a generator whose images a discriminator cannot tell from real ones."""

from torch import Tensor

from models.adversary import Adversary, check_patches
from models.networks import ImageSize, NetworkConfig, build_decoder
from models.settings import DiscriminatorConfig, OptimizerConfig, check_unused
from models.system import Batch, Loss, Player, System


class GAN(System):
    """Generative adversarial network (Goodfellow et al. 2014) of a decoder and a binary discriminator."""

    averaged = ("decoder",)
    architecture = ("latent_dim", "networks", "classes")

    def __init__(
        self,
        image_size: ImageSize,
        channels: int,
        latent_dim: int = 32,
        networks: NetworkConfig = NetworkConfig(),
        generator: OptimizerConfig = OptimizerConfig(),
        binary: DiscriminatorConfig = DiscriminatorConfig(),
        classes: int = 0,
    ):
        super().__init__()
        self.classes = classes
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        unused = {"start": (binary.start, 0), "counts_from": (binary.counts_from, None), "ramp": (binary.ramp, 0)}
        unused = {f"binary.{name}": values for name, values in unused.items()}
        check_unused("in a GAN, whose generator has no other loss", **unused)
        self.optimizer = generator
        self.decoder = build_decoder(networks, image_size, channels, latent_dim, classes)
        self.adversary = Adversary(self, "binary", binary, networks, image_size, channels)
        check_patches(networks, self.adversary)

    def passes(self, batch: Batch) -> Tensor:
        return self.decoder(batch.normal("prior", self.latent_shape), *self.told(batch.label))

    def discriminator_loss(self, batch: Batch, generated: Tensor) -> Loss:
        return self.adversary.discriminator_loss(batch, batch.image, {"generated": generated})

    def loss(self, batch: Batch, generated: Tensor) -> Loss:
        generator_loss = self.adversary.generator_loss(batch, batch.image, {"generated": generated})
        return Loss(generator_loss, {"generator_loss/binary": generator_loss})

    def players(self) -> list[Player]:
        generator = Player("generator", ("decoder",), self.loss, self.optimizer)
        return [self.adversary.player(self.discriminator_loss), generator]

    def sample(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.decoder(z, *self.told(label))
