"""Networks: each has one forward."""

from models.networks.decoder import Decoder
from models.networks.discriminator import Discriminator
from models.networks.encoder import Encoder

__all__ = ["Decoder", "Discriminator", "Encoder"]
