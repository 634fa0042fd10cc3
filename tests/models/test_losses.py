"""Closed forms of every loss."""

import math

import pytest
import torch
from systems_under_test import vit_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence

from models import DiscriminatorConfig, OptimizerConfig, losses
from models.augment import DRAWS, augment
from models.networks.blocks import minibatch_stddev
from trainer.batch import Batch

F64 = torch.float64


def test_gaussian_kl_is_that_of_torch_distributions():
    mean, log_variance = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert losses.gaussian_kl(mean, log_variance) == pytest.approx(expected.item(), rel=1e-12)


def test_gaussian_kl_by_hand():
    m, s = 2.0, 0.5
    kl = losses.gaussian_kl(torch.full((1, 1), m, dtype=F64), torch.full((1, 1), 2 * math.log(s), dtype=F64))
    assert kl.item() == pytest.approx(0.5 * (m**2 + s**2 - 1) - math.log(s), rel=1e-12)


def test_gaussian_kl_goes_on_as_its_tangent_where_a_young_encoder_strays():
    log_variance = torch.tensor([[3.9], [4.1], [20.0]], dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(losses.gaussian_kl(torch.zeros_like(log_variance), log_variance), log_variance)
    assert (3 * 2 * slope.flatten() + 1).tolist() == pytest.approx([math.exp(x) for x in (3.9, 4.0, 4.0)])
    expected = 0.5 * (math.exp(4) * (1 + 16) - 1 - 20)
    assert losses.gaussian_kl(torch.zeros(1, 1), torch.full((1, 1), 20.0)) == pytest.approx(expected)


def test_gaussian_kl_is_zero_at_the_prior():
    assert losses.gaussian_kl(torch.zeros(4, 2), torch.zeros(4, 2)) == 0


def test_reparameterize_has_the_posteriors_moments():
    noise = torch.randn(200_000, 1, dtype=F64)
    z = losses.reparameterize(torch.tensor([[3.0]], dtype=F64), torch.tensor([[2 * math.log(0.5)]], dtype=F64), noise)
    assert z.mean().item() == pytest.approx(3, abs=0.01)
    assert z.std().item() == pytest.approx(0.5, abs=0.01)


def test_squared_error_is_a_gaussians_log_likelihood():
    x, mean = torch.randn(6, 2, 3, 3, dtype=F64), torch.randn(6, 2, 3, 3, dtype=F64)
    log_likelihood = Normal(mean, 1.0).log_prob(x).flatten(1).sum(1).mean()
    constant = 18 / 2 * math.log(2 * math.pi)
    assert losses.likelihood("gaussian", x, mean).item() == pytest.approx(-log_likelihood.item() - constant, rel=1e-12)


KINDS = ["logistic", "hinge", "least_squares", "relativistic"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", losses.LOGITS)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_chance_is_the_least_loss_of_a_blind_discriminator(mode, kind, weights):
    """Found by descent over the logits that all images get."""
    blind = torch.full((1, losses.LOGITS[mode]), 0.1, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([blind], 0.1)
    least = math.inf
    for _ in range(100):
        optimizer.zero_grad()
        loss = losses.discriminator_loss(blind, blind, blind, kind=kind, class_weights=weights)
        loss.backward()
        optimizer.step()
        least = min(least, loss.item())
    assert least == pytest.approx(losses.chance(mode, kind, weights), abs=2e-2 if kind == "hinge" else 1e-4)
    if kind == "logistic" and weights == (1, 1, 1):
        assert losses.chance(mode) == pytest.approx(math.log({1: 2, 3: 3}[losses.LOGITS[mode]]))


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_losses_by_hand(kind):
    real, fake = torch.tensor([[0.3], [-2.0]], dtype=F64), torch.tensor([[1.5], [0.2]], dtype=F64)
    s, f = real[:, 0], fake[:, 0]
    discriminator_loss, generator_loss = {
        "logistic": (-(s.sigmoid().log() + (1 - f.sigmoid()).log()) / 2, -f.sigmoid().log()),
        "hinge": (((1 - s).clamp(min=0) + (1 + f).clamp(min=0)) / 2, -f),
        "least_squares": ((((s + 1) / 2 - 1) ** 2 + ((f + 1) / 2) ** 2) / 2, ((f + 1) / 2 - 1) ** 2),
        "relativistic": (-(s - f).sigmoid().log(), -(f - s).sigmoid().log()),
    }[kind]
    assert losses.discriminator_loss(real, fake, kind=kind).item() == pytest.approx(
        discriminator_loss.mean().item(), rel=1e-12
    )
    assert losses.generator_loss(fake, kind, real).item() == pytest.approx(generator_loss.mean().item(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_another_loss_replaces_the_realness_part_of_the_ternary_discriminator_only(kind):
    logits = [torch.randn(5, 3, dtype=F64) for _ in range(3)]
    s = [losses.realness(x) for x in logits]
    apart = -sum((logits[i][:, i] - logits[i][:, 1:].logsumexp(1)).mean() for i in (1, 2))  # -log p(own | it is a fake)
    if kind == "relativistic":
        part = sum(torch.nn.functional.softplus(s[i] - s[0]).mean() for i in (1, 2)) / 2
    else:
        part = (
            losses.loss_on_real(kind, s[0]).mean() + sum(losses.loss_on_real(kind, -s[i]).mean() for i in (1, 2))
        ) / 3
    assert losses.discriminator_loss(*logits, kind=kind).item() == pytest.approx((part + apart / 3).item(), rel=1e-12)


def test_class_weights_weigh_the_cross_entropy():
    logits, weights = [torch.randn(5, 3, dtype=F64) for _ in range(3)], (3.0, 0.5, 1.5)
    entropy = [torch.nn.functional.cross_entropy(part, torch.full((5,), i)) for i, part in enumerate(logits)]
    expected = sum(w * e for w, e in zip(weights, entropy, strict=True)) / 5
    assert losses.discriminator_loss(*logits, class_weights=weights).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("own", [1, 2])
def test_not_own_is_minus_log_of_the_other_classes(own):
    logits = torch.randn(7, 3, dtype=F64)
    expected = -(1 - logits.softmax(1)[:, own]).log().mean()
    assert losses.not_own(logits, own).item() == pytest.approx(expected.item(), rel=1e-12)


def test_likelihoods_are_those_of_torch_distributions():
    x, y = torch.rand(6, 1, 3, 3, dtype=F64) * 2 - 1, torch.rand(6, 1, 3, 3, dtype=F64) * 1.8 - 0.9
    log_scale = torch.tensor(-0.7, dtype=F64)
    for kind, of, constant in (
        ("gaussian", torch.distributions.Normal, math.log(2 * math.pi) / 2),
        ("laplace", torch.distributions.Laplace, math.log(2)),
    ):
        expected = -of(y, log_scale.exp()).log_prob(x).flatten(1).sum(1).mean() - 9 * constant
        assert losses.likelihood(kind, x, y, log_scale).item() == pytest.approx(expected.item(), rel=1e-12)
        plain = -of(y, 1.0).log_prob(x).flatten(1).sum(1).mean() - 9 * constant
        assert losses.likelihood(kind, x, y).item() == pytest.approx(plain.item(), rel=1e-12)
    pixels = torch.tensor([[-1.0, 1.0, 1.0]])
    expected = -torch.distributions.Bernoulli((y + 1) / 2).log_prob(torch.ones_like(y)).flatten(1).sum(1).mean()
    assert losses.likelihood("bernoulli", torch.ones_like(y), y).item() == pytest.approx(expected.item(), rel=1e-12)
    assert losses.likelihood("bernoulli", pixels, pixels).isfinite()


def test_free_bits_cost_what_they_grant_and_stop_the_gradient_below():
    mean = torch.tensor([[0.1, 3.0]], dtype=F64, requires_grad=True)
    kl = losses.gaussian_kl(mean, torch.zeros(1, 2, dtype=F64), free_bits=0.5)
    assert kl.item() == pytest.approx(0.5 + 4.5)
    kl.backward()
    assert mean.grad.tolist() == [[0.0, 3.0]]


def test_gaussian_likelihood_is_that_of_torch_distributions():
    z, mean, log_variance = (torch.randn(5, 3, dtype=F64) for _ in range(3))
    expected = -Normal(mean, (0.5 * log_variance).exp()).log_prob(z).sum(1).mean()
    assert losses.gaussian_likelihood(z, mean, log_variance).item() == pytest.approx(expected.item(), rel=1e-12)


def test_lecam_by_hand():
    real, fake, means = torch.tensor([2.0, 0.0]), torch.tensor([1.0, -1.0]), torch.tensor([0.5, -0.5])
    assert losses.lecam(real, fake, *means).item() == pytest.approx((2.5**2 + 0.5**2) / 2 + (0 + 1.5**2) / 2)


def test_adaptive_weight_is_the_ratio_of_norms_within_its_limit():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert losses.adaptive_weight(a, b, 100).item() == pytest.approx(5 / (0.5 + 1e-4))
    assert losses.adaptive_weight(a, b, 2) == 2
    assert losses.adaptive_weight(a, torch.zeros(2), 100) == 100


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_adaptive_weight_of_a_gradient_that_is_not_finite_is_none(broken):
    sound, unsound = torch.tensor([3.0, 4.0]), torch.tensor([3.0, broken])
    assert losses.adaptive_weight(unsound, sound, 100).isnan(), "and not the limit"
    assert losses.adaptive_weight(sound, unsound, 100).isnan(), "and not 0"


def test_ternary_discriminator_is_the_mean_cross_entropy():
    logits = [torch.randn(5, 3, dtype=F64) for _ in range(3)]
    expected = sum(torch.nn.functional.cross_entropy(part, torch.full((5,), i)) for i, part in enumerate(logits)) / 3
    assert losses.discriminator_loss(*logits).item() == pytest.approx(expected.item(), rel=1e-12)


def test_binary_discriminator_shows_real_and_fake_by_halves():
    real, reconstructed, generated = (torch.randn(5, 1, dtype=F64) for _ in range(3))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    fake = (bce(reconstructed, torch.zeros_like(real)) + bce(generated, torch.zeros_like(real))) / 2
    expected = (bce(real, torch.ones_like(real)) + fake) / 2
    assert losses.discriminator_loss(real, reconstructed, generated).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
def test_realness_and_generator_loss_are_p_real(outputs):
    logits = torch.randn(7, outputs, dtype=F64)
    p_real = logits[:, 0].sigmoid() if outputs == 1 else logits.softmax(1)[:, 0]
    torch.testing.assert_close(losses.realness(logits).sigmoid(), p_real)
    assert losses.generator_loss(logits).item() == pytest.approx(-p_real.log().mean().item(), rel=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_generator_loss_raises_realness(outputs):
    logits = torch.randn(7, outputs, dtype=F64, requires_grad=True)
    losses.generator_loss(logits).backward()
    assert (losses.realness(logits - 0.1 * logits.grad) > losses.realness(logits)).all()


def test_penalty_of_a_quadratic():
    x = torch.randn(6, 1, 2, 2, dtype=F64, requires_grad=True)
    logits = x.square().flatten(1).sum(1, keepdim=True)  # its gradient is 2 x
    expected = 0.5 * (4 * x.square()).flatten(1).sum(1).mean()
    assert losses.gradient_penalty(x, logits).item() == pytest.approx(expected.item(), rel=1e-12)


def test_penalty_of_patches_is_that_of_their_mean():
    x = torch.randn(6, 1, 2, 2, dtype=F64, requires_grad=True)
    expected = 0.5 * (x / 2).square().flatten(1).sum(1).mean()  # the gradient of the mean of x^2 is 2 x / 4
    assert losses.gradient_penalty(x, x.square()).item() == pytest.approx(expected.item(), rel=1e-12)


def test_confusion_counts_each_kind():
    sure = torch.eye(3) * 9
    shares = losses.confusion({"real": sure[[0, 0]], "reconstructed": sure[[1, 2]], "generated": sure[[0, 0]]})
    assert {name: value.item() for name, value in shares.items() if value} == {
        "accuracy/real": 1,
        "named/real/real": 1,
        "accuracy/reconstructed": 0.5,
        "named/reconstructed/reconstructed": 0.5,
        "named/reconstructed/generated": 0.5,
        "named/generated/real": 1,
    }
    yes, no = torch.ones(2, 1), -torch.ones(2, 1)
    binary = losses.confusion({"real": yes, "reconstructed": no, "generated": yes})
    assert binary == {"accuracy/real": 1, "accuracy/reconstructed": 1, "accuracy/generated": 0}


def test_relativistic_verdicts_are_beside_the_real_image():
    real, fake = torch.tensor([[5.0], [5.0]]), torch.tensor([[4.0], [6.0]])
    assert losses.confusion({"real": real, "generated": fake}, relativistic=True) == {"accuracy/generated": 0.5}


@pytest.mark.parametrize("kinds", [(), ("color",), ("translation",), ("cutout",), ("color", "translation", "cutout")])
def test_augmentations_are_differentiable_and_a_function_of_their_draws(kinds):
    image = (torch.rand(4, 3, 32, 32, dtype=F64) - 0.5).requires_grad_()
    u = torch.rand(4, DRAWS)
    changed = augment(image, kinds, u)
    assert changed.shape == image.shape
    assert torch.equal(changed, augment(image, kinds, u))
    torch.testing.assert_close(changed[2:], augment(image[2:], kinds, u[2:]))  # each image has its own
    assert torch.equal(changed, image) == (not kinds)
    (gradient,) = torch.autograd.grad(changed.square().sum(), image)
    assert gradient.abs().sum() > 0


def test_augmentations_treat_half_precision_as_full():
    image, u = torch.rand(3, 1, 32, 32).bfloat16(), torch.full((3, DRAWS), 0.9999)  # 1.0 in bf16
    kinds = ("translation", "cutout")
    assert torch.equal(augment(image, kinds, u), augment(image.float(), kinds, u))


def test_the_deviation_has_a_gradient_in_half_precision():
    x = torch.ones(2, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    minibatch_stddev(x, 2).float().sum().backward()
    assert x.grad.isfinite().all()


def test_augmentations_by_hand():
    image = torch.rand(1, 3, 32, 32) - 0.5
    middle = torch.full((1, DRAWS), 0.5)
    torch.testing.assert_close(augment(image, ("color", "translation"), middle), image)  # no change in the middle
    brighter = middle.clone()
    brighter[0, 0] = 1.0
    torch.testing.assert_close(augment(image, ("color",), brighter), image + 0.5)
    down = middle.clone()
    down[0, 3] = 0.0
    moved = augment(image, ("translation",), down)
    torch.testing.assert_close(moved[:, :, 4:], image[:, :, :-4])
    assert (moved[:, :, :4] == 0).all()
    cut = augment(torch.ones(1, 1, 32, 32), ("cutout",), middle)
    assert (cut == 0).sum() == 16 * 16


def test_the_deviation_is_shown_to_runs_of_images():
    x = torch.randn(4, 2, 3, 3, dtype=F64)
    x[2:] = x[2]
    shown = minibatch_stddev(x, 2)
    assert shown.shape == (4, 3, 3, 3)
    torch.testing.assert_close(shown[:, :2], x)
    expected = (x[:2].var(0, unbiased=False) + 1e-8).sqrt().mean()
    torch.testing.assert_close(shown[:2, 2], expected.expand(2, 3, 3))
    assert (shown[2:, 2] < 1e-3).all()
    with pytest.raises(ValueError, match="minibatch_stddev 3 does not divide"):
        minibatch_stddev(x, 3)


def test_lazy_penalties_equal_penalties_in_expectation():
    """Over n moves, one that counts n times weighs as n that count once."""
    from dataclasses import replace

    from systems_under_test import DISCRIMINATOR, batch_of, vaegan

    shares = []
    for every in (1, 4):
        torch.manual_seed(0)
        system = vaegan(config=replace(DISCRIMINATOR, penalty_every=every)).double()
        player, total = system.players()[0], 0.0
        for step in range(4):
            batch = batch_of(dtype=F64, step=step)
            loss, terms, *_ = player.loss(batch, system.passes(batch))
            total += (loss - terms["discriminator_loss"]).item()
        shares.append(total / 4)
    assert shares[0] == pytest.approx(shares[1], rel=1e-9)


def test_rates_at_their_ends():
    steps = 100
    for schedule in ("linear", "cosine"):
        settings = OptimizerConfig(lr=2.0, schedule=schedule, warmup=10, hold=0.5, final=0.1)
        assert settings.rate(0, steps) == pytest.approx(0.2)
        assert settings.rate(9, steps) == settings.rate(50, steps) == pytest.approx(2.0)
        assert settings.rate(75, steps) == pytest.approx(2 * 0.55)
        assert settings.rate(100, steps) == pytest.approx(0.2)
    assert OptimizerConfig(lr=2.0).rate(99, steps) == 2.0
    late = DiscriminatorConfig(lr=2.0, warmup=10, start=50)
    assert [late.rate(step, steps) for step in (50, 54, 59, 60)] == pytest.approx([0.2, 1.0, 2.0, 2.0])


def test_ramps_at_their_ends():
    def at(step: int) -> Batch:
        return Batch((torch.zeros(1),), slice(0, 1), 1, 0, step)

    assert [at(step).ramp(2, 4) for step in (0, 2, 4, 6, 9)] == [0, 0, 0.5, 1, 1]
    assert [at(step).ramp(2, 0) for step in (1, 2, 3)] == [0, 1, 1]
    assert [step for step in range(9) if at(step).due(3, 1)] == [1, 4, 7]


def test_the_convnext_distance_is_the_squared_difference_of_its_logits(tmp_path, monkeypatch):
    """As 1d-tokenizer's: of images in [0, 1], standardized as ImageNet's, at 224 pixels; here of a small ConvNeXt."""
    from torchvision.models import convnext
    from torchvision.transforms.v2.functional import normalize, resize

    from models.networks.perceptual import Perceptual

    torch.manual_seed(0)
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    monkeypatch.setattr("torchvision.models.convnext_small", lambda weights: convnext.ConvNeXt(blocks, num_classes=10))
    theirs = convnext.ConvNeXt(blocks, num_classes=10).eval()
    for block in theirs.modules():
        if isinstance(block, convnext.CNBlock):
            torch.nn.init.ones_(block.layer_scale)  # a millionth at first, which hides the blocks
    torch.save(theirs.state_dict(), tmp_path / "convnext.pth")
    theirs, ours = theirs.double(), Perceptual("convnext", str(tmp_path / "convnext.pth")).double()
    mean, std = (torch.tensor(values).tolist() for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))  # float32
    for size in (64, 300):
        a, b = (torch.rand(2, 3, size, size, dtype=torch.float64) * 2 - 1 for _ in range(2))
        b.requires_grad_()
        logits = [theirs(resize(normalize((x + 1) / 2, mean, std), [224, 224], antialias=True)) for x in (a, b)]
        distance = ours(a, b)
        # float64, whose rounding of 2^-53 a handful of layers and the difference of like logits magnify.
        assert distance.item() == pytest.approx((logits[0] - logits[1]).square().mean().item(), rel=1e-8)
        distance.backward()
        assert b.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in ours.parameters())
    with pytest.raises(ValueError, match=r"^system.perceptual_weights: .* is not .*ConvNeXt-S"):
        Perceptual("convnext", vit_file())


def test_lpips_is_that_of_torchmetrics(vgg16, torchmetrics_lpips):
    from models.networks.perceptual import Perceptual

    ours = Perceptual("lpips", str(vgg16))
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    distance = ours(a, b)
    # Thirteen float32 layers of up to 4,608 products: 13 * sqrt(4608) * 2^-24, and twice that of squared differences.
    assert distance.item() == pytest.approx(torchmetrics_lpips(a, b).mean().item(), rel=1e-3)
    distance.backward()
    assert b.grad.abs().sum() > 0, "it is never under no_grad"
    with FakeTensorMode():  # in which FLOPs and memory are counted, and files are read
        assert Perceptual("lpips", str(vgg16))(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)).shape == ()
