"""A ring of eight Gaussians in the plane: each generative system learns it, from its own table of players."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from models import GAN, GANVAE, VAE, VAEGAN, DiscriminatorConfig, NetworkConfig, OptimizerConfig
from trainer.batch import Batch
from trainer.ema import EMA
from trainer.step import TrainStep

MODES, DEVIATION, BATCH = 8, 0.1, 128
TINY = NetworkConfig("dcgan", 8)
FAST = OptimizerConfig(lr=2e-3, betas=(0.0, 0.99))
DISCRIMINATOR = DiscriminatorConfig(lr=2e-3, betas=(0.0, 0.99), r1_weight=0.02, penalty_every=4)
SHARP = {"reconstruction_weight": 5.0, "kl_weight": 0.3, "adversarial_weight": 10.0, "autoencoder": FAST}
SYSTEMS = {
    "vae": lambda: VAE(32, 1, 2, TINY, learned_scale=True, autoencoder=OptimizerConfig(lr=1e-3)),
    "gan": lambda: GAN(32, 1, 2, TINY, FAST, DISCRIMINATOR),
    "ganvae": lambda: GANVAE(32, 1, 2, TINY, 0.02, FAST, DISCRIMINATOR),
    "binary": lambda: VAEGAN(32, 1, 2, TINY, "binary", binary=DISCRIMINATOR, **SHARP),
    "ternary": lambda: VAEGAN(32, 1, 2, TINY, "ternary", ternary=DISCRIMINATOR, **SHARP),
    "both": lambda: VAEGAN(32, 1, 2, TINY, "both", binary=DISCRIMINATOR, ternary=DISCRIMINATOR, **SHARP),
}
# Share of samples within three deviations of a mode; 0.38 is that of points spread evenly over the circle. A continuous
# decoder of a plane must cross from mode to mode, and nothing keeps a VAE's from lingering there. After 300 steps the
# ternary VAE-GAN has 0.34 to 0.40, by four seeds, and 0.17 to 0.19 without a weight of its discriminator, by three.
BARS = {"vae": 0.45, "gan": 0.6, "ganvae": 0.6, "binary": 0.6, "ternary": 0.6, "both": 0.6}
LONG = [pytest.param(name, 2000, bar, marks=pytest.mark.slow) for name, bar in BARS.items()]


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs))
    )


def planar(system: nn.Module) -> nn.Module:
    """The same game, its networks exchanged for small ones on points [n, 2]."""
    sizes = {"encoder": (2, 4), "decoder": (2, 2), "discriminator_binary": (2, 1), "discriminator_ternary": (2, 3)}
    for name in system.networks():
        if name in sizes:
            setattr(system, name, mlp(*sizes[name]))
    return system


def ring(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(MODES, (n,), generator=generator) * (2 * math.pi / MODES)
    return torch.stack([angle.cos(), angle.sin()], 1) * 2 + DEVIATION * torch.randn(n, 2, generator=generator)


@pytest.mark.parametrize(("name", "steps", "bar"), [("ternary", 300, 0.27), *LONG])
def test_the_ring_is_learnt(name, steps, bar):
    """Samples lie within three deviations of a mode, and every mode has its share."""
    torch.manual_seed(0)
    system = planar(SYSTEMS[name]())
    ema, train_step = EMA(system, 20_000, BATCH), TrainStep(Accelerator(cpu=True), system, steps)
    for step in range(steps):
        train_step([Batch((ring(BATCH, step),), slice(0, BATCH), BATCH, 0, step)], step)
        ema.update(step + 1)
    with torch.no_grad():
        samples = ema.system.sample(torch.randn(2000, 2))
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    distance = torch.cdist(samples, 2 * torch.stack([angle.cos(), angle.sin()], 1))
    nearest, mode = distance.min(1)
    on = nearest < 3 * DEVIATION
    shares = torch.bincount(mode[on], minlength=MODES) / len(samples)
    assert on.float().mean() > bar
    assert shares.min() > 0.02
