"""What is learned: pure torch."""

from models.codes import CodesConfig
from models.load import load
from models.networks import NetworkConfig
from models.settings import DiscriminatorConfig, OptimizerConfig
from models.system import Batch, Loss, Player, System
from models.systems import AE, GAN, GANVAE, SYSTEMS, VAE, VAEGAN, CycleGAN

__all__ = ["AE", "GAN", "GANVAE", "SYSTEMS", "VAE", "VAEGAN", "CodesConfig", "CycleGAN", "load"]
__all__ += ["Batch", "DiscriminatorConfig", "Loss", "NetworkConfig", "OptimizerConfig", "Player", "System"]
