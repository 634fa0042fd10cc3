"""Settings of systems and optimizers: each is refused out of its range, by its name, and accepted at its bounds."""

import pytest
import torch
from systems_under_test import SMALL, cyclegan, vaegan
from torch import nn

from models import (
    AE,
    GAN,
    GANVAE,
    VAE,
    VAEGAN,
    CodesConfig,
    CycleGAN,
    DiscriminatorConfig,
    NetworkConfig,
    OptimizerConfig,
)
from models.schedule import Schedule

NOT_NEGATIVE = {
    "vae": (lambda **one: VAE(32, 1, 4, SMALL, **one), ("kl_weight", "kl_warmup", "free_bits")),
    "ganvae": (lambda **one: GANVAE(32, 1, 4, SMALL, **one), ("latent_weight",)),
    "vaegan": (
        lambda **one: vaegan(**one),
        *[("reconstruction_weight", "perceptual_weight", "kl_weight", "kl_warmup", "free_bits", "adversarial_weight")],
    ),
    "cyclegan": (lambda **one: cyclegan(**one), ("cycle_weight", "identity_weight", "pool")),
}
PATCHES = NetworkConfig("dcgan", 8, "group", patches=True)
DINO = DiscriminatorConfig(r1_weight=0.0, dino_weights="")  # as of a system that is only used: no file is read
DISCRIMINATORS = (
    "start",
    "ramp",
    "r1_weight",
    "r2_weight",
    "lecam_weight",
    "minibatch_stddev",
    "weight_decay",
    "warmup",
)


@pytest.mark.parametrize(
    ("system", "name"), [(key, name) for key, (_, names) in NOT_NEGATIVE.items() for name in names]
)
def test_weights_below_zero_are_refused(system, name):
    with pytest.raises(ValueError, match=rf"^system\.{name} is -0\.5, expected 0 or more$"):
        NOT_NEGATIVE[system][0](**{name: -0.5})


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_weights_of_a_discriminator_below_zero_are_refused(name):
    with pytest.raises(ValueError, match=rf"^system\.binary\.{name} is -0\.5, expected 0 or more$"):
        GANVAE(32, 1, 4, SMALL, binary=DiscriminatorConfig(**{name: -0.5}))


@pytest.mark.parametrize(
    ("name", "build"),
    [
        *[("latent_dim", lambda kind=kind: kind(32, 1, 0, SMALL)) for kind in (AE, VAE, GAN, GANVAE)],
        ("latent_dim", lambda: VAEGAN(32, 1, 0, SMALL)),
        ("adaptive_limit", lambda: vaegan(adaptive=True, adaptive_limit=0)),
        *[
            (f"binary.{name}", lambda build=build, name=name: build(DiscriminatorConfig(**{name: 0})))
            for build in (
                cyclegan,
                lambda config: GANVAE(32, 1, 4, SMALL, binary=config),
                lambda config: vaegan(config=config),
            )
            for name in ("every", "penalty_every")
        ],
        ("ternary.every", lambda: vaegan("both", ternary=DiscriminatorConfig(every=0))),
        ("width", lambda: CycleGAN(32, 1, 0, 4)),
        ("discriminator_width", lambda: CycleGAN(32, 1, 4, 0)),
        ("blocks", lambda: CycleGAN(32, 1, 4, blocks=0)),
        *[
            (f"binary.{name}", lambda name=name: GAN(32, 1, binary=DiscriminatorConfig(**{name: 0})))
            for name in ("every", "lr")
        ],
        ("binary.penalty_every", lambda: GAN(32, 1, binary=DiscriminatorConfig(penalty_every=0))),
        ("generator.lr", lambda: GAN(32, 1, 4, SMALL, OptimizerConfig(0)).players()),
    ],
)
def test_what_must_be_above_zero_is_refused_at_zero(name, build):
    with pytest.raises(ValueError, match=rf"^system\.{name} is 0, expected more than 0$"):
        build()


@pytest.mark.parametrize(
    ("words", "build"),
    [
        ("lecam_decay is -0.1", lambda: GAN(32, 1, binary=DiscriminatorConfig(lecam_weight=1.0, lecam_decay=-0.1))),
        (
            r"^system\.binary\.lecam_decay has no effect while system\.binary\.lecam_weight is 0: leave it unset$",
            lambda: GAN(32, 1, binary=DiscriminatorConfig(lecam_decay=0.5)),
        ),
        ("betas is", lambda: GAN(32, 1, 4, SMALL, OptimizerConfig(betas=(0.5, 1.0))).players()),
        ("betas is", lambda: GAN(32, 1, 4, SMALL, OptimizerConfig(betas=(-0.1, 0.5))).players()),
        (
            "hold is -0.1",
            lambda: GAN(32, 1, 4, SMALL, OptimizerConfig(schedule="linear", hold=-0.1)).players(),
        ),
        (
            "final is -0.1",
            lambda: GAN(32, 1, 4, SMALL, OptimizerConfig(schedule="linear", final=-0.1)).players(),
        ),
        (
            "final is 1.1",
            lambda: GAN(32, 1, 4, SMALL, OptimizerConfig(schedule="linear", final=1.1)).players(),
        ),
        ("final has no effect", lambda: GAN(32, 1, 4, SMALL, OptimizerConfig(final=0.1)).players()),
        *[
            (rf"^system\.binary\.{words}", lambda given=given: GAN(32, 1, binary=DiscriminatorConfig(**given)))
            for words, given in {
                "r1_weight.start is -1, expected 0 or more": {"r1_weight": Schedule(-1, 1, 3)},
                "r2_weight.end is -1, expected 0 or more": {"r2_weight": Schedule(1, -1, 3)},
                "r1_weight.end is 1, expected another number": {"r1_weight": Schedule(1, 1, 3)},
                "r1_weight.steps is 0, expected more than 0": {"r1_weight": Schedule(1, 2, 0)},
                "lr.end is 0, expected more than 0": {"lr": Schedule(1, 0, 3)},
                "betas.end is 1, expected a number in": {"betas": (0.0, Schedule(0.9, 1, 3))},
                "augment_probability.end is 2, expected": {"augment_probability": Schedule(0, 2, 3)},
                "augment_probability has no effect while": {"augment_probability": 0.5},
            }.items()
        ],
        ("ramp has no effect in a GAN", lambda: GAN(32, 1, binary=DiscriminatorConfig(ramp=1))),
        ("counts_from has no effect in a GAN", lambda: GAN(32, 1, binary=DiscriminatorConfig(counts_from=0))),
        (
            r"^system\.ternary\.counts_from is 2, expected 3 or more, as system\.ternary\.start is 3, or null",
            lambda: vaegan("ternary", config=DiscriminatorConfig(start=3, counts_from=2)),
        ),
        ("expected 0 to 2", lambda: vaegan(reconstruction="features", feature_layer=-1)),
        ("feature_discriminator has no effect", lambda: vaegan(feature_discriminator="binary")),
        (
            "opponent is not_own",
            lambda: vaegan("both", opponent="not_own", config=DiscriminatorConfig(adversarial="least_squares")),
        ),
        ("class_weights is", lambda: vaegan("ternary", class_weights=(-1.0, 1.0, 1.0))),
        (
            "binary has no effect while system.discriminator is ternary",
            lambda: vaegan("ternary", binary=DiscriminatorConfig()),
        ),
        *[
            (
                r"^system.networks.width is 28, expected a number such as a multiple of 8",
                lambda networks=networks: VAE(32, 1, 4, networks),
            )
            for networks in (NetworkConfig(width=28), NetworkConfig("dcgan", 28, "group"))
        ],
        ("discriminator_levels is 3, expected fewer, as images of 16", lambda: CycleGAN(16, 1, discriminator_levels=3)),
        *[
            (
                "^system.networks.patches has no effect while every discriminator has dino_weights",
                lambda kind=kind: kind(64, 1, 4, PATCHES, binary=DINO),
            )
            for kind in (GAN, GANVAE, VAEGAN)
        ],
        *[
            (f"{name} has no effect while system.binary.dino_weights", lambda name=name: cyclegan(DINO, **{name: 1}))
            for name in ("discriminator_levels", "discriminator_width")
        ],
        ("perceptual_weight is 0.0", lambda: vaegan(perceptual_weights="vgg16.pth")),
        ("codes.noise is -1, expected 0 or more", lambda: vaegan(codes=CodesConfig(noise=-1))),
        *[
            (
                rf"networks.latent_stride is null, expected .* while system.codes.{name} is 0.5",
                lambda name=name: VAE(32, 1, 4, SMALL, codes=CodesConfig(**{name: 0.5})),
            )
            for name in ("equivariance", "scale_equivariance")
        ],
    ],
)
def test_what_is_out_of_its_range_is_refused(words, build):
    with pytest.raises(ValueError, match=words):
        build()


def test_a_width_that_only_a_norm_could_not_divide_is_accepted():
    """34 channels are not divided by 4 groups, but the 68 hidden ones of a residual block are."""
    VAE(32, 1, 4, NetworkConfig(width=34))
    with pytest.raises(ValueError, match=r"^system\.networks\.width is 34, expected a number such as a multiple of 8"):
        VAE(32, 1, 4, NetworkConfig(width=34, norm="group"))


@pytest.mark.parametrize(
    ("name", "reason", "build"),
    [
        ("adaptive", "adversarial_weight is 0", lambda: vaegan(adaptive=True, adversarial_weight=0)),
        (
            *("encoder_adversarial", "adversarial_weight is 0"),
            lambda: vaegan(encoder_adversarial=False, adversarial_weight=0),
        ),
        (
            *("likelihood", "reconstruction_weight is 0"),
            lambda: vaegan(likelihood="laplace", reconstruction_weight=0),
        ),
        ("adaptive_limit", "adaptive is off", lambda: vaegan(adaptive_limit=3)),
        ("likelihood", "reconstruction is features", lambda: vaegan(reconstruction="features", likelihood="laplace")),
        ("perceptual", "perceptual_weight is 0", lambda: vaegan(perceptual="convnext")),
        ("opponent", "discriminator is binary", lambda: vaegan(opponent="not_own")),
        ("class_weights", "discriminator is binary", lambda: vaegan(class_weights=(1, 2, 1))),
        ("kl_warmup", "kl_weight is 0", lambda: vaegan(kl_weight=0, kl_warmup=9)),
        ("free_bits", "kl_weight is 0", lambda: VAE(32, 1, kl_weight=0, free_bits=0.1)),
    ],
)
def test_the_reason_why_a_setting_has_no_effect_is_named(name, reason, build):
    with pytest.raises(ValueError, match=rf"^system\.{name} has no effect while system\.{reason}: leave it unset$"):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: OptimizerConfig(1e-9, (0.0, 0.0), 0.0, 1e-9, "adam", "linear", 0, 0.0, 1.0).check("player"),
        lambda: OptimizerConfig(schedule="cosine", hold=0.999).check("player"),
        lambda: DiscriminatorConfig(lecam_weight=0.1, lecam_decay=0.0).check("binary"),
        lambda: DiscriminatorConfig(r1_weight=0.0, r2_weight=0.1, penalty_every=2).check("binary"),
        lambda: DiscriminatorConfig(r1_weight=0.0, lecam_weight=0.1, lecam_decay=0.5).check("binary"),
        lambda: DiscriminatorConfig(start=1, counts_from=1, ramp=1, minibatch_stddev=2).check("binary"),
        lambda: GAN(32, 1, 1, SMALL, binary=DiscriminatorConfig(every=2)),
        lambda: GANVAE(32, 1, 1, SMALL, latent_weight=0.0),
        lambda: VAE(32, 1, 1, SMALL, kl_weight=0.0),
        lambda: VAE(32, 1, 1, SMALL, kl_warmup=1, free_bits=0.1),
        lambda: VAE(32, 1, 1, SMALL, "laplace", learned_scale=True),
        lambda: vaegan(reconstruction_weight=0.0, kl_weight=0.0, adversarial_weight=0.0),
        lambda: vaegan(adaptive=True, adaptive_limit=1e-9),
        lambda: vaegan(reconstruction="features", feature_layer=0),
        lambda: vaegan(reconstruction="features", feature_layer=2),
        lambda: vaegan(reconstruction="both", likelihood="laplace", feature_discriminator="binary"),
        lambda: vaegan("ternary", class_weights=(1e-9, 1.0, 1.0)),
        lambda: vaegan("ternary", config=DiscriminatorConfig(adversarial="hinge")),
        lambda: CycleGAN(32, 1, 1, 1, 1, 1, 0.0, 0.0, 0),
        lambda: CycleGAN(32, 1, 1, blocks=64, pool=0),
    ],
)
def test_settings_at_their_bounds_are_accepted(build):
    build()


def test_micro_batches_hold_whole_groups_of_every_discriminator():
    configs = {"binary": DiscriminatorConfig(minibatch_stddev=4), "ternary": DiscriminatorConfig(minibatch_stddev=6)}
    assert vaegan("both", **configs).groups == {
        "system.binary.minibatch_stddev": 4,
        "system.ternary.minibatch_stddev": 6,
    }
    assert vaegan("both").groups == {}


def test_a_cyclegans_size_decides_what_is_unset():
    small, large = CycleGAN(64, 1, 4), CycleGAN(256, 1, 4, 2)
    assert [len(list(system.translator_ab.named_modules())) for system in (small, large)] == [
        len(list(CycleGAN(64, 1, 4, blocks=blocks).translator_ab.named_modules())) for blocks in (6, 9)
    ]
    assert small.discriminator_a.levels[0][0].out_channels == 4, "the translators' width"
    assert large.discriminator_a.levels[0][0].out_channels == 2


@pytest.mark.parametrize(("levels", "pixels"), [(1, 16), (2, 34), (None, 34)])
def test_a_cyclegans_discriminators_classify_patches_by_instance_normalized_features(levels, pixels):
    """34 pixels where nothing is set, at 128."""
    system = CycleGAN(128, 1, 2, 3, levels, 1)
    for network in (system.discriminator_a, system.discriminator_b):
        image = torch.rand(1, 1, 128, 128, requires_grad=True)
        normalized = [module for module in network.modules() if isinstance(module, nn.InstanceNorm2d)]
        assert len(normalized) == len(network.levels) - 1
        assert network.levels[0][0].out_channels == 3
        for module in normalized:  # whose statistics are the whole image's
            module.forward = lambda features: features
        logits = network(image)
        assert logits.shape[:2] == (1, 1)
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
        assert (image.grad[0, 0].abs().sum(0) > 0).sum() == pixels


def test_a_code_may_be_a_map():
    settings = NetworkConfig("dcgan", 8, latent_stride=8)
    for kind in (AE, VAE, GAN, GANVAE, VAEGAN):
        system = kind(32, 1, 3, settings)
        assert system.latent_shape == (3, 4, 4)


def test_by_default_a_cyclegan_is_the_papers():
    """Zhu et al. 2017, sections 4 and 7.2: lambda is 10, identity half of it, and rates fall in the second half."""
    system = CycleGAN(256, 3)
    assert (system.cycle_weight, system.identity_weight, system.pool.size) == (10, 5, 50)
    assert system.by_position == ("pool_a", "pool_b", "pooled")
    for rows, batch_size, slots in ((slice(0, 1), 1, 50), (slice(2, 3), 4, 13), (slice(63, 64), 64, 1)):
        system.hold(rows, batch_size)
        assert system.pool_a.shape == system.pool_b.shape == (1, slots, 3, 256, 256)
    assert list(system.networks()) == ["discriminator_a", "discriminator_b", "translator_ab", "translator_ba"]
    config, translators = (player.optimizer for player in system.players())
    assert translators == OptimizerConfig(2e-4, (0.5, 0.999), schedule="linear", hold=0.5)
    assert config == DiscriminatorConfig(
        2e-4, (0.5, 0.999), schedule="linear", hold=0.5, adversarial="least_squares", r1_weight=0.0
    )
    widths = {system.discriminator_a.levels[0][0].out_channels, system.discriminator_b.levels[0][0].out_channels}
    assert widths == {64}
    assert next(system.translator_ab.parameters()).shape[0] == 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": 1}, r"classes is 1, expected 0 \(none\) or 2 or more"),
        ({"networks": NetworkConfig("dcgan", 8, latent_stride=8)}, r"classes is 3, expected 0 while codes are maps"),
        ({"networks": NetworkConfig("dcgan", 8, patches=True)}, r"networks\.patches is true, expected false while sys"),
        ({"config": DiscriminatorConfig(r1_weight=0.0, dino_weights="x")}, r"binary\.dino_weights is x, expected null"),
    ],
)
def test_what_cannot_be_told_classes_is_refused(settings, words):
    with pytest.raises(ValueError, match=rf"^system\.{words}"):
        vaegan(**{"classes": 3} | settings)
