"""The standard autoencoder: x -> z -> x'."""

from torch import Tensor

from models import losses
from models.networks import Decoder, Encoder
from models.networks.blocks import Norm
from models.system import Batch, Loss, Optimizer, Player, System, check_positive


class AE(System):
    """Autoencoder with a deterministic code; it lowers 1/2 ||x - G(E(x))||^2.

    Nothing ties its codes to a prior, so its "samples", decoded from N(0, I), are not expected to be images.

    Args:
        image_size: pixels a side, from the data
        channels: 1 or 3, from the data
        latent_dim: numbers per code
        width: channels of the first convolution; they double with each halving of the size, up to eight times
        norm: normalisation in encoder and decoder
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
        autoencoder: Optimizer = Optimizer(),
    ):
        super().__init__()
        check_positive(latent_dim=latent_dim, width=width)
        self.latent_dim = latent_dim
        self.encoder = Encoder(image_size, channels, latent_dim, width, norm)
        self.decoder = Decoder(image_size, channels, latent_dim, width, norm)
        self.optimizer = autoencoder

    def passes(self, batch: Batch) -> Tensor:
        return self.decoder(self.encoder(batch.image))

    def loss(self, batch: Batch, reconstructed: Tensor) -> Loss:
        reconstruction = losses.squared_error(batch.image, reconstructed)
        return reconstruction, {"reconstruction": reconstruction}

    def players(self) -> list[Player]:
        return [Player("autoencoder", ("encoder", "decoder"), self.loss, self.optimizer)]

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image))
