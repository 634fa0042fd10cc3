"""The systems, one file each."""

from models.system import System
from models.systems.autoencoder import AE
from models.systems.cyclegan import CycleGAN
from models.systems.gan import GAN
from models.systems.ganvae import GANVAE
from models.systems.vae import VAE
from models.systems.vaegan import VAEGAN

# Only these can be named on a command line or in a file. Add your own here, or from code: models.SYSTEMS.append(Mine).
SYSTEMS: list[type[System]] = [AE, CycleGAN, GAN, GANVAE, VAE, VAEGAN]

__all__ = ["AE", "GAN", "GANVAE", "SYSTEMS", "VAE", "VAEGAN", "CycleGAN"]
