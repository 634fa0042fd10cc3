"""The standard autoencoder: x -> z -> x'."""

import torch
from torch import Tensor

from models import losses
from models.networks import Decoder, Encoder, NetworkConfig
from models.settings import OptimizerConfig, check_positive
from models.system import Batch, Loss, Player, System


class AE(System):
    """Autoencoder with a deterministic code; it lowers 1/2 ||x - G(E(x))||^2.

    Nothing ties its codes to a prior, so its "samples", decoded from N(0, I), are not expected to be images.

    Args:
        image_size: pixels a side, from the data
        channels: 1 or 3, from the data
        latent_dim: numbers per code, or per position of it
        networks: settings of the networks
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
        networks: NetworkConfig = NetworkConfig(),
        autoencoder: OptimizerConfig = OptimizerConfig(),
    ):
        super().__init__()
        check_positive(latent_dim=latent_dim)
        networks.check_without_discriminator(image_size)
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        self.encoder = Encoder(networks, image_size, channels, latent_dim)
        self.decoder = Decoder(networks, image_size, channels, latent_dim)
        self.optimizer = autoencoder

    def passes(self, batch: Batch) -> Tensor:
        return self.decoder(self.encoder(batch.image))

    def loss(self, batch: Batch, reconstructed: Tensor) -> Loss:
        reconstruction = losses.squared_error(batch.image, reconstructed)
        return Loss(reconstruction, {"reconstruction": reconstruction})

    def players(self) -> list[Player]:
        return [Player("autoencoder", ("encoder", "decoder"), self.loss, self.optimizer)]

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(image)
        return code, torch.full_like(code, -torch.inf)

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image))
