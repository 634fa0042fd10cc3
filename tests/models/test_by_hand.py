"""What every system lowers, and how a step moves weights, by hand: numpy in float64, from the papers' formulas.

The networks' outputs and their gradients with respect to images are torch's; all that follows is written out here.
"""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from systems_under_test import SMALL, STEEPNESS, Line, batch_of, cyclegan, line_batch
from torch import nn

from models import (
    AE,
    GAN,
    GANVAE,
    VAE,
    VAEGAN,
    CycleGAN,
    DiscriminatorConfig,
    OptimizerConfig,
    losses,
)
from trainer.batch import Batch
from trainer.ema import EMA
from trainer.evaluate.accumulators import extract_features
from trainer.precision import strict_fp32
from trainer.step import TrainStep

F64 = torch.float64
STEP = 9
# Sums of at most 10^4 terms err by at most 10^4 * 2^-53 of the sum of their sizes, about 1e-12; the terms here cancel
# by less than a factor of 1,000.
CLOSE = 1e-9


def numbers(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy()


def softplus(x):
    return np.logaddexp(0, x)


def total(x: np.ndarray) -> float:
    """The sum over all axes but the first, whose mean is taken."""
    return x.reshape(len(x), -1).sum(1).mean()


def posterior(system, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    mean, log_variance = np.split(numbers(system.encoder(image)), 2, axis=1)
    return mean, log_variance


def decoded(system, z: np.ndarray) -> torch.Tensor:
    return system.decoder(torch.from_numpy(z)).detach()


def encode_and_decode(system, batch: Batch) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    mean, log_variance = posterior(system, batch.image)
    noise = numbers(batch.normal("posterior", system.latent_shape))
    return mean, log_variance, decoded(system, mean + np.exp(log_variance / 2) * noise)


def kl_of(mean: np.ndarray, log_variance: np.ndarray, free_bits: float = 0.0) -> float:
    """Kingma & Welling 2014, appendix B: -1/2 sum(1 + log s^2 - m^2 - s^2); at least its free bits each."""
    return np.maximum(-0.5 * (1 + log_variance - mean**2 - np.exp(log_variance)), free_bits).sum(1).mean()


def realness(logits: np.ndarray) -> np.ndarray:
    """The logit of p(real): log(p / (1 - p))."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return np.log(p[:, 0]) - np.log(p[:, 1:].sum(1))


def on_real(kind: str, s: np.ndarray) -> float:
    return {
        "logistic": softplus(-s),  # -log sigmoid(s)
        "hinge": np.maximum(0, 1 - s),
        "least_squares": ((s + 1) / 2 - 1) ** 2,
    }[kind].mean()


def generator_loss_of(kind: str, fake: np.ndarray, real: np.ndarray) -> float:
    """What a generator lowers, of the realness of its images and of the real ones beside them."""
    if kind == "relativistic":
        return softplus(real - fake).mean()
    return -fake.mean() if kind == "hinge" else on_real(kind, fake)


def discriminator_loss_of(kind: str, logits: list[np.ndarray], shares: list[float]) -> float:
    """What a discriminator lowers, of its logits on real images and on each kind of fake, which have these shares."""
    s = [realness(of) for of in logits]
    if kind == "relativistic":
        weights = np.array(shares[1:]) / sum(shares[1:])
        loss = sum(weight * softplus(fake - s[0]).mean() for weight, fake in zip(weights, s[1:], strict=True))
    else:
        loss = shares[0] * on_real(kind, s[0])
        loss += sum(share * on_real(kind, -fake) for share, fake in zip(shares[1:], s[1:], strict=True))
    if logits[0].shape[1] == 3:  # -log p(own | not real)
        for own, other in ((1, 2), (2, 1)):
            loss += shares[own] * softplus(logits[own][:, other] - logits[own][:, own]).mean()
    return loss


def slope(network: nn.Module, image: torch.Tensor) -> float:
    """E ||d s / d x||^2 of the realness s (of its mean over patches)."""
    image = image.detach().clone().requires_grad_()
    logits = network(image)
    s = logits[:, 0] if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1:].exp().sum(1).log()
    (gradient,) = torch.autograd.grad(s.reshape(len(s), -1).mean(1).sum(), image)
    return total(numbers(gradient) ** 2)


def test_an_autoencoder_lowers_half_the_squared_error():
    system, batch = AE(32, 1, 4, SMALL).double(), batch_of(dtype=F64)
    loss, terms, *_ = system.loss(batch, system.passes(batch))
    x, y = numbers(batch.image), numbers(system.decoder(system.encoder(batch.image)))
    assert loss.item() == pytest.approx(total(0.5 * (x - y) ** 2), rel=CLOSE)
    assert {name: term.item() for name, term in terms.items()} == {"reconstruction": loss.item()}
    code, log_variance = system.posterior(batch.image)
    assert torch.equal(code, system.encoder(batch.image))
    assert (log_variance.exp() == 0).all()
    assert torch.equal(system.reconstruct(batch.image), system.sample(code))


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace", "bernoulli"])
@pytest.mark.parametrize("free_bits", [0.0, 0.3])
def test_a_vae_lowers_the_bound(likelihood, free_bits):
    scaled = likelihood != "bernoulli"
    system = VAE(32, 1, 4, SMALL, likelihood, scaled, kl_weight=2.0, kl_warmup=20, free_bits=free_bits).double()
    if scaled:
        torch.nn.init.constant_(system.scale.log_scale, -0.4)
    batch = batch_of(dtype=F64, step=STEP)
    loss, terms, *_ = system.loss(batch, system.passes(batch))
    mean, log_variance, reconstructed = encode_and_decode(system, batch)
    x, y, s = numbers(batch.image), numbers(reconstructed), math.exp(-0.4)
    p, t = (y + 1) / 2, (x + 1) / 2
    reconstruction = {
        "gaussian": lambda: (x - y) ** 2 / (2 * s**2) + math.log(s),
        "laplace": lambda: np.abs(x - y) / s + math.log(s),
        "bernoulli": lambda: -(t * np.log(p) + (1 - t) * np.log(1 - p)),
    }[likelihood]()
    kl = kl_of(mean, log_variance, free_bits)
    assert (kl > kl_of(mean, log_variance)) == (free_bits > 0)
    assert loss.item() == pytest.approx(total(reconstruction) + 2.0 * (STEP / 20) * kl, rel=CLOSE)
    expected = {"reconstruction": total(reconstruction), "kl": kl} | ({"scale": s} if scaled else {})
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=CLOSE)
    assert torch.equal(system.reconstruct(batch.image), system.sample(torch.from_numpy(mean)))


def test_a_sure_and_wrong_bernoulli_pixel_costs_the_logarithm_of_a_million():
    """On either side, and has no gradient; a right one costs next to nothing."""
    target, prediction = torch.tensor([[1.0], [-1.0]], dtype=F64), torch.tensor([[-1.0], [1.0]], dtype=F64)
    prediction.requires_grad_()
    loss = losses.likelihood("bernoulli", target, prediction)
    assert loss.item() == pytest.approx(math.log(1e6), rel=CLOSE)
    loss.backward()
    assert prediction.grad.tolist() == [[0.0], [0.0]]
    for sure in (target[:1], target[1:]):
        assert losses.likelihood("bernoulli", sure, sure).item() == pytest.approx(-math.log(1 - 1e-6), rel=CLOSE)
    for one in (target[:1], target[1:]):
        assert losses.likelihood("bernoulli", one, -one).item() == pytest.approx(math.log(1e6), rel=CLOSE)


def test_by_default_a_vae_lowers_the_evidence_lower_bound_from_the_first_step_on():
    """Of pixels with a unit variance; the code has 32 numbers."""
    system, batch = VAE(32, 1, networks=SMALL).double(), batch_of(dtype=F64, step=0)
    assert all(kind(32, 1, networks=SMALL).latent_shape == (32,) for kind in (AE, VAE, GAN, GANVAE))
    assert list(system.networks()) == ["encoder", "decoder"], "no scale is learned"
    mean, log_variance, reconstructed = encode_and_decode(system, batch)
    expected = total(0.5 * (numbers(batch.image) - numbers(reconstructed)) ** 2) + kl_of(mean, log_variance)
    assert system.loss(batch, system.passes(batch)).value.item() == pytest.approx(expected, rel=CLOSE)


def test_by_default_a_vaegan_has_one_binary_logistic_discriminator_that_counts_ten_times():
    system, batch = VAEGAN(32, 1, networks=SMALL).double(), batch_of(dtype=F64, step=0)
    assert system.latent_shape == (32,)
    mean, log_variance, reconstructed = encode_and_decode(system, batch)
    generated = system.decoder(batch.normal("prior", (32,)))
    images = [batch.image, reconstructed, generated]
    logits = [numbers(system.discriminator_binary(image)) for image in images]
    generator_loss = (on_real("logistic", logits[1]) + on_real("logistic", logits[2])) / 2
    expected = total(0.5 * (numbers(batch.image) - numbers(reconstructed)) ** 2) + kl_of(mean, log_variance)
    loss, terms, *_ = system.loss(batch, system.passes(batch))
    assert loss.item() == pytest.approx(expected + 10 * generator_loss, rel=CLOSE)
    assert set(terms) == {"reconstruction", "kl", "generator_loss/binary"}
    loss, terms, *_ = system.discriminator_loss("binary", batch, system.passes(batch))
    r1 = slope(system.discriminator_binary, batch.image) / 2
    assert loss.item() == pytest.approx(
        discriminator_loss_of("logistic", logits, [0.5, 0.25, 0.25]) + 0.1 * r1, rel=CLOSE
    )


def test_before_its_discriminators_start_a_vaegan_is_a_vae():
    system, batch = (
        VAEGAN(32, 1, 4, SMALL, binary=DiscriminatorConfig(start=STEP + 1)).double(),
        batch_of(dtype=F64, step=STEP),
    )
    mean, log_variance, reconstructed = encode_and_decode(system, batch)
    x, y = numbers(batch.image), numbers(reconstructed)
    expected = {"reconstruction": total(0.5 * (x - y) ** 2), "kl": kl_of(mean, log_variance)}
    loss, terms, statistics, *_ = system.loss(batch, system.passes(batch))
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=CLOSE)
    assert loss.item() == pytest.approx(sum(expected.values()), rel=CLOSE)
    assert statistics == {}


class Distance(nn.Module):
    """In the place of a trained network's features, whose file takes a second to read."""

    def __init__(self, kind, weights):
        super().__init__()
        self.given = kind, weights

    def forward(self, target, prediction):
        return (target - prediction).abs().mean()


@pytest.mark.parametrize("opponent", ["real", "not_own"])
@pytest.mark.parametrize("encoder_adversarial", [True, False])
def test_a_vaegans_autoencoder_lowers_the_weighted_sum_of_all_its_terms(opponent, encoder_adversarial, monkeypatch):
    monkeypatch.setattr("models.systems.vaegan.Perceptual", Distance)
    configs = {"binary": DiscriminatorConfig(adversarial="hinge"), "ternary": DiscriminatorConfig(start=5, ramp=8)}
    system = VAEGAN(
        *(32, 1, 4, SMALL, "both", "both", "laplace", "ternary", 1),
        reconstruction_weight=0.7,
        perceptual_weight=300.0,
        perceptual="convnext",
        perceptual_weights="file",
        kl_weight=2.5,
        kl_warmup=20,
        free_bits=0.2,
        adversarial_weight=50.0,
        encoder_adversarial=encoder_adversarial,
        opponent=opponent,
        **configs,
    ).double()
    assert system.perceptual.given == ("convnext", "file")
    batch = batch_of(dtype=F64, step=STEP)
    loss, terms, *_ = system.loss(batch, system.passes(batch))
    mean, log_variance, reconstructed = encode_and_decode(system, batch)
    generated = system.decoder(batch.normal("prior", (4,)))
    x, y = numbers(batch.image), numbers(reconstructed)
    features = [numbers(system.discriminator_ternary(image, feature_layer=1)) for image in (batch.image, reconstructed)]
    binary = [numbers(system.discriminator_binary(fake)) for fake in (reconstructed, generated)]
    ternary = [numbers(system.discriminator_ternary(fake)) for fake in (reconstructed, generated)]
    p = [np.exp(of) / np.exp(of).sum(1, keepdims=True) for of in ternary]
    wanted = [p[0][:, 0], p[1][:, 0]] if opponent == "real" else [1 - p[0][:, 1], 1 - p[1][:, 2]]
    expected = {
        "reconstruction": total(np.abs(x - y)),
        "reconstruction/features": total(0.5 * (features[0] - features[1]) ** 2),
        "perceptual": np.abs(x - y).mean(),
        "kl": kl_of(mean, log_variance, 0.2),
        "generator_loss/binary": np.mean([-of.mean() for of in binary]),
        "generator_loss/ternary": np.mean([-np.log(of).mean() for of in wanted]),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=CLOSE)
    ramp = (STEP - 5) / 8
    whole = (
        0.7 * (expected["reconstruction"] + expected["reconstruction/features"])
        + 300.0 * expected["perceptual"]
        + 2.5 * (STEP / 20) * expected["kl"]
        + 50.0 * (expected["generator_loss/binary"] + ramp * expected["generator_loss/ternary"]) / (1 + ramp)
    )
    assert loss.item() == pytest.approx(whole, rel=CLOSE)
    assert torch.equal(system.sample(batch.normal("prior", (4,))), generated)
    assert torch.equal(system.posterior(batch.image)[1], system.encoder(batch.image)[:, 4:])
    assert torch.equal(system.reconstruct(batch.image), system.sample(torch.from_numpy(mean)))


def test_an_adaptive_weight_multiplies_the_adversarial_term():
    config = DiscriminatorConfig(start=5, ramp=8)
    system, batch = (
        VAEGAN(32, 1, 4, SMALL, adversarial_weight=50.0, adaptive=True, binary=config).double(),
        batch_of(dtype=F64, step=STEP),
    )
    system.adaptive_weight.fill_(0.25)
    loss, terms, *_ = system.loss(batch, system.passes(batch))
    generator_loss = 0.25 * 50.0 * (STEP - 5) / 8 * terms["generator_loss/binary"].item()
    assert loss.item() == pytest.approx((terms["reconstruction"] + terms["kl"]).item() + generator_loss, rel=CLOSE)
    assert terms["adaptive_weight"].item() == 0.25


KINDS = ["logistic", "hinge", "least_squares", "relativistic"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["binary", "ternary"])
def test_a_vaegans_discriminator_lowers_its_game_its_penalties_and_lecam(mode, kind):
    config = DiscriminatorConfig(
        adversarial=kind, r1_weight=0.6, r2_weight=0.25, penalty_every=3, lecam_weight=0.4, start=3, every=2
    )
    weights = {"class_weights": (2.0, 1.0, 0.5)} if mode == "ternary" else {}
    system = VAEGAN(32, 1, 4, SMALL, mode, **weights, **{mode: config}).double()
    network = system.get_submodule(f"discriminator_{mode}")
    system.get_buffer(f"lecam_discriminator_{mode}").copy_(torch.tensor([0.3, -0.2], dtype=F64))
    batch = batch_of(dtype=F64, step=STEP)
    _, _, reconstructed = encode_and_decode(system, batch)
    images = [batch.image, reconstructed, system.decoder(batch.normal("prior", (4,))).detach()]
    logits = [numbers(network(image)) for image in images]
    shares = [2 / 3.5, 1 / 3.5, 0.5 / 3.5] if mode == "ternary" else [0.5, 0.25, 0.25]
    s_real, s_fake = realness(logits[0]), np.concatenate([realness(logits[1]), realness(logits[2])])
    expected = {
        "discriminator_loss": discriminator_loss_of(kind, logits, shares),
        "lecam": (np.maximum(s_real + 0.2, 0) ** 2).mean() + (np.maximum(0.3 - s_fake, 0) ** 2).mean(),
        "r1": slope(network, images[0]) / 2,
        "r2": (slope(network, images[1]) + slope(network, images[2])) / 4,
    }
    for step, due in ((STEP, 3), (STEP + 2, 0)):  # penalties at steps 3, 9, 15 ..., each in the place of three
        batch = batch_of(dtype=F64, step=step)
        passes = system.passes(batch)._replace(reconstructed=images[1], generated=images[2])
        loss, terms, statistics, *_ = system.players()[0].loss(batch, passes)
        there = {name: value for name, value in expected.items() if due or name not in ("r1", "r2")}
        assert {name: terms[name].item() for name in there} == pytest.approx(there, rel=CLOSE)
        assert ("r1" in terms) == ("r2" in terms) == (due > 0)
        whole = (
            expected["discriminator_loss"]
            + 0.4 * expected["lecam"]
            + due * (0.6 * expected["r1"] + 0.25 * expected["r2"])
        )
        assert loss.item() == pytest.approx(whole, rel=CLOSE)
        assert statistics[f"realness_discriminator_{mode}"].tolist() == pytest.approx(
            [s_real.mean(), s_fake.mean()], rel=CLOSE
        )
    system.players()[0].after(statistics)
    means = [0.99 * 0.3 + 0.01 * s_real.mean(), -0.99 * 0.2 + 0.01 * s_fake.mean()]
    assert system.get_buffer(f"lecam_discriminator_{mode}").tolist() == pytest.approx(means, rel=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gans_players_lower_each_others_game(kind):
    system = GAN(32, 1, 4, SMALL, binary=DiscriminatorConfig(adversarial=kind, r1_weight=0.6)).double()
    batch = batch_of(dtype=F64, step=STEP)
    passes = system.passes(batch)
    generated = system.decoder(batch.normal("prior", (4,)))
    real, fake = (numbers(system.discriminator_binary(image)) for image in (batch.image, generated))
    loss, terms, *_ = system.discriminator_loss(batch, passes)
    assert terms["discriminator_loss"].item() == pytest.approx(
        discriminator_loss_of(kind, [real, fake], [0.5, 0.5]), rel=CLOSE
    )
    r1 = slope(system.discriminator_binary, batch.image) / 2
    assert loss.item() == pytest.approx(terms["discriminator_loss"].item() + 0.6 * r1, rel=CLOSE)
    loss, terms, *_ = system.loss(batch, passes)
    assert loss.item() == pytest.approx(generator_loss_of(kind, realness(fake), realness(real)), rel=CLOSE)
    assert terms == {"generator_loss/binary": loss}
    assert torch.equal(system.sample(batch.normal("prior", (4,))), generated)


@pytest.mark.parametrize(("kind", "latent_weight"), [("least_squares", 3.0), ("relativistic", None)])
def test_a_ganvaes_players_lower_their_game_and_the_codes_likelihood(kind, latent_weight):
    """Which counts once where its weight is unset."""
    config = DiscriminatorConfig(adversarial=kind, r1_weight=0.0, start=5, ramp=8)
    given = {"latent_weight": latent_weight} if latent_weight else {}
    system = GANVAE(32, 1, 4, SMALL, **given, binary=config).double()
    batch = batch_of(dtype=F64, step=STEP)
    passes = system.passes(batch)
    z = batch.normal("prior", (4,))
    generated = system.decoder(z)
    real, fake = (numbers(system.discriminator_binary(image)) for image in (batch.image, generated))
    mean, log_variance = posterior(system, generated)
    loss, *_ = system.discriminator_loss(batch, passes)
    assert loss.item() == pytest.approx(discriminator_loss_of(kind, [real, fake], [0.5, 0.5]), rel=CLOSE)
    variance = np.exp(log_variance)
    density = np.exp(-((numbers(z) - mean) ** 2) / (2 * variance)) / np.sqrt(2 * math.pi * variance)
    expected = {
        "generator_loss/binary": generator_loss_of(kind, realness(fake), realness(real)),
        "latent": -np.log(density).mean(),
    }
    loss, terms, *_ = system.loss(batch, passes)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=CLOSE)
    whole = (STEP - 5) / 8 * expected["generator_loss/binary"] + (latent_weight or 1.0) * expected["latent"]
    assert loss.item() == pytest.approx(whole, rel=CLOSE)
    mean, _ = posterior(system, batch.image)
    assert torch.equal(system.reconstruct(batch.image), system.sample(torch.from_numpy(mean)))


@pytest.mark.parametrize(("identity_weight", "kind"), [(2.0, "least_squares"), (0.0, "relativistic")])
def test_a_cyclegans_players_lower_their_games_the_cycles_and_the_identity(identity_weight, kind):
    config = DiscriminatorConfig(adversarial=kind, r1_weight=0.0, start=5, ramp=8)
    system = cyclegan(config, pool=0, cycle_weight=3.0, identity_weight=identity_weight).double()
    batch = batch_of(dtype=F64, step=STEP)
    (a, b), (ab, ba) = batch.images, (system.translator_ab, system.translator_ba)
    assert torch.equal(system.translate(a, "a2b"), ab(a))
    assert torch.equal(system.translate(a, "b2a"), ba(a))
    real, fake = {}, {}
    for domain, own, made in (("a", a, ba(b)), ("b", b, ab(a))):
        network = system.get_submodule(f"discriminator_{domain}")
        real[domain], fake[domain] = numbers(network(own)), numbers(network(made))
    passes = system.passes(batch)
    loss, terms, *_ = system.discriminator_loss(batch, passes)
    games = {
        f"{domain}/discriminator_loss": discriminator_loss_of(kind, [real[domain], fake[domain]], [0.5, 0.5])
        for domain in "ab"
    }
    assert {name: terms[name].item() for name in games} == pytest.approx(games, rel=CLOSE)
    assert loss.item() == pytest.approx(sum(games.values()), rel=CLOSE)

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return np.abs(numbers(one) - numbers(other)).mean()

    expected = {
        **{
            f"generator_loss/{domain}": generator_loss_of(kind, realness(fake[domain]), realness(real[domain]))
            for domain in "ab"
        },
        "cycle": apart(ba(ab(a)), a) + apart(ab(ba(b)), b),
    }
    if identity_weight:
        expected["identity"] = apart(ba(a), a) + apart(ab(b), b)
    loss, terms, *_ = system.loss(batch, passes)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=CLOSE)
    whole = (STEP - 5) / 8 * (expected["generator_loss/a"] + expected["generator_loss/b"]) + 3.0 * expected["cycle"]
    assert loss.item() == pytest.approx(whole + identity_weight * expected.get("identity", 0.0), rel=CLOSE)


@pytest.mark.parametrize("name", ["vae", "gan", "ganvae", "vaegan", "cyclegan", "adaptive"])
def test_a_micro_batch_may_be_one_image(name):
    system = VAEGAN(32, 1, 4, SMALL, adaptive=True) if name == "adaptive" else SCHEDULED[name]()
    batch = batch_of(1)
    assert all(player.loss(batch, system.passes(batch)).value.isfinite() for player in system.players())


def test_a_cyclegans_discriminators_see_the_pools_fakes_and_keep_their_own_means():
    """Of two kept for each position: an image whose first draw is below a half is swapped for what its second names."""
    config = DiscriminatorConfig(adversarial="least_squares", r1_weight=0.0, lecam_weight=0.4)
    system = cyclegan(config, pool=16).double()
    system.hold(slice(0, 8), 8)
    generator = torch.Generator().manual_seed(2)
    kept, means = {}, {"a": (0.3, -0.2), "b": (-0.1, 0.2)}
    for domain in "ab":
        system.get_buffer(f"lecam_discriminator_{domain}").copy_(torch.tensor(means[domain], dtype=F64))
        kept[domain] = torch.rand(8, 2, 1, 32, 32, generator=generator, dtype=F64)
        system.get_buffer(f"pool_{domain}").copy_(kept[domain])
    system.pooled.fill_(2)
    batch = batch_of(8, dtype=F64, step=STEP)
    draws = numbers(batch.uniform("pool", (2,)))
    swapped, slots = draws[:, 0] < 0.5, (2 * draws[:, 1]).astype(int)
    assert 0 < swapped.sum() < 8
    a, b = batch.images
    expected, after = {}, {}
    for domain, own, made in (("a", a, system.translator_ba(b)), ("b", b, system.translator_ab(a))):
        older = kept[domain][torch.arange(8), slots]
        shown = torch.where(torch.from_numpy(swapped)[:, None, None, None], older, made.detach())
        network = system.get_submodule(f"discriminator_{domain}")
        real, fake = numbers(network(own)), numbers(network(shown))
        expected[f"{domain}/discriminator_loss"] = discriminator_loss_of("least_squares", [real, fake], [0.5, 0.5])
        mean_real, mean_fake = means[domain]
        lecam = np.maximum(real - mean_fake, 0) ** 2, np.maximum(mean_real - fake, 0) ** 2
        expected[f"{domain}/lecam"] = lecam[0].mean() + lecam[1].mean()
        after[domain] = [0.99 * mean_real + 0.01 * real.mean(), 0.99 * mean_fake + 0.01 * fake.mean()]
        for row in range(8):
            if swapped[row]:
                kept[domain][row, slots[row]] = made[row].detach()
    player = system.players()[0]
    loss, terms, statistics, by_position = player.loss(batch, system.passes(batch))
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected, rel=CLOSE)
    whole = sum(value * (0.4 if name.endswith("lecam") else 1) for name, value in expected.items())
    assert loss.item() == pytest.approx(whole, rel=CLOSE)
    player.after(statistics | by_position)
    for domain in "ab":
        means = system.get_buffer(f"lecam_discriminator_{domain}").tolist()
        assert means == pytest.approx(after[domain], rel=CLOSE)
        assert torch.equal(system.get_buffer(f"pool_{domain}"), kept[domain])
    assert system.pooled.tolist() == [2] * 8


# ---- the step

FIRST = {"lr": 3e-4, "schedule": "linear", "hold": 0.25, "final": 0.1, "betas": (0.3, 0.8), "weight_decay": 0.1}
LAST = {"lr": 2e-3, "schedule": "cosine", "warmup": 3, "betas": (0.4, 0.9), "weight_decay": 0.2, "algorithm": "adam"}
# What the rates above are at steps 0 to 4 of 8: the first falls from step 2 on to a tenth at step 8, the last rises
# within 3 steps while it falls to 0 along half a cosine.
FIRST_RATES = [3e-4, 3e-4, 3e-4, 3e-4 * (1 - 0.9 / 6), 3e-4 * (1 - 0.9 * 2 / 6)]
LAST_RATES = [2e-3 * min(1, (k + 1) / 3) * math.cos(math.pi * k / 16) ** 2 for k in range(5)]
SCHEDULED = {
    "ae": lambda: AE(32, 1, 4, SMALL, OptimizerConfig(**LAST)),
    "vae": lambda: VAE(32, 1, 4, SMALL, autoencoder=OptimizerConfig(**LAST)),
    "gan": lambda: GAN(32, 1, 4, SMALL, OptimizerConfig(**LAST), DiscriminatorConfig(**FIRST)),
    "ganvae": lambda: GANVAE(32, 1, 4, SMALL, 1.0, OptimizerConfig(**LAST), DiscriminatorConfig(**FIRST)),
    "vaegan": lambda: VAEGAN(
        *(32, 1, 4, SMALL, "both"),
        autoencoder=OptimizerConfig(**LAST),
        binary=DiscriminatorConfig(**FIRST),
        ternary=DiscriminatorConfig(**{**FIRST, "lr": 6e-4, "algorithm": "adam"}),
    ),
    "cyclegan": lambda: CycleGAN(
        32, 1, 4, blocks=1, pool=0, translators=OptimizerConfig(**LAST), binary=DiscriminatorConfig(**FIRST)
    ),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_every_players_optimizer_has_its_settings_and_follows_its_schedule(name):
    system = SCHEDULED[name]()
    train_step = TrainStep(Accelerator(cpu=True), system, 8)
    for step in range(5):
        train_step([batch_of(2, step=step)], step)
        for one in train_step.player_states:
            (group,) = one.optimizer.param_groups
            rates = {"autoencoder": LAST_RATES, "generator": LAST_RATES, "translators": LAST_RATES}
            rates |= {"binary": FIRST_RATES, "ternary": [2 * rate for rate in FIRST_RATES]}
            assert group["lr"] == pytest.approx(rates[one.player.name][step], rel=1e-12)
            settings = FIRST if one.player.name in ("binary", "ternary") else LAST
            assert (group["betas"], group["weight_decay"]) == (settings["betas"], settings["weight_decay"])
            adam = one.player.name != "binary"
            assert isinstance(one.optimizer, torch.optim.AdamW) != adam


def test_a_rate_stays_at_what_is_left_after_the_runs_end():
    assert OptimizerConfig(2.0, schedule="linear", final=0.1).rate(150, 100) == pytest.approx(0.2, rel=1e-12)
    assert OptimizerConfig(2.0, schedule="cosine").rate(150, 100) == pytest.approx(0.0, abs=1e-12)
    assert OptimizerConfig(2.0).rate(150, 100) == 2.0


@pytest.mark.parametrize("algorithm", ["adam", "adamw"])
@pytest.mark.parametrize(("weight_decay", "clip"), [(0.0, None), (0.0, 15.0), (0.25, None), (0.25, 15.0)])
@pytest.mark.parametrize("parts", [1, 2])
def test_updates_by_hand(algorithm, weight_decay, clip, parts):
    """Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2: adamw's decay is apart from the gradient.

    The first gradient's norm is 13, within the clip of 15; the others' are 26 and 39.
    """
    settings = OptimizerConfig(0.1, (0.6, 0.9), weight_decay, clip, algorithm, warmup=2)
    system = Line(settings).double()
    accelerator = Accelerator(cpu=True)
    train_step = TrainStep(accelerator, system, 3)
    w, m, v = np.array([0.5, -2.0, 1.5]), np.zeros(3), np.zeros(3)
    for k in range(3):
        gradient, before = (k + 1) * STEEPNESS, w.copy()
        if clip:
            gradient = gradient * min(1, clip / (13 * (k + 1)))
        if algorithm == "adam":
            gradient = gradient + weight_decay * w
        m, v = 0.6 * m + 0.4 * gradient, 0.9 * v + 0.1 * gradient**2
        rate = 0.1 * (1 if k else 0.5)
        if algorithm == "adamw":
            w = w - rate * weight_decay * w
        w = w - rate * (m / (1 - 0.6 ** (k + 1))) / (np.sqrt(v / (1 - 0.9 ** (k + 1))) + 1e-8)
        train_step(line_batch(k).split(4 // parts), k)
        # torch adds 1e-6 to the norm that it divides the clip by: 1e-6 / 26 of the gradient, of which an update is a
        # ratio of sums.
        assert system.weights() == pytest.approx(w.tolist(), rel=1e-6 if clip else 1e-10)
        assert {name: count for name, (_, count) in train_step.meter.state().items()} == {
            "player/height": 1.0,
            "player/grad_norm": 1.0,
        }
        means = {"player/height": (k + 1) * STEEPNESS @ before, "player/grad_norm": 13 * (k + 1)}
        assert train_step.meter.read(accelerator) == pytest.approx(means, rel=1e-6 if clip else 1e-10)
    assert train_step.failed() is None


def test_the_averages_half_life_is_at_most_a_share_of_the_images_seen():
    """After k steps of 10 images min(100, 10 k * 2); half of an old weight is left after as many images."""
    system = Line(OptimizerConfig()).double()
    ema, expected = EMA(system, half_life=100, batch_size=10, ramp=2.0), 1.0
    torch.nn.init.constant_(ema.system.first.weight, 1.0)
    torch.nn.init.constant_(system.first.weight, 5.0)
    for k in range(1, 9):
        ema.update(k)
        kept = 0.5 ** (10 / min(100, 20 * k))
        expected = kept * expected + (1 - kept) * 5.0
        assert ema.system.first.weight.tolist() == [pytest.approx([expected, expected], rel=1e-12)]


def test_the_averages_ramp_is_a_twentieth_unless_set():
    system = Line(OptimizerConfig()).double()
    ema = EMA(system, half_life=10**6, batch_size=10)
    torch.nn.init.zeros_(ema.system.second.weight)
    torch.nn.init.ones_(system.second.weight)
    ema.update(50)
    assert ema.system.second.weight.item() == pytest.approx(1 - 0.5 ** (10 / 25), rel=1e-12)


# ---- the evaluation's settings


def cuda_settings() -> dict[str, object]:
    cudnn = torch.backends.cudnn
    return {
        **{name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")},
        "matmul": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


EXACT = {
    **{"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False},
    **{"matmul": "highest", "autocast": False},
}
FAST = {
    **{"enabled": False, "benchmark": True, "deterministic": False, "allow_tf32": True},
    **{"matmul": "medium", "autocast": True},
}


def test_scores_are_computed_without_tf32_autocast_or_choice_by_speed():
    """Seen by the extractor itself; afterwards the settings are what they were."""
    seen = []

    class Watching:
        name, dim, classes = "watching", 2, 0

        def __call__(self, image):
            seen.append(cuda_settings())
            return torch.zeros(len(image), 2), torch.zeros(len(image), 0)

    torch.set_float32_matmul_precision("medium")
    try:
        with (
            torch.backends.cudnn.flags(enabled=False, benchmark=True, deterministic=False, allow_tf32=True),
            torch.autocast("cpu", torch.bfloat16),
        ):
            assert cuda_settings() == FAST
            extract_features(Watching(), torch.zeros(3, 1, 32, 32, dtype=torch.uint8))
            assert cuda_settings() == FAST
            with strict_fp32(torch.device("cpu")):
                seen.append(cuda_settings())
            assert cuda_settings() == FAST
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [EXACT, EXACT]
