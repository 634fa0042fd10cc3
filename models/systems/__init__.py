"""The systems, one file each."""

from models.systems.autoencoder import AE
from models.systems.cyclegan import CycleGAN
from models.systems.gan import GAN
from models.systems.ganvae import GANVAE
from models.systems.vae import VAE
from models.systems.vaegan import VAEGAN

__all__ = ["AE", "GAN", "GANVAE", "VAE", "VAEGAN", "CycleGAN"]
