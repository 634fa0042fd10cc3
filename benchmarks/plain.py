"""A plain PyTorch loop of a binary VAE-GAN, as one writes it for one device: the same networks, losses and updates.

It has no micro-batches, processes, players, guards against losses that are not finite, gradient norms, or statistics of
the game but the losses themselves; its noise comes from torch's global generator.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from models import VAEGAN


class PlainLoop:
    """Trains a `VAEGAN` of default losses without R1.

    Args:
        system: its encoder, decoder and binary discriminator are trained
        precision: no or bf16
    """

    def __init__(self, system: VAEGAN, precision: str = "no"):
        self.encoder, self.decoder, self.discriminator = system.encoder, system.decoder, system.discriminator_binary
        options = {"lr": 2e-4, "betas": (0.5, 0.99), "weight_decay": 0.0, "fused": True}
        self.discriminator_optimizer = torch.optim.AdamW(self.discriminator.parameters(), **options)
        self.optimizer = torch.optim.AdamW([*self.encoder.parameters(), *self.decoder.parameters()], **options)
        self.device, self.half = next(self.encoder.parameters()).device.type, precision == "bf16"
        self.sums: dict[str, Tensor | float] = {}

    def step(self, image: Tensor) -> None:
        """Update the discriminator, then encoder and decoder, on images [n, channels, size, size] in [-1, 1]."""
        with torch.autocast(self.device, torch.bfloat16, self.half):
            mean, log_variance = self.encoder(image).float().chunk(2, 1)
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            fakes = self.decoder(torch.cat([z, torch.randn_like(z)]))
            reconstructed, generated = fakes.chunk(2)

            self.discriminator.requires_grad_(True)
            logits = self.discriminator(torch.cat([image, fakes.detach()])).float()
            real, fake = logits[: len(image)], logits[len(image) :]
            discriminator_loss = 0.5 * softplus(-real).mean() + 0.5 * softplus(fake).mean()
        self.update(self.discriminator_optimizer, discriminator_loss)

        with torch.autocast(self.device, torch.bfloat16, self.half):
            self.discriminator.requires_grad_(False)
            generator_loss = softplus(-self.discriminator(torch.cat([reconstructed, generated])).float()).mean()
            reconstruction = 0.5 * (image - reconstructed).square().flatten(1).sum(1).mean()
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
            loss = reconstruction + kl + 10 * generator_loss
        self.update(self.optimizer, loss)
        logged = {"discriminator": discriminator_loss, "generator": generator_loss, "reconstruction": reconstruction}
        for name, value in {**logged, "kl": kl}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
