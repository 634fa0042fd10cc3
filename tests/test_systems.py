"""Gradients land exactly where the table of players says, in the right direction; impossible options are refused."""

import pytest
import torch

from models import AE, VAE, VAEGAN, Optimizer
from models.losses import realness
from models.networks import Decoder, Discriminator, Encoder
from models.system import freeze_all_but
from trainer.batch import Batch

SYSTEMS = {
    "ae": lambda **kw: AE(32, 1, 4, 8, **kw),
    "vae": lambda **kw: VAE(32, 1, 4, 8, **kw),
    "binary": lambda **kw: VAEGAN(32, 1, 4, 8, discriminator="binary", **kw),
    "ternary": lambda **kw: VAEGAN(32, 1, 4, 8, discriminator="ternary", **kw),
    "both": lambda **kw: VAEGAN(32, 1, 4, 8, discriminator="both", **kw),
    "features": lambda **kw: VAEGAN(32, 1, 4, 8, reconstruction="features", **kw),
    "both, both": lambda **kw: VAEGAN(
        32, 1, 4, 8, discriminator="both", reconstruction="both", feature_discriminator="ternary", feature_layer=1, **kw
    ),
    "decoder only": lambda **kw: VAEGAN(32, 1, 4, 8, discriminator="ternary", encoder_adversarial=False, **kw),
}


def batch_of(n=4, size=32, channels=1, dtype=torch.float32) -> Batch:
    image = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(image.to(dtype), slice(0, n), n, seed=0, step=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_land_on_each_players_networks_only(name):
    system = SYSTEMS[name]()
    moved = []
    for player in system.players():
        freeze_all_but(system, player.networks)
        loss, terms = player.loss(batch_of(), system.passes(batch_of()))
        loss.backward()
        for network, module in system.named_children():
            for parameter, value in module.named_parameters():
                if network in player.networks:
                    assert value.grad is not None, f"{player.name}: {network}.{parameter}"
                    assert value.grad.abs().sum() > 0, f"{player.name}: {network}.{parameter}"
                else:
                    assert value.grad is None, f"{player.name}: {network}.{parameter}"
        assert all(value.dim() == 0 and value.isfinite() for value in terms.values())
        system.zero_grad()
        moved += player.networks
    assert sorted(moved) == sorted(dict(system.named_children())), "every network is moved by exactly one player"


def test_each_mode_has_its_own_network_and_settings():
    system = VAEGAN(32, 1, 4, 8, discriminator="both", binary=Optimizer(lr=1e-4), ternary=Optimizer(lr=3e-4))
    table = {player.name: (player.networks, player.optimizer.lr) for player in system.players()}
    assert table == {
        "binary": (("discriminator_binary",), 1e-4),
        "ternary": (("discriminator_ternary",), 3e-4),
        "autoencoder": (("encoder", "decoder"), 1e-3),
    }


@pytest.mark.parametrize("name", ["binary", "ternary"])
def test_adversarial_gradient_raises_realness_for_the_opponent_and_lowers_it_for_the_judge(name):
    """A shared, undetached graph would give the decoder the judge's gradient: the wrong sign."""
    system = SYSTEMS[name](reconstruction_weight=0.0, kl_weight=0.0, r1_weight=0.0).double()
    discriminator = system.discriminator(name)

    def fakes_realness() -> torch.Tensor:
        passes = system.passes(batch_of(dtype=torch.float64))
        return realness(discriminator(torch.cat([passes.reconstructed, passes.generated]))).mean()

    before = fakes_realness()
    for player, sign in zip(system.players(), [-1, 1], strict=True):
        freeze_all_but(system, player.networks)
        loss, _ = player.loss(batch_of(dtype=torch.float64), system.passes(batch_of(dtype=torch.float64)))
        moved = [p for p in system.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, moved)
        with torch.no_grad():
            for parameter, gradient in zip(moved, gradients, strict=True):
                parameter -= 1e-4 * gradient
            assert (fakes_realness() - before).item() * sign > 0
            for parameter, gradient in zip(moved, gradients, strict=True):
                parameter += 1e-4 * gradient


@pytest.mark.parametrize("adversarial", [True, False])
def test_encoder_adversarial_decides_whether_the_encoder_hears_the_discriminator(adversarial):
    system = VAEGAN(32, 1, 4, 8, reconstruction_weight=0.0, kl_weight=0.0, encoder_adversarial=adversarial)
    player = system.players()[-1]
    freeze_all_but(system, player.networks)
    player.loss(batch_of(), system.passes(batch_of()))[0].backward()
    heard = sum(p.grad.abs().sum() for p in system.encoder.parameters() if p.grad is not None)
    assert (heard > 0) == adversarial
    assert all(p.grad.abs().sum() > 0 for p in system.decoder.parameters())


def test_players_of_a_step_see_the_same_draw():
    system = VAE(32, 1, 4, 8)
    assert torch.equal(system.passes(batch_of()).reconstructed, system.passes(batch_of()).reconstructed)


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (48, 3), (64, 3), (96, 1), (128, 3), (256, 3)])
def test_networks_fit_any_size(size, channels):
    image = torch.rand(2, channels, size, size)
    assert Encoder(size, channels, 10, 8)(image).shape == (2, 10)
    assert Decoder(size, channels, 5, 8)(torch.randn(2, 5)).shape == image.shape
    assert Discriminator(size, channels, 3, 8)(image).shape == (2, 3)


def test_initial_activations_have_about_unit_scale():
    image = torch.randn(64, 3, 64, 64)
    assert 0.3 < Encoder(64, 3, 10, 16, "none")(image).std() < 3
    assert 0.2 < Decoder(64, 3, 16, 16, "none")(torch.randn(64, 16)).std() < 1


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: VAE(32, 1, latent_dim=0), "system.latent_dim is 0"),
        (lambda: AE(32, 1, width=-1), "system.width is -1"),
        (lambda: VAE(32, 1, kl_weight=-1), "system.kl_weight is -1"),
        (lambda: AE(31, 1), "31 pixels"),
        (lambda: AE(512, 1), "512 pixels"),
        (lambda: VAEGAN(32, 1, feature_layer=1), "no effect"),
        (lambda: VAEGAN(32, 1, ternary=Optimizer()), "system.ternary has no effect"),
        (lambda: VAEGAN(32, 1, discriminator="both", reconstruction="features"), "feature_discriminator"),
        (lambda: VAEGAN(32, 1, reconstruction="features", feature_discriminator="ternary"), "is ternary"),
        (lambda: VAEGAN(32, 1, reconstruction="features", feature_layer=3), "expected 0 to 2"),
        (lambda: VAE(32, 1, autoencoder=Optimizer(lr=-1)).players(), "system.autoencoder.lr is -1"),
        (lambda: VAE(32, 1, autoencoder=Optimizer(betas=(1, 0.9))).players(), "system.autoencoder.betas"),
        (lambda: VAE(32, 1, autoencoder=Optimizer(clip=0)).players(), "system.autoencoder.clip is 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(build, words):
    with pytest.raises(ValueError, match=words):
        build()
