"""The networks. Each has one `forward`, through which every training call goes, so that DDP sees all of them."""

from models.networks.autoencoder import build_decoder, build_encoder
from models.networks.config import ImageSize, NetworkConfig
from models.networks.discriminator import Discriminator
from models.networks.translator import Translator

__all__ = ["Discriminator", "ImageSize", "NetworkConfig", "Translator", "build_decoder", "build_encoder"]
