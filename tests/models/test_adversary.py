"""What a discriminator is shown, and in which precision it is computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from systems_under_test import DISCRIMINATOR, SMALL, SYSTEMS, batch_of, cyclegan, freeze_all_but, vaegan

from models import GAN, GANVAE, DiscriminatorConfig, losses
from models.augment import DRAWS, augment
from models.networks import Discriminator
from models.schedule import Schedule
from trainer.batch import Batch

F64 = torch.float64
ALL = ("color", "translation", "cutout")


def coloured(x: np.ndarray, brightness: float, saturation: float, contrast: float) -> np.ndarray:
    x = x + brightness - 0.5
    grey = x.mean(0)
    x = grey + (x - grey) * 2 * saturation
    return x.mean() + (x - x.mean()) * (0.5 + contrast)


def translated(x: np.ndarray, down: float, right: float) -> np.ndarray:
    """By -m to m pixels, m an eighth of the size."""
    (_, height, width), made = x.shape, np.zeros_like(x)
    rows, columns = (int(u * (2 * most + 1)) - most for u, most in ((down, height // 8), (right, width // 8)))
    for i in range(height):
        for j in range(width):
            if 0 <= i + rows < height and 0 <= j + columns < width:
                made[:, i, j] = x[:, i + rows, j + columns]
    return made


def cut(x: np.ndarray, down: float, right: float) -> np.ndarray:
    """A part of half the height and width, whose middle is any corner of pixels."""
    (_, height, width), made = x.shape, x.copy()
    top, left = (int(u * (size + 1)) - size // 2 // 2 for u, size in ((down, height), (right, width)))
    made[:, max(0, top) : top + height // 2, max(0, left) : left + width // 2] = 0
    return made


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_augmentations_by_hand_of_any_draw(size):
    """In every pixel, at random draws and at both ends of their range."""
    n = 12
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(n, 3, *size, generator=generator, dtype=F64) * 2 - 1
    u = torch.rand(n, DRAWS, generator=generator, dtype=F64)
    u[0], u[1] = 0.0, 1 - 2**-53
    for i, (x, one) in enumerate(zip(image.numpy(), u.tolist(), strict=True)):
        for kinds, expected in {
            ("color",): coloured(x, *one[:3]),
            ("translation",): translated(x, *one[3:5]),
            ("cutout",): cut(x, *one[5:]),
            ALL: cut(translated(coloured(x, *one[:3]), *one[3:5]), *one[5:]),
        }.items():
            # A few sums of at most 3 * 40^2 numbers of about 1.
            np.testing.assert_allclose(augment(image, kinds, u)[i].numpy(), expected, rtol=0, atol=1e-11)


def test_each_kind_of_augmentation_changes_the_images_that_are_chosen():
    generator = torch.Generator().manual_seed(0)
    image, u = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1, torch.rand(4, DRAWS, generator=generator)
    chosen = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    kinds = ("cutout", "color")  # in the order of `chosen`, not of their use
    made = augment(image, kinds, u, chosen)
    for i, own in enumerate(((), ("cutout",), ("color",), kinds)):
        assert torch.equal(made[i], augment(image, own, u)[i])


def test_the_probability_of_augmentation_follows_its_schedule():
    config = replace(DISCRIMINATOR, augment=ALL, augment_probability=Schedule(0.0, 1.0, 4))
    image = batch_of(64).image

    def shown(step: int, probability=config.augment_probability) -> torch.Tensor:
        game = vaegan(config=replace(config, augment_probability=probability)).adversaries["binary"]
        return game._augmented(batch_of(64, step=step), "real", image)

    assert torch.equal(shown(0), image)
    assert torch.equal(shown(9), shown(9, 1.0))
    same = (shown(2) == image).flatten(1).all(1).sum().item()
    assert 0 < same < 32, "of 64 at a half, 8 are expected: none of three kinds changes them"


def test_augmented_images_keep_their_precision():
    u = torch.rand(2, DRAWS, dtype=F64)
    assert augment(torch.rand(2, 1, 32, 32), ALL, u).dtype == torch.float32
    assert augment(torch.rand(2, 1, 32, 32, dtype=F64), ALL, u.float()).dtype == F64


@pytest.mark.parametrize("kind", ["logistic", "hinge", "least_squares", "relativistic"])
def test_only_a_relativistic_opponent_looks_at_real_images(kind):
    system, seen = vaegan(config=DiscriminatorConfig(adversarial=kind)), []
    system.discriminator_binary.register_forward_hook(lambda network, images, logits: seen.append(len(images[0])))
    system.loss(batch_of(), system.passes(batch_of()))
    assert seen == ([8, 4] if kind == "relativistic" else [8])


@pytest.mark.parametrize(
    ("settings", "decodings"),
    [
        ({}, 8),
        ({"encoder_adversarial": False}, 12),
        ({"samples": False}, 4),
        ({"encoder_adversarial": False, "samples": False}, 8),
    ],
)
def test_only_codes_whose_images_count_are_decoded(settings, decodings):
    """Four images' codes and as many samples, without the adversarial gradient in the encoder the codes once more."""
    system, decoded, shown = vaegan(**settings), [], []
    system.decoder.register_forward_hook(lambda network, codes, images: decoded.append(len(codes[0])))
    system.discriminator_binary.register_forward_hook(lambda network, images, logits: shown.append(len(images[0])))
    system.loss(batch_of(), system.passes(batch_of()))
    assert (decoded, shown) == ([decodings], [8 if settings.get("samples", True) else 4])


def test_every_kind_of_image_is_changed_by_draws_of_its_own_name():
    """The discriminator's real images, a feature's and a relativistic opponent's alike; a fake's as it sees them."""
    config = DiscriminatorConfig(augment=ALL, adversarial="relativistic", r1_weight=0.0)
    system = vaegan(config=config, reconstruction="features", kl_weight=0.0, adversarial_weight=0.0).double()
    batch, network = batch_of(dtype=F64), system.discriminator_binary
    game = system.adversaries["binary"]
    fakes = {"generated": torch.rand(4, 1, 32, 32, dtype=F64), "reconstructed": torch.rand(4, 1, 32, 32, dtype=F64)}

    def seen(kind: str, image: torch.Tensor) -> torch.Tensor:
        return augment(image, ALL, batch.uniform(f"augment discriminator_binary {kind}", (DRAWS,)))

    logits = {kind: network(seen(kind, image)) for kind, image in ({"real": batch.image} | fakes).items()}
    softplus = torch.nn.functional.softplus
    expected = sum(softplus(logits[kind] - logits["real"]).mean() / 2 for kind in fakes)
    torch.testing.assert_close(game.discriminator_loss(batch, batch.image, fakes).value, expected)
    expected = sum(softplus(logits["real"] - logits[kind]).mean() / 2 for kind in fakes)
    torch.testing.assert_close(game.generator_loss(batch, batch.image, fakes), expected)
    real, fake = (network(seen("real", image), feature_layer=2) for image in (batch.image, fakes["generated"]))
    passes = system.passes(batch)._replace(reconstructed=fakes["generated"])
    torch.testing.assert_close(system.loss(batch, passes).value, 0.5 * (real - fake).square().flatten(1).sum(1).mean())


@pytest.mark.parametrize(
    "name",
    [
        "ae",
        "vae",
        "ganvae",
        "both, both, classes",
        "hinge, lecam, spectral, classes",
        "adaptive, scheduled",
        "cyclegan",
    ],
)
def test_no_loss_is_computed_in_half_precision(name):
    system = SYSTEMS[name]()
    for player in system.players():
        freeze_all_but(system, player.networks)
        with torch.autocast("cpu", torch.bfloat16):
            passes = system.passes(batch_of())
            loss, terms, statistics, *_ = player.loss(batch_of(), passes)
        assert loss.dtype == torch.float32
        assert {term.dtype for term in terms.values()} == {torch.float32}
        assert all(value.dtype != torch.bfloat16 for value in statistics.values())


def test_a_discriminators_loss_reaches_no_generator():
    """Its images are cut off from what made them, also where a penalty needs their gradients."""
    for system in (
        GAN(32, 1, 4, SMALL, binary=DiscriminatorConfig(r2_weight=0.1)),
        cyclegan(DiscriminatorConfig(r1_weight=0.0), pool=3),
    ):
        system.players()[0].loss(batch_of(), system.passes(batch_of())).value.backward()
        moved = {name.partition(".")[0] for name, value in system.named_parameters() if value.grad is not None}
        assert moved == set(system.players()[0].networks)
        assert all(not image.requires_grad for image in batch_of().images)


def test_no_penalty_is_computed_while_its_weight_is_zero():
    batch = batch_of()
    for first, second in ((0.0, 0.5), (0.5, 0.0), (0.0, 0.0)):
        system = GAN(32, 1, 4, SMALL, binary=DiscriminatorConfig(r1_weight=first, r2_weight=second))
        _, terms, statistics, *_ = system.discriminator_loss(batch, system.passes(batch))
        assert {"r1", "r2"} & set(terms) == {name for name, weight in (("r1", first), ("r2", second)) if weight}
        assert statistics == {}


@pytest.mark.parametrize("mode", ["binary", "ternary"])
def test_verdicts_are_logged_with_the_chance_level(mode):
    """A relativistic binary one compares with the real image beside; a ternary one names three classes all the same."""
    for kind in ("logistic", "relativistic"):
        system = vaegan(mode, config=DiscriminatorConfig(adversarial=kind, r1_weight=0.0))
        _, terms, *_ = system.players()[0].loss(batch_of(), system.passes(batch_of()))
        game = system.adversaries[mode]
        assert terms["chance"].item() == pytest.approx(game.chance)
        accuracies = {"accuracy/real", "accuracy/reconstructed", "accuracy/generated"}
        if mode == "binary" and kind == "relativistic":
            accuracies.remove("accuracy/real")
        named = {name for name in terms if name.startswith("named/")}
        assert set(terms) - named == {"discriminator_loss", "chance"} | accuracies
        assert len(named) == (9 if mode == "ternary" else 0)


def test_the_chance_level_is_that_of_the_class_weights():
    """The entropy of shares of a half and twice a quarter."""
    system = vaegan("ternary", class_weights=(2.0, 1.0, 1.0))
    _, terms, *_ = system.players()[0].loss(batch_of(), system.passes(batch_of()))
    assert terms["chance"].item() == pytest.approx(1.5 * np.log(2))


def test_spectral_norm_and_lecam_alone_need_work_after_a_move():
    plain = DiscriminatorConfig()
    for config, there in (
        (plain, False),
        (replace(plain, lecam_weight=0.1), True),
        (replace(plain, spectral_norm=True), True),
    ):
        assert (vaegan(config=config).players()[0].after is not None) == there


def test_verdicts_at_the_boundary_are_fake():
    """A logit of 0, and a fake that has as much realness as the real image beside it, do not count as recognised."""
    edge, fakes = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [-1.0]])
    shares = losses.confusion({"real": edge, "reconstructed": fakes, "generated": fakes})
    assert shares == {"accuracy/real": 0.5, "accuracy/reconstructed": 1, "accuracy/generated": 1}
    beside = losses.confusion({"real": edge, "reconstructed": fakes, "generated": edge}, relativistic=True)
    assert beside == {"accuracy/reconstructed": 0.5, "accuracy/generated": 0}


OF_EVERY_SYSTEM = {
    "gan": (lambda config: GAN(32, 1, 4, SMALL, binary=config), ("generated",)),
    "ganvae": (lambda config: GANVAE(32, 1, 4, SMALL, binary=config), ("generated",)),
    "binary": (lambda config: vaegan(config=config), ("reconstructed", "generated")),
    "ternary": (lambda config: vaegan("ternary", config=config), ("reconstructed", "generated")),
    "cyclegan": (lambda config: cyclegan(config, pool=0), ("generated",)),
}


@pytest.mark.parametrize("name", OF_EVERY_SYSTEM)
def test_every_systems_discriminators_are_made_and_shown_images_as_set(name, monkeypatch):
    build, fakes = OF_EVERY_SYSTEM[name]
    drawn = []
    uniform = Batch.uniform
    monkeypatch.setattr(Batch, "uniform", lambda self, *what: drawn.append(what) or uniform(self, *what))
    config = DiscriminatorConfig(augment=("color",), spectral_norm=True, minibatch_stddev=2, r1_weight=0.0)
    system, plain = build(config), build(replace(config, spectral_norm=False, minibatch_stddev=0))
    assert ({*system.groups.values()}, plain.groups) == ({2}, {})
    passes = system.passes(batch_of())
    for player in system.players():
        player.loss(batch_of(), passes)
    expected = set()
    for network, module in system.named_children():
        if network.startswith("discriminator"):
            own = plain.get_submodule(network)
            assert (module.group, own.group) == (2, 0)
            assert isinstance(module.head.weight, torch.Tensor)
            assert (hasattr(module.head, "parametrizations"), hasattr(own.head, "parametrizations")) == (True, False)
            assert module(batch_of().image).shape[:2] == (4, 3 if name == "ternary" else 1)
            expected |= {(f"augment {network} {kind}", (DRAWS,)) for kind in ("real", *fakes)}
    assert set(drawn) == expected


@pytest.mark.parametrize("group", [0, 2])
def test_a_classs_projection_by_hand(group):
    """Each logit gets <v, h>, h the last level's activations summed over positions, whatever else the head sees."""
    network = Discriminator(SMALL, (32, 48), 1, 3, group=group, classes=5).double()
    image, label = torch.rand(4, 1, 32, 48, dtype=F64), torch.tensor([4, 0, 3, 3])
    hidden = network(image, feature_layer=len(network.levels) - 1).detach().numpy()
    weights = network.projection.weight.detach().numpy().reshape(3, -1, 5)  # of a logit, a channel and a class
    expected = [
        [(weights[k, :, y] * h.sum((1, 2))).sum() for k in range(3)] for h, y in zip(hidden, label, strict=True)
    ]
    found = network(image, label)
    with torch.no_grad():
        network.projection.weight.zero_()
    torch.testing.assert_close(found - network(image, label), torch.tensor(expected, dtype=F64))


def test_every_image_has_the_label_of_its_position():
    """A fake's label is that of the real image at its position, of reconstructions and samples alike."""
    system = vaegan("ternary", classes=3, networks=SMALL).double()
    batch, seen = batch_of(dtype=F64), []
    system.decoder.register_forward_hook(lambda _, given, made: seen.append(given))
    system.discriminator_ternary.register_forward_hook(lambda _, given, made: seen.append(given))
    passes = system.passes(batch)
    system.discriminator_loss("ternary", batch, passes)
    (z, decoded), (_, real), (_, fakes) = seen  # with a penalty, in passes of their own
    assert torch.equal(z[:4], passes.z)
    assert torch.equal(real, batch.label)
    assert torch.equal(decoded, batch.label.repeat(2))
    assert torch.equal(fakes, batch.label.repeat(2))
    assert [part.label.tolist() for part in batch.split(2)] == [*map(list, batch.label.view(2, 2).tolist())]
