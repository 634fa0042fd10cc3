"""NetworkConfig: each has one forward."""

from models.networks.blocks import NetworkConfig
from models.networks.decoder import Decoder
from models.networks.discriminator import Discriminator
from models.networks.encoder import Encoder
from models.networks.translator import Translator

__all__ = ["Decoder", "Discriminator", "Encoder", "NetworkConfig", "Translator"]
