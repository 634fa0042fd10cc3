"""The networks. Each has one `forward`, through which every training call goes, so that DDP sees all of them."""

from models.networks.autoencoder import Decoder, Encoder
from models.networks.config import NetworkConfig
from models.networks.discriminator import Discriminator
from models.networks.translator import Translator

__all__ = ["Decoder", "Discriminator", "Encoder", "NetworkConfig", "Translator"]
