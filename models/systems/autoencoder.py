"""The autoencoder: x -> z -> x'."""

import torch
from torch import Tensor

from models import losses
from models.networks import ImageSize, NetworkConfig, build_decoder, build_encoder
from models.settings import OptimizerConfig
from models.system import Autoencoding, Batch, Loss, Player, System


class AE(Autoencoding, System):
    """Autoencoder with deterministic codes, trained on 1/2 ||x - G(E(x))||^2.

    Its codes follow no prior, so its samples, decoded from N(0, I), are not expected to look like images.
    """

    averaged = ("encoder", "decoder")
    judged_by = "rfid"

    def __init__(
        self,
        image_size: ImageSize,
        channels: int,
        latent_dim: int = 32,
        networks: NetworkConfig = NetworkConfig(),
        autoencoder: OptimizerConfig = OptimizerConfig(),
    ):
        super().__init__()
        networks.check(image_size, discriminator=False)
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        self.encoder = build_encoder(networks, image_size, channels, latent_dim)
        self.decoder = build_decoder(networks, image_size, channels, latent_dim)
        self.optimizer = autoencoder

    def passes(self, batch: Batch) -> Tensor:
        return self.decoder(self.encoder(batch.image))

    def loss(self, batch: Batch, reconstructed: Tensor) -> Loss:
        reconstruction = losses.likelihood("gaussian", batch.image, reconstructed)
        return Loss(reconstruction, {"reconstruction": reconstruction})

    def players(self) -> list[Player]:
        return [Player("autoencoder", ("encoder", "decoder"), self.loss, self.optimizer)]

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(image)
        return code, torch.full_like(code, -torch.inf)
