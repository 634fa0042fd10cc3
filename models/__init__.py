"""What is learned: pure torch."""

from models.adversary import Judge
from models.autoencoder import AE
from models.cyclegan import CycleGAN
from models.gan import GAN
from models.ganvae import GANVAE
from models.load import SYSTEMS, load
from models.networks import Networks
from models.system import Batch, Loss, Optimizer, Player, System
from models.vae import VAE
from models.vaegan import VAEGAN

__all__ = [
    "AE",
    "GAN",
    "GANVAE",
    "SYSTEMS",
    "VAE",
    "VAEGAN",
    "Batch",
    "CycleGAN",
    "Judge",
    "Loss",
    "Networks",
    "Optimizer",
    "Player",
    "System",
    "load",
]
