"""Closed forms of every loss."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from models import losses

F64 = torch.float64


def test_gaussian_kl_is_that_of_torch_distributions():
    mean, log_variance = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert losses.gaussian_kl(mean, log_variance) == pytest.approx(expected.item(), rel=1e-12)


def test_gaussian_kl_by_hand():
    m, s = 2.0, 0.5
    kl = losses.gaussian_kl(torch.full((1, 1), m, dtype=F64), torch.full((1, 1), 2 * math.log(s), dtype=F64))
    assert kl.item() == pytest.approx(0.5 * (m**2 + s**2 - 1) - math.log(s), rel=1e-12)


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
    assert losses.squared_error(x, mean).item() == pytest.approx(-log_likelihood.item() - constant, rel=1e-12)


@pytest.mark.parametrize("mode", losses.MODES.values())
def test_judge_at_zero_logits_is_chance(mode):
    blind = torch.zeros(4, mode.logits, dtype=F64)
    assert losses.judge(blind, blind, blind).item() == pytest.approx(math.log({1: 2, 3: 3}[mode.logits]), rel=1e-12)
    assert mode.chance == pytest.approx(math.log({1: 2, 3: 3}[mode.logits]))


def test_ternary_judge_is_the_mean_cross_entropy():
    logits = [torch.randn(5, 3, dtype=F64) for _ in range(3)]
    expected = sum(torch.nn.functional.cross_entropy(part, torch.full((5,), i)) for i, part in enumerate(logits)) / 3
    assert losses.judge(*logits).item() == pytest.approx(expected.item(), rel=1e-12)


def test_binary_judge_shows_real_and_fake_by_halves():
    real, reconstructed, generated = (torch.randn(5, 1, dtype=F64) for _ in range(3))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    fake = (bce(reconstructed, torch.zeros_like(real)) + bce(generated, torch.zeros_like(real))) / 2
    expected = (bce(real, torch.ones_like(real)) + fake) / 2
    assert losses.judge(real, reconstructed, generated).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
def test_realness_and_fool_are_p_real(outputs):
    logits = torch.randn(7, outputs, dtype=F64)
    p_real = logits[:, 0].sigmoid() if outputs == 1 else logits.softmax(1)[:, 0]
    torch.testing.assert_close(losses.realness(logits).sigmoid(), p_real)
    assert losses.fool(logits).item() == pytest.approx(-p_real.log().mean().item(), rel=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
def test_fooling_raises_realness(outputs):
    logits = torch.randn(7, outputs, dtype=F64, requires_grad=True)
    losses.fool(logits).backward()
    assert (losses.realness(logits - 0.1 * logits.grad) > losses.realness(logits)).all()


def test_r1_of_a_quadratic():
    x = torch.randn(6, 1, 2, 2, dtype=F64, requires_grad=True)
    logits = x.square().flatten(1).sum(1, keepdim=True)  # its gradient is 2 x
    expected = 0.5 * (4 * x.square()).flatten(1).sum(1).mean()
    assert losses.r1(x, logits).item() == pytest.approx(expected.item(), rel=1e-12)


def test_accuracy_counts_each_kind():
    sure = torch.eye(3) * 9
    real, reconstructed, generated = sure[[0, 0]], sure[[1, 2]], sure[[0, 0]]
    assert losses.accuracy(real, reconstructed, generated) == {
        "accuracy/real": 1,
        "accuracy/reconstructed": 0.5,
        "accuracy/generated": 0,
    }
    yes, no = torch.ones(2, 1), -torch.ones(2, 1)
    assert losses.accuracy(yes, no, yes)["accuracy/generated"] == 0
