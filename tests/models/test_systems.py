"""Gradients land exactly where the table of players says, in the right direction; impossible options are refused."""

from dataclasses import replace

import pytest
import torch
from systems_under_test import SILENT, SMALL, STEADY, SYSTEMS, batch_of, cancelled, cyclegan, freeze_all_but, vaegan
from torch import nn

from models import AE, GAN, GANVAE, VAE, VAEGAN, CycleGAN, DiscriminatorConfig, NetworkConfig, OptimizerConfig
from models.losses import realness
from models.networks import Discriminator
from models.networks.autoencoder import Decoder, Encoder
from models.networks.config import sides
from models.networks.translator import Translator
from trainer.batch import Batch


def awaken(system: nn.Module) -> None:
    """Move the weights a little, so that branches that begin at 0 pass gradients on."""
    with torch.no_grad():
        for parameter in system.parameters():
            parameter += 0.02 * torch.randn_like(parameter)


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_land_on_each_players_networks_only(name):
    system = SYSTEMS[name]()
    awaken(system)
    still = cancelled(system)
    if hasattr(system, "adaptive_weight"):
        system.adaptive_weight.fill_(0.5)
    moved = []
    for player in system.players():
        freeze_all_but(system, player.networks)
        loss, terms, *_ = player.loss(batch_of(step=10), system.passes(batch_of(step=10)))
        loss.backward()
        for network, module in system.named_children():
            for parameter, value in module.named_parameters():
                if network in player.networks:
                    assert value.grad is not None, f"{player.name}: {network}.{parameter}"
                    moves = f"{network}.{parameter}" not in still
                    assert not moves or value.grad.abs().sum() > 0, f"{player.name}: {network}.{parameter}"
                else:
                    assert value.grad is None, f"{player.name}: {network}.{parameter}"
        assert all(value.dim() == 0 and value.isfinite() for value in terms.values())
        system.zero_grad()
        moved += player.networks
    assert sorted(moved) == sorted(system.networks()), "every network is moved by exactly one player"


def test_each_mode_has_its_own_network_settings_and_schedule():
    binary, ternary = DiscriminatorConfig(lr=1e-4, every=2), DiscriminatorConfig(lr=3e-4, start=5, betas=(0, 0.9))
    system = VAEGAN(32, 1, 4, SMALL, "both", binary=binary, ternary=ternary, autoencoder=STEADY)
    table = {player.name: (player.networks, player.optimizer.lr) for player in system.players()}
    assert table == {
        "binary": (("discriminator_binary",), 1e-4),
        "ternary": (("discriminator_ternary",), 3e-4),
        "autoencoder": (("encoder", "decoder"), 1e-3),
    }
    moves = [[player.name for player in system.players() if player.moves(step)] for step in (0, 1, 4, 5)]
    assert moves == [
        ["binary", "autoencoder"],
        ["autoencoder"],
        ["binary", "autoencoder"],
        ["ternary", "autoencoder"],
    ]


GAMES = {
    **{
        f"{mode}, {kind}": lambda mode=mode, kind=kind: vaegan(
            mode, reconstruction_weight=0.0, kl_weight=0.0, config=replace(SILENT, adversarial=kind)
        )
        for mode in ("binary", "ternary")
        for kind in ("logistic", "hinge", "least_squares", "relativistic")
    },
    "gan": lambda: GAN(32, 1, 4, SMALL, STEADY, SILENT),
    "ganvae": lambda: GANVAE(32, 1, 4, SMALL, 0.0, STEADY, SILENT),
    "cyclegan": lambda: cyclegan(
        replace(SILENT, adversarial="least_squares"), pool=0, cycle_weight=0.0, identity_weight=0.0
    ),
}


def fakes_realness(system: nn.Module, beside_real: bool) -> float:
    """Mean realness of fakes, or how much more of it they have than real images."""
    batch = batch_of(dtype=torch.float64)
    passes = system.passes(batch)
    if isinstance(system, CycleGAN):
        shown = {"discriminator_a": passes.fake_a, "discriminator_b": passes.fake_b}
    elif isinstance(system, VAEGAN):
        shown = {
            f"discriminator_{mode}": torch.cat([passes.reconstructed, passes.generated]) for mode in system.adversaries
        }
    else:
        shown = {"discriminator_binary": passes if isinstance(system, GAN) else passes.generated}
    real = {"discriminator_b": batch.images[1]}
    of = system.get_submodule
    with torch.no_grad():
        gaps = [
            realness(of(name)(fakes)).mean() - beside_real * realness(of(name)(real.get(name, batch.image))).mean()
            for name, fakes in shown.items()
        ]
    return sum(gap.item() for gap in gaps)


@pytest.mark.parametrize("name", GAMES)
def test_the_adversarial_gradient_raises_realness_for_the_opponent_and_lowers_it_for_the_discriminator(name):
    """A shared, undetached graph would give the decoder the discriminator's gradient: the wrong sign (cosine -1)."""
    system = GAMES[name]().double()
    for player, sign in zip(system.players(), [-1, 1], strict=True):
        if sign < 0 and system.players()[0].optimizer.adversarial == "least_squares":
            continue  # its discriminator moves fakes to -1 from either side
        before = fakes_realness(system, beside_real=sign < 0)
        freeze_all_but(system, player.networks)
        loss = player.loss(batch_of(dtype=torch.float64), system.passes(batch_of(dtype=torch.float64))).value
        moved = [p for p in system.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, moved, allow_unused=True)  # a GAN-VAE's encoder has no part in it
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(moved, gradients, strict=True)]
        with torch.no_grad():
            for parameter, gradient in zip(moved, gradients, strict=True):
                parameter -= 1e-4 * gradient
            assert (fakes_realness(system, beside_real=sign < 0) - before) * sign > 0
            for parameter, gradient in zip(moved, gradients, strict=True):
                parameter += 1e-4 * gradient


def test_the_decoders_adversarial_gradient_is_the_generator_losss_alone():
    """cosine +1 with the gradient of -log p_real, by hand; Pythae's trainer adds the discriminator's and reaches -1."""
    system = vaegan(reconstruction_weight=0.0, kl_weight=0.0, adversarial_weight=1.0, config=SILENT).double()
    batch = batch_of(dtype=torch.float64)
    freeze_all_but(system, ("encoder", "decoder"))
    weights = list(system.decoder.parameters())
    passes = system.passes(batch)
    by_hand = -sum(
        nn.functional.logsigmoid(system.discriminator_binary(x)).mean() / 2
        for x in (passes.reconstructed, passes.generated)
    )
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(by_hand, weights, retain_graph=True)])
    found = torch.cat(
        [g.flatten() for g in torch.autograd.grad(system.players()[-1].loss(batch, passes).value, weights)]
    )
    assert nn.functional.cosine_similarity(found, expected, dim=0).item() == pytest.approx(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adversarial", [True, False])
def test_encoder_adversarial_decides_whether_the_encoder_gets_its_gradient(adversarial):
    system = vaegan(reconstruction_weight=0.0, kl_weight=0.0, encoder_adversarial=adversarial)
    player = system.players()[-1]
    freeze_all_but(system, player.networks)
    player.loss(batch_of(), system.passes(batch_of())).value.backward()
    heard = sum(p.grad.abs().sum() for p in system.encoder.parameters() if p.grad is not None)
    assert (heard > 0) == adversarial
    assert all(p.grad.abs().sum() > 0 for p in system.decoder.parameters())


def test_a_subclass_decides_which_images_are_fakes_for_both_sides_of_the_game():
    class SamplesOnly(VAEGAN):
        def fakes(self, passes):
            return {"generated": passes.generated}

    system, batch = SamplesOnly(32, 1, 4, SMALL, reconstruction_weight=0.0, kl_weight=0.0, binary=SILENT), batch_of()
    passes, (discriminator, autoencoder) = system.passes(batch), system.players()
    real, fake = (system.discriminator_binary(image) for image in (batch.image, passes.generated))
    losses = discriminator.loss(batch, passes), autoencoder.loss(batch, passes)
    by_hand = nn.functional.softplus(-real).mean() / 2 + nn.functional.softplus(fake).mean() / 2
    torch.testing.assert_close(losses[0].value, by_hand)
    torch.testing.assert_close(losses[1].terms["generator_loss/binary"], nn.functional.softplus(-fake).mean())


def test_players_of_a_step_see_the_same_draw():
    system = VAE(32, 1, 4, SMALL)
    assert torch.equal(system.passes(batch_of()).reconstructed, system.passes(batch_of()).reconstructed)


@pytest.mark.parametrize("family", ["dcgan", "residual"])
@pytest.mark.parametrize(("size", "channels"), [(16, 1), (28, 1), (48, 3), ((64, 96), 3), (128, 3), (256, 3)])
def test_networks_fit_any_size(family, size, channels):
    image = torch.rand(2, channels, *sides(size))
    settings = NetworkConfig(family, 8, blocks=1 if family == "residual" else 2)
    assert Encoder(settings, size, channels, 10)(image).shape == (2, 10)
    assert Decoder(settings, size, channels, 5)(torch.randn(2, 5)).shape == image.shape
    assert Discriminator(settings, size, channels, 3)(image).shape == (2, 3)


@pytest.mark.parametrize(("stride", "size"), [(4, 256), (8, (88, 264))])
def test_codes_may_be_maps(stride, size):
    """Of any multiples of their stride."""
    settings, (height, width) = NetworkConfig("residual", 8, blocks=1, latent_stride=stride), sides(size)
    shape = settings.latent_shape(size, 4)
    assert shape == (4, height // stride, width // stride)
    assert Encoder(settings, size, 3, 8)(torch.rand(1, 3, height, width)).shape == (1, 8, *shape[1:])
    assert Decoder(settings, size, 3, 4)(torch.randn(1, *shape)).shape == (1, 3, height, width)


def test_a_patch_sees_70_pixels_at_256_and_16_at_64():
    for size, pixels in (((264, 512), 70), (256, 70), (128, 34), (64, 16)):
        network = Discriminator(NetworkConfig("dcgan", 4, patches=True), size, 1, 1)
        image = torch.rand(1, 1, *sides(size), requires_grad=True)
        logits = network(image)
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
        assert (image.grad[0, 0].abs().sum(0) > 0).sum() == pixels


@pytest.mark.parametrize("family", ["dcgan", "residual"])
def test_initial_activations_have_about_unit_scale(family):
    settings = NetworkConfig(family, 16)
    image = torch.randn(64, 3, 64, 64)
    assert 0.1 < Encoder(settings, 64, 3, 10)(image).std() < 3
    assert 0.2 < Decoder(settings, 64, 3, 16)(torch.randn(64, 16)).std() < 1


def test_spectral_norm_iterates_once_a_move_and_finds_the_largest_singular_value():
    system = vaegan(config=replace(SILENT, spectral_norm=True))
    network = system.discriminator_binary
    u = network.head.parametrizations.weight[0].u.clone()
    network(batch_of().image)
    assert torch.equal(u, network.head.parametrizations.weight[0].u), "a forward pass changes nothing"
    for _ in range(50):
        system.players()[0].after({})
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(("size", "slots"), [(5, 2), (1, 1)])
def test_the_image_pool_by_hand(size, slots):
    """Each position fills its own slots; then half of its fakes are swapped for older ones; all from the draws."""
    system, first = cyclegan(pool=size), 2
    system.hold(slice(first, first + 3), 4)
    kept: list[list[float]] = [[], [], []]
    swapped = 0
    for step in range(12):
        image = torch.zeros(3, 1, 32, 32)
        batch = Batch((image, image), slice(first, first + 3), 4, 0, step)
        fakes = torch.arange(1.0 + 3 * step, 4 + 3 * step)[:, None, None, None].expand(3, 1, 32, 32)
        chosen = system.pool.choose(batch)
        shown = system.pool.mixed(chosen, "a", fakes)[:, 0, 0, 0].tolist()
        u = batch.uniform("pool", (2,))
        for i, fake in enumerate(fakes[:, 0, 0, 0].tolist()):
            expected = fake
            if len(kept[i]) < slots:
                kept[i].append(fake)
            elif u[i, 0] < 0.5:
                expected, kept[i][int(u[i, 1] * slots)] = kept[i][int(u[i, 1] * slots)], fake
                swapped += 1
            assert shown[i] == expected
        system.pool.update(chosen | {"pool_a": fakes, "pool_b": -fakes})
        for sign, pool in ((1, system.pool_a), (-1, system.pool_b)):
            assert (sign * pool[:, :, 0, 0, 0]).tolist() == [row + [0.0] * (slots - len(row)) for row in kept]
    assert 10 < swapped < 30, "about half of 36, less those that found a free slot"


def test_a_pool_must_be_made_before_training():
    system = CycleGAN(32, 1, 4, blocks=1)
    assert system.statistics() == {}
    with pytest.raises(RuntimeError, match="hold was not called"):
        system.discriminator_loss(batch_of(), system.passes(batch_of()))


@pytest.mark.parametrize("steps", [{"start": 4}, {"start": 1, "counts_from": 4}])
def test_a_discriminator_counts_for_its_opponents_from_its_start_or_a_later_step_on(steps):
    configs = {"binary": SILENT, "ternary": replace(SILENT, ramp=4, **steps)}
    system = VAEGAN(32, 1, 4, SMALL, "both", reconstruction_weight=0, kl_weight=0, adversarial_weight=1, **configs)
    for step, weights in {3: (1, None), 4: (1, 0), 6: (2 / 3, 1 / 3), 8: (1 / 2, 1 / 2), 99: (1 / 2, 1 / 2)}.items():
        passes = system.passes(batch_of(step=step))
        loss, terms, *_ = system.loss(batch_of(step=step), passes)
        expected = weights[0] * terms["generator_loss/binary"]
        assert ("generator_loss/ternary" in terms) == (weights[1] is not None)
        if weights[1] is not None:
            expected = expected + weights[1] * terms["generator_loss/ternary"]
        torch.testing.assert_close(loss, expected)
        judged = [system.discriminator_loss(mode, batch_of(step=step), passes).terms for mode in configs]
        assert "weight_for_opponents" not in judged[0]
        assert judged[1]["weight_for_opponents"].item() == min(max((step - 4) / 4, 0), 1)
    assert {player.name: player.start for player in system.players()}["ternary"] == steps["start"]


def test_an_adaptive_weight_keeps_the_adversarial_weight_and_the_ramp():
    def pull(weight: float, ramp: int) -> torch.Tensor:
        torch.manual_seed(0)
        config = replace(SILENT, ramp=ramp)
        system = vaegan(adaptive=True, adversarial_weight=weight, reconstruction_weight=1.0, config=config).double()
        batch, player = batch_of(dtype=torch.float64, step=5), system.players()[-1]
        player.after(player.loss(batch, system.passes(batch)).statistics)
        without = system.loss(batch, system.passes(batch)).value
        kept = system.adaptive_weight.item()
        system.adaptive_weight.zero_()
        assert kept > 0
        return without - system.loss(batch, system.passes(batch)).value

    assert pull(2.0, 0).item() == pytest.approx(2 * pull(1.0, 0).item())
    assert pull(1.0, 10).item() == pytest.approx(0.5 * pull(1.0, 0).item())


def adapted(system: VAEGAN, batch: Batch) -> torch.Tensor:
    """The adaptive weight that a step leaves."""
    player = system.players()[-1]
    freeze_all_but(system, player.networks)
    player.after(player.loss(batch, system.passes(batch)).statistics)
    return system.adaptive_weight


@pytest.mark.parametrize("encoder_adversarial", [True, False])
def test_an_adaptive_weight_is_the_ratio_of_gradients_per_pixel(encoder_adversarial):
    system = vaegan(
        config=SILENT, adaptive=True, reconstruction_weight=3.0, encoder_adversarial=encoder_adversarial
    ).double()
    batch = batch_of(dtype=torch.float64)
    found = adapted(system, batch)
    passes, last = system.passes(batch), system.decoder.last.weight
    reconstruction = 3 * (passes.reconstructed - batch.image).square().mean() / 2
    generator_losses = [
        -nn.functional.logsigmoid(system.discriminator_binary(x)) for x in (passes.adversarial, passes.generated)
    ]
    norms = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in (reconstruction, torch.cat(generator_losses).mean())
    ]
    assert found.item() == pytest.approx((norms[0] / (norms[1] + 1e-4)).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("size", "settings"), [(32, {}), (128, {}), (32, {"reconstruction_weight": 1e4}), (32, {"reconstruction": "both"})]
)
def test_an_adaptive_weight_in_fp16_is_that_in_fp32(size, settings):
    """At either end of its sums: of a few hundred pixels and of many, of a large loss and of a small one."""
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        system = VAEGAN(size, 1, 4, SMALL, binary=SILENT, adaptive=True, **settings)
        with torch.autocast("cpu", torch.float16, enabled=half):
            found.append(adapted(system, batch_of(8, size)).item())
    # Either norm is of numbers that some twenty layers, forth and back, have each rounded to 2^-11 of its magnitude.
    assert found[1] == pytest.approx(found[0], rel=2 * 20 * 2**-11)


def test_an_adaptive_weight_says_when_it_is_at_its_limit_and_stays_where_a_gradient_overflows():
    shares = []
    for limit in (1e4, 1e-6):
        system, batch = vaegan(config=SILENT, adaptive=True, adaptive_limit=limit), batch_of()
        before = adapted(system, batch).item()
        shares.append(system.loss(batch, system.passes(batch)).terms["adaptive_saturated"].item())
        finite = torch.ones(3)
        system.players()[-1].after({"reconstruction": finite * torch.inf, "adversarial": finite})
        system.players()[-1].after({"reconstruction": finite, "adversarial": finite * torch.inf})
        assert system.adaptive_weight.item() == before
    assert shares == [0, 1]


def test_a_saturated_pixel_has_a_gradient_in_half_precision():
    """A bernoulli's is p - x times 2 at the decoder's last layer, before tanh; 3.5 is 1 after a tanh in bf16."""
    system = VAE(32, 1, 4, SMALL, "bernoulli", autoencoder=STEADY)
    nn.init.zeros_(system.decoder.last.weight)
    nn.init.constant_(system.decoder.last.bias, -5.0)
    batch = batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        system.loss(batch, system.passes(batch)).terms["reconstruction"].backward()
    p, x = torch.tensor(-10.0).sigmoid(), (batch.image + 1) / 2
    expected = 2 * (p - x).sum() / len(x)
    assert system.decoder.last.bias.grad.item() == pytest.approx(expected.item(), rel=2**-7)  # of numbers in bf16


def test_a_saturated_pixel_of_a_translator_has_a_gradient_in_half_precision():
    """Of a sum, it is 1 - tanh^2 of each pixel; tanh(5) is 1 in bf16."""
    translator = Translator(1, 4, 1)
    nn.init.zeros_(translator.last.weight)
    nn.init.constant_(translator.last.bias, 5.0)
    image = torch.zeros(2, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        translator(image).sum().backward()
    expected = image.numel() * (1 - torch.tensor(5.0).double().tanh() ** 2)
    assert translator.last.bias.grad.item() == pytest.approx(expected.item(), rel=2**-7)  # of numbers in bf16


def test_systems_say_what_they_can():
    abilities = {
        name: {use for use in ("sample", "reconstruct", "posterior", "translate") if SYSTEMS[name]().can(use)}
        for name in ("ae", "gan, classes", "ganvae", "cyclegan")
    }
    everything = {"sample", "reconstruct", "posterior"}
    assert abilities == {"ae": everything, "gan, classes": {"sample"}, "ganvae": everything, "cyclegan": {"translate"}}


def test_systems_say_whether_they_are_for_samples_or_for_reconstructions():
    for_samples = (VAE(32, 1, 4, SMALL), GAN(32, 1, 4, SMALL), vaegan("both"), cyclegan())
    assert {system.judged_by for system in for_samples} == {"fid"}
    for_reconstructions = (AE(32, 1, 4, SMALL), VAE(32, 1, 4, SMALL, kl_weight=0), vaegan(samples=False))
    assert {system.judged_by for system in for_reconstructions} == {"rfid"}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: VAE(32, 1, latent_dim=0), "system.latent_dim is 0"),
        (lambda: AE(32, 1, networks=NetworkConfig(width=-1)), "system.networks.width is -1"),
        (lambda: AE(32, 1, networks=NetworkConfig("vgg")), "system.networks.family is 'vgg', expected"),
        (lambda: AE(32, 1, networks=NetworkConfig("dcgan", attention=(8,))), "system.networks.attention has no effect"),
        (
            lambda: AE(32, 1, networks=NetworkConfig("kl", norm="group", latent_stride=2)),
            "system.networks.norm has no effect",
        ),
        (lambda: AE(32, 1, networks=NetworkConfig(multipliers=(1, 2))), "system.networks.multipliers has no effect"),
        (
            lambda: GAN(32, 1, networks=NetworkConfig("kl")),
            r"latent_stride is null, expected 2.* such as \[1, 2, 4, 4\]",
        ),
        (
            lambda: VAE(1020, 1, networks=NetworkConfig("kl")),  # which fits no vectors either
            "latent_stride is null, expected 2",
        ),
        (
            lambda: GAN(32, 1, networks=NetworkConfig("kl", latent_stride=8, multipliers=(1, 2))),
            r"system.networks.multipliers is \[1, 2\], expected 4 numbers, as system.networks.latent_stride is 8",
        ),
        (lambda: AE(32, 1, networks=NetworkConfig("kl", multipliers=(1,) * 5)), "multipliers is .* 4 numbers at most"),
        (lambda: AE(32, 1, networks=NetworkConfig("kl", 48, latent_stride=2)), "system.networks.width is 48, expected"),
        (lambda: AE(32, 1, networks=NetworkConfig("kl", multipliers=(1, 0))), r"multipliers is \[1, 0\], expected"),
        (
            lambda: VAE(32, 1, 4, NetworkConfig("kl", latent_stride=2), "bernoulli"),
            "system.likelihood is bernoulli, expected another",
        ),
        (lambda: AE(32, 1, networks=NetworkConfig(attention=(5,))), r"system.networks.attention is \[5\]"),
        (
            lambda: AE(32, 1, networks=NetworkConfig(latent_stride=16)),
            "system.networks.latent_stride is 16, expected 8",
        ),
        (lambda: VAE(32, 1, kl_weight=-1), "system.kl_weight is -1"),
        (lambda: VAE(32, 1, likelihood="bernoulli", learned_scale=True), "system.learned_scale has no effect"),
        (lambda: AE(31, 1), "31 x 31 pixels .* such as to 32$"),
        (lambda: AE(67, 1), "67 x 67 pixels .* such as to 64$"),
        (lambda: AE(1280, 1), "1280 x 1280 pixels .* expected sides from 16 to 1,024; change data.size"),
        (lambda: VAE((64, 104), 1), r"multiples of 16, as networks .* to \[64, 96\]"),
        (
            lambda: VAE((64, 100), 1, networks=NetworkConfig("kl", latent_stride=8)),
            "multiples of 8, as a map .*latent_stride",
        ),
        (
            lambda: VAEGAN((64, 72), 1, networks=NetworkConfig(latent_stride=4)),
            "discriminators of patches.* to 64",
        ),
        (lambda: CycleGAN((32, 34), 1), "multiples of 4, as translators .* to 32"),
        (lambda: VAEGAN(32, 1, feature_layer=1), "no effect"),
        (lambda: VAEGAN(32, 1, ternary=DiscriminatorConfig()), "system.ternary has no effect"),
        (lambda: VAEGAN(32, 1, opponent="not_own"), "system.opponent has no effect"),
        (lambda: VAEGAN(32, 1, class_weights=(1, 2, 1)), "system.class_weights has no effect"),
        (lambda: vaegan("ternary", class_weights=(1, 0, 1)), "system.class_weights is"),
        (lambda: vaegan("ternary", samples=False), "system.samples is false, expected true, as the ternary"),
        (
            lambda: vaegan("ternary", opponent="not_own", config=DiscriminatorConfig(adversarial="hinge")),
            "ternary.adversarial",
        ),
        (lambda: vaegan("both", reconstruction="features"), "discriminator is null, expected binary or ternary"),
        (lambda: vaegan(reconstruction="features", feature_discriminator="ternary"), "is ternary, expected binary"),
        (lambda: vaegan(reconstruction="features", feature_layer=3), "expected 0 to 2"),
        (lambda: vaegan(perceptual_weight=1.0), "perceptual_weights is null: set both"),
        (
            lambda: vaegan(perceptual_weight=1.0, perceptual_weights="none.pth"),
            "none.pth does not exist, expected a file of torchvision's",
        ),
        (lambda: VAE(32, 1, autoencoder=OptimizerConfig(lr=-1)).players(), "system.autoencoder.lr is -1"),
        (lambda: VAE(32, 1, autoencoder=OptimizerConfig(betas=(1, 0.9))).players(), "system.autoencoder.betas"),
        (lambda: VAE(32, 1, autoencoder=OptimizerConfig(clip=0)).players(), "system.autoencoder.clip is 0"),
        (
            lambda: VAE(32, 1, autoencoder=OptimizerConfig(hold=0.5)).players(),
            "system.autoencoder.hold has no effect while system.autoencoder.schedule is constant",
        ),
        (
            lambda: VAE(32, 1, autoencoder=OptimizerConfig(hold=1, schedule="linear")).players(),
            r"hold is 1, expected a fraction in \[0, 1\)",
        ),
        (
            lambda: GAN(32, 1, binary=DiscriminatorConfig(r1_weight=0, penalty_every=2)),
            "system.binary.penalty_every has no effect",
        ),
        (
            lambda: GAN(32, 1, binary=DiscriminatorConfig(start=3)),
            "system.binary.start has no effect in a GAN",
        ),
        (lambda: GAN(32, 1, binary=DiscriminatorConfig(minibatch_stddev=1)), "system.binary.minibatch_stddev is 1"),
        (lambda: AE(32, 1, networks=NetworkConfig("dcgan", blocks=3)), "system.networks.blocks has no effect"),
        (lambda: GAN(32, 1, binary=DiscriminatorConfig(every=0)), "system.binary.every is 0"),
        (lambda: GAN(32, 1, binary=DiscriminatorConfig(lecam_decay=1)), "system.binary.lecam_decay is 1"),
        (
            lambda: GAN(32, 1, binary=DiscriminatorConfig(lecam_decay=0.9)),
            "system.binary.lecam_decay has no effect while",
        ),
        (lambda: vaegan(adaptive_limit=3), "system.adaptive_limit has no effect while system.adaptive is off"),
        (lambda: vaegan(adaptive=True, adversarial_weight=0), "system.adaptive has no effect"),
        (lambda: vaegan(kl_weight=0, kl_warmup=9), "system.kl_warmup has no effect while system.kl_weight is 0"),
        (lambda: vaegan(kl_weight=0, free_bits=0.1), "system.free_bits has no effect"),
        (lambda: vaegan(reconstruction="features", likelihood="laplace"), "system.likelihood has no effect"),
        (lambda: vaegan(perceptual="convnext"), "system.perceptual has no effect"),
        (lambda: VAE(32, 1, kl_weight=0, kl_warmup=9), "system.kl_warmup has no effect while system.kl_weight is 0"),
        (lambda: VAE(32, 1, kl_weight=0, free_bits=0.1), "system.free_bits has no effect"),
        (lambda: VAE(32, 1, networks=NetworkConfig(patches=True)), "system.networks.patches has no effect"),
        (lambda: AE(32, 1, networks=NetworkConfig(patches=True)), "system.networks.patches has no effect"),
        (
            lambda: AE(64, 1, networks=NetworkConfig(latent_stride=4, attention=(8,))),
            r"attention is \[8\], expected some of \[64, 32, 16\]",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_a_translator_is_the_same_with_deterministic_algorithms():
    """Its reflected edges are then made otherwise."""
    translator, image = Translator(1, 4, 1).double(), torch.rand(2, 1, 16, 16, dtype=torch.float64)
    found = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            made = translator(image)
            found.append([made, *torch.autograd.grad(made.square().sum(), translator.parameters())])
        finally:
            torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        # Sums of some 10^4 float64 terms, of up to 10 each, in another order; a bias before a norm has nothing else.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e4 * 10 * 2**-53 * 10)
