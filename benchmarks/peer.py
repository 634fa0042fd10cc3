"""Pythae's VAEGAN (`pip install pythae`) for the benchmarks of steps and of quality.

The model class, the optimizers and the update are Pythae's own (`CoupledOptimizerAdversarialTrainer`: three backward
passes, players skipped by its margin rule, Adam's default betas). The loop over batches is ours, so Pythae's data
loader, progress bar, logging and per-epoch copies of the model take no time here. The networks are like those of
Pythae's benchmarks (4x4 convolutions of stride 2; BatchNorm and ReLU in encoder and decoder, none in the discriminator;
PyTorch's initialisation) with the sizes of our DCGAN-like ones.
"""

import tempfile

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAEGAN, VAEGANConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseDiscriminator, BaseEncoder
from pythae.trainers import CoupledOptimizerAdversarialTrainer, CoupledOptimizerAdversarialTrainerConfig
from torch import Tensor, nn


class Encoder(BaseEncoder):
    def __init__(self, channels: int, widths: list[int], latent_dim: int):
        super().__init__()
        layers: list[nn.Module] = []
        for wide in widths:
            layers += [nn.Conv2d(channels, wide, 4, 2, 1), nn.BatchNorm2d(wide), nn.ReLU()]
            channels = wide
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.mean = nn.Linear(channels * 16, latent_dim)
        self.log_variance = nn.Linear(channels * 16, latent_dim)

    def forward(self, x: Tensor) -> ModelOutput:
        hidden = self.trunk(x)
        return ModelOutput(embedding=self.mean(hidden), log_covariance=self.log_variance(hidden))


class Decoder(BaseDecoder):
    def __init__(self, channels: int, widths: list[int], latent_dim: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(latent_dim, widths[-1] * 16), nn.Unflatten(1, (widths[-1], 4, 4))]
        for wide, narrow in zip(widths[::-1], [*widths[-2::-1], channels], strict=True):
            layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1)]
        self.trunk = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.trunk(z))


class Discriminator(BaseDiscriminator):
    def __init__(self, channels: int, widths: list[int]):
        super().__init__()
        self.layers = nn.ModuleList()
        for level, wide in enumerate(widths):
            activation = nn.Tanh() if level == 1 else nn.ReLU()
            self.layers.append(nn.Sequential(nn.Conv2d(channels, wide, 4, 2, 1), activation))
            channels = wide
        self.layers.append(nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, 1), nn.Sigmoid()))
        self.depth = len(self.layers)

    def forward(self, x: Tensor, output_layer_levels: list[int] | None = None) -> ModelOutput:
        """Return the score, or the activations of one layer, as Pythae's own discriminators do."""
        if output_layer_levels is None:
            for layer in self.layers:
                x = layer(x)
            return ModelOutput(embedding=x)
        (level,) = output_layer_levels
        for layer in self.layers[:level]:
            x = layer(x)
        return ModelOutput(**{f"embedding_layer_{level}": x})


class Pythae:
    """Pythae's VAEGAN and its trainer's update, on images in [-1, 1] (Pythae's are in [0, 1]).

    Scale, layer, margin and equilibrium are those of Pythae's MNIST and CelebA benchmarks.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        latent_dim: int,
        widths: list[int],
        lr: float,
        batch_size: int,
        margin: float = 0.4,
    ):
        config = VAEGANConfig(
            input_dim=(channels, size, size),
            latent_dim=latent_dim,
            adversarial_loss_scale=0.8,
            reconstruction_layer=3,
            margin=margin,
            equilibrium=0.68,
        )
        self.model = VAEGAN(
            config,
            Encoder(channels, widths, latent_dim),
            Decoder(channels, widths, latent_dim),
            Discriminator(channels, widths),
        )
        rates = {f"{name}_learning_rate": lr for name in ("encoder", "decoder", "discriminator")}
        settings = CoupledOptimizerAdversarialTrainerConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch_size, no_cuda=True, **rates
        )
        images = BaseDataset(torch.zeros(batch_size, channels, size, size), torch.zeros(batch_size))
        self.trainer = CoupledOptimizerAdversarialTrainer(self.model, images, training_config=settings)
        self.trainer.set_encoder_optimizer()
        self.trainer.set_decoder_optimizer()
        self.trainer.set_discriminator_optimizer()

    def step(self, image: Tensor, k: int = 0) -> None:
        self.trainer._optimizers_step(self.model({"data": (image + 1) / 2}))

    def sample(self, z: Tensor) -> Tensor:
        return self.model.decoder(z).reconstruction * 2 - 1
