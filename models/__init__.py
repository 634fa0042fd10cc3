"""What is learned: pure torch."""

from models.autoencoder import AE
from models.system import Batch, Optimizer, Player, System
from models.vae import VAE
from models.vaegan import VAEGAN

__all__ = ["AE", "VAE", "VAEGAN", "Batch", "Optimizer", "Player", "System"]
