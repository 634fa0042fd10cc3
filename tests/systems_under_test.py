"""Small systems, batches and settings that tests of several rooms share."""

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from models import (
    AE,
    GAN,
    GANVAE,
    VAE,
    VAEGAN,
    CodesConfig,
    CycleGAN,
    DiscriminatorConfig,
    Loss,
    NetworkConfig,
    OptimizerConfig,
    Player,
    System,
)
from models.networks import kl
from models.schedule import Schedule
from trainer.batch import Batch

SMALL = NetworkConfig("dcgan", 8, "group")
MAPS = NetworkConfig("dcgan", 8, latent_stride=8)
CODES = CodesConfig(equivariance=0.5, scale_equivariance=0.25, noise=0.3)
STEADY = OptimizerConfig(lr=1e-3, clip=1.0)
DISCRIMINATOR = DiscriminatorConfig(lr=1e-3, clip=1.0, r1_weight=1.0)
SILENT = replace(DISCRIMINATOR, r1_weight=0.0)


def vaegan(discriminator="binary", autoencoder=STEADY, networks=SMALL, config=DISCRIMINATOR, **settings) -> VAEGAN:
    playing = ("binary", "ternary") if discriminator == "both" else (discriminator,)
    configs = {name: config for name in playing} | {k: settings.pop(k) for k in playing if k in settings}
    return VAEGAN(32, 1, 4, networks, discriminator, autoencoder=autoencoder, **configs, **settings)


def kl_vaegan(**settings) -> VAEGAN:
    """Of family kl with 4 groups of a channel: with 32 channels these tests would take a minute."""
    with patch.object(kl, "GROUPS", 4):
        networks = NetworkConfig("kl", 4, multipliers=(1, 1, 2), blocks=1, patches=True)
        return vaegan(networks=networks, config=SILENT, **settings)


def cyclegan(config=None, **settings) -> CycleGAN:
    config = config or replace(DISCRIMINATOR, adversarial="least_squares", schedule="linear", hold=0.5)
    system = CycleGAN(32, 1, 4, blocks=1, translators=STEADY, binary=config, **settings)
    system.hold(slice(0, 8), 8)
    return system


def aligned(codes: CodesConfig) -> CodesConfig:
    return replace(codes, alignment=0.1, dino_weights=vit_file())


@functools.cache
@unset_fake_temporarily()  # also where a test's tensors have no values
def vit_file(width: int = 64) -> str:
    """Random weights of a small vision transformer, by the names of DINO's files, as the same numbers each time."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + 4 * 4, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
    }
    shapes |= {"patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width), "norm1": (width,), "norm2": (width,)}
    for i in range(4):
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in layers.items()}
        shapes |= {f"blocks.{i}.{name}.bias": shape[:1] for name, shape in layers.items()}
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder, own = Path(tempfile.mkdtemp()), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder) if os.getpid() == own else None)
    torch.save(state, folder / "vit.pth")
    return str(folder / "vit.pth")


# Every system, and every option that could break an equivalence.
SYSTEMS = {
    "ae": lambda: AE(32, 1, 4, SMALL, STEADY),
    "vae": lambda: VAE(32, 1, 4, SMALL, autoencoder=STEADY),
    "vae, bernoulli": lambda: VAE(32, 1, 4, SMALL, "bernoulli", autoencoder=STEADY),
    "vae, all options": lambda: VAE(32, 1, 4, MAPS, "laplace", True, 2.0, 3, 0.1, STEADY, aligned(CODES)),
    "gan, classes": lambda: GAN(32, 1, 4, SMALL, STEADY, DISCRIMINATOR, classes=3),
    "ganvae": lambda: GANVAE(32, 1, 4, SMALL, 1.0, STEADY, DISCRIMINATOR),
    "binary": lambda: vaegan(),
    "ternary": lambda: vaegan("ternary"),
    "both": lambda: vaegan("both"),
    "features": lambda: vaegan(reconstruction="features"),
    "both, both, classes": lambda: vaegan(
        "both", reconstruction="both", feature_discriminator="ternary", feature_layer=1, opponent="not_own", classes=2
    ),
    "decoder only": lambda: vaegan("ternary", encoder_adversarial=False, class_weights=(2.0, 1.0, 1.0)),
    "residual": lambda: vaegan("ternary", networks=NetworkConfig("residual", 4, attention=(8,), blocks=1)),
    "kl": lambda: kl_vaegan(encoder_adversarial=False, adaptive=True, samples=False),
    "maps": lambda: vaegan(networks=replace(MAPS, patches=True), likelihood="laplace", codes=CODES),
    "trained networks": lambda: vaegan(
        networks=MAPS,
        config=replace(SILENT, adversarial="hinge", augment=("color", "translation"), dino_weights=vit_file()),
        perceptual_weight=50.0,
        perceptual="dino",
        perceptual_weights=vit_file(),
        codes=aligned(CodesConfig()),
    ),
    "hinge, lecam, spectral, classes": lambda: vaegan(
        "ternary",
        config=DiscriminatorConfig(1e-3, adversarial="hinge", lecam_weight=0.3, spectral_norm=True, r1_weight=0.0),
        classes=3,
    ),
    "relativistic, r1 + r2": lambda: vaegan(
        "both",
        replace(STEADY, lr=Schedule(1e-3, 5e-4, 2), betas=(0.0, Schedule(0.9, 0.99, 3))),
        config=replace(DISCRIMINATOR, adversarial="relativistic", r1_weight=Schedule(2.0, 0.2, 3), r2_weight=1.0),
    ),
    "least squares, lazy": lambda: vaegan(
        "ternary", config=replace(DISCRIMINATOR, adversarial="least_squares", penalty_every=2)
    ),
    "augment, deviation, classes": lambda: vaegan(
        config=replace(
            DISCRIMINATOR,
            augment=("color", "translation", "cutout"),
            augment_probability=Schedule(0.2, 0.9, 3),
            minibatch_stddev=2,
        ),
        reconstruction="both",
        classes=3,
    ),
    "adaptive, scheduled": lambda: vaegan(
        "both",
        OptimizerConfig(1e-3, schedule="cosine", warmup=2),
        adaptive=True,
        ternary=replace(DISCRIMINATOR, start=1, counts_from=2, ramp=2),
    ),
    "decoder alone": lambda: vaegan("ternary", reconstruction="both"),
    "cyclegan": lambda: cyclegan(pool=11),
    "cyclegan, lecam": lambda: cyclegan(
        replace(DISCRIMINATOR, lecam_weight=0.3, spectral_norm=True, augment=("translation",)), pool=0
    ),
}


PLAIN = {"ae", "vae", "binary", "ternary", "both", "features"}  # all that these do, others do, too
TRAIN_ONLY = {"decoder alone": ["decoder"]}


def batch_of(n=4, size=32, channels=1, dtype=torch.float32, step=9, domains=2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(n, channels, size, size, generator=generator) * 2 - 1 for _ in range(domains)]
    return Batch(tuple(image.to(dtype) for image in images), slice(0, n), n, 0, step, torch.arange(n) % 3 % 2)


def freeze_all_but(system: System, names: Collection[str]) -> None:
    """As a step does it for the players that move."""
    for name, network in system.networks().items():
        network.requires_grad_(name in names)


def cancelled(system: System) -> set[str]:
    """Return the names of weights whose exact gradient is 0, so that rounding alone decides whether they move.

    They are biases before an instance norm, which subtracts them, and the last bias of a relativistic binary
    discriminator, whose loss has differences of logits only.
    """
    found = set()
    for name, module in system.named_modules():
        if isinstance(module, nn.Sequential):
            pairs = pairwise(module.named_children())
            found |= {f"{name}.{one}.bias" for (one, _), (_, norm) in pairs if isinstance(norm, nn.InstanceNorm2d)}
    for game in getattr(system, "adversaries", {}).values():
        if game.config.adversarial == "relativistic" and game.mode == "binary":
            found.add(f"{game.network}.head.bias")
    return found


class Line(System):
    """Two networks of one player, whose gradients at step k are (k + 1) times the weights' `steepness`."""

    averaged = ("first", "second")

    def __init__(self, optimizer: OptimizerConfig):
        super().__init__()
        self.first, self.second = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.optimizer = optimizer
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[0.5, -2.0]]))
            self.second.weight.copy_(torch.tensor([[1.5]]))

    def passes(self, batch: Batch) -> torch.Tensor:
        return self.first(batch.image[:, :2]) + self.second(batch.image[:, 2:])

    def loss(self, batch: Batch, passes: torch.Tensor) -> Loss:
        return Loss(passes.mean(), {"height": passes.mean()})

    def players(self) -> list[Player]:
        return [Player("player", ("first", "second"), self.loss, self.optimizer)]

    def weights(self) -> list[float]:
        return [*self.first.weight[0].tolist(), *self.second.weight[0].tolist()]


STEEPNESS = np.array([3.0, -4.0, 12.0])  # of norm 13


def line_batch(step: int) -> Batch:
    """Four rows whose mean is (step + 1) times the steepness."""
    rows = (step + 1) * torch.from_numpy(STEEPNESS) * torch.tensor([0.5, 1.5, 3.0, -1.0], dtype=torch.float64)[:, None]
    return Batch((rows,), slice(0, 4), 4, seed=0, step=step)
