"""A plain PyTorch loop of a binary VAE-GAN, as one writes it for one device: the same networks, losses and updates.

It has no micro-batches, processes, players, guards against losses that are not finite, gradient norms, or statistics of
the game but the losses themselves; its noise comes from torch's global generator. `Limit` is what remains of it without
any bookkeeping.
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
        lr: learning rate
    """

    def __init__(self, system: VAEGAN, precision: str = "no", lr: float = 2e-4):
        self.encoder, self.decoder, self.discriminator = system.encoder, system.decoder, system.discriminator_binary
        self.sides = [[*self.discriminator.parameters()], [*self.encoder.parameters(), *self.decoder.parameters()]]
        options = {"lr": lr, "betas": (0.5, 0.99), "weight_decay": 0.0, "fused": True}
        self.optimizers = [torch.optim.AdamW(side, **options) for side in self.sides]
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
        self.update(0, discriminator_loss)

        with torch.autocast(self.device, torch.bfloat16, self.half):
            self.discriminator.requires_grad_(False)
            generator_loss = softplus(-self.discriminator(torch.cat([reconstructed, generated])).float()).mean()
            reconstruction = 0.5 * (image - reconstructed).square().flatten(1).sum(1).mean()
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
            loss = reconstruction + kl + 10 * generator_loss
        self.update(1, loss)
        self.log(discriminator=discriminator_loss, generator=generator_loss, reconstruction=reconstruction, kl=kl)

    def update(self, side: int, loss: Tensor) -> None:
        self.optimizers[side].zero_grad()
        loss.backward()
        self.optimizers[side].step()

    def log(self, **losses: Tensor) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()


class Limit(PlainLoop):
    """The passes that the mathematics of a step needs, and nothing else.

    Forward: the encoder on n images, the decoder on the n codes and on n from the prior, the discriminator on the n
    images and 2n fakes, and again on the 2n fakes. Backward: the discriminator's loss to its weights only; the other
    loss to the weights of decoder and encoder only, through the discriminator. The gradients are dropped: there are no
    optimizers, no gradients kept in weights, and no sums of losses.
    """

    def update(self, side: int, loss: Tensor) -> None:
        torch.autograd.grad(loss, self.sides[side])

    def log(self, **losses: Tensor) -> None:
        pass
