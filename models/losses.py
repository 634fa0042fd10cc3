"""Losses as their papers write them: pure functions of network outputs, a mean over the batch."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


def reparameterize(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """z = mean + sigma * noise, a draw from the posterior N(mean, sigma^2) (Kingma & Welling 2014, eq. 4)."""
    return mean + (0.5 * log_variance).exp() * noise


def squared_error(target: Tensor, prediction: Tensor) -> Tensor:
    """1/2 ||target - prediction||^2 summed over all axes but the first: -log N(target; prediction, I) + constant."""
    return 0.5 * (target - prediction).square().flatten(1).sum(1).mean()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, I)) in nats, summed over the latent's axes (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()


class Mode(NamedTuple):
    """What a discriminator tells apart: `logits` is the number of its outputs, `chance` a blind one's loss in nats."""

    name: str
    logits: int
    chance: float


ModeName = Literal["binary", "ternary"]
MODES: dict[str, Mode] = {
    "binary": Mode("binary", 1, math.log(2)),  # real | fake
    "ternary": Mode("ternary", 3, math.log(3)),  # real | reconstructed | generated
}


def realness(logits: Tensor) -> Tensor:
    """s [n] with sigmoid(s) = p(real): the logit [n, 1], or l_real - logsumexp(l_rec, l_gen) of logits [n, 3]."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[:, 0] - logits[:, 1:].logsumexp(1)


def judge(real: Tensor, reconstructed: Tensor, generated: Tensor) -> Tensor:
    """The discriminator's cross-entropy, from its logits on the three kinds of image.

    Binary: half on real, half shared by the fakes (Goodfellow et al. 2014, eq. 1). Ternary: a third each, with
    -log p_real = softplus(-s) and -log p_own = softplus(s) + softplus(l_other - l_own), s the realness.
    """
    on_real = softplus(-realness(real)).mean()
    on_fakes = (softplus(realness(reconstructed)).mean() + softplus(realness(generated)).mean()) / 2
    if real.shape[1] == 1:
        return (on_real + on_fakes) / 2
    apart = (
        softplus(reconstructed[:, 2] - reconstructed[:, 1]).mean() + softplus(generated[:, 1] - generated[:, 2]).mean()
    ) / 2
    return (on_real + 2 * (on_fakes + apart)) / 3


def fool(fakes: Tensor) -> Tensor:
    """The opponent's -log p_real on fakes' logits: the non-saturating loss (Goodfellow et al. 2014, section 3)."""
    return softplus(-realness(fakes)).mean()


def r1(real: Tensor, logits: Tensor) -> Tensor:
    """1/2 E||d s / d x||^2 on real images, s the realness (Mescheder et al. 2018, eq. 9). `real` must require grad."""
    (gradient,) = torch.autograd.grad(realness(logits).sum(), real, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def accuracy(real: Tensor, reconstructed: Tensor, generated: Tensor) -> dict[str, Tensor]:
    """Share of each kind that is named rightly, as `accuracy/KIND`; to a binary discriminator both fakes are "fake"."""
    kinds = {"real": real, "reconstructed": reconstructed, "generated": generated}
    if real.shape[1] == 1:
        right = {kind: (logits[:, 0] > 0) == (kind == "real") for kind, logits in kinds.items()}
    else:
        right = {kind: logits.argmax(1) == i for i, (kind, logits) in enumerate(kinds.items())}
    return {f"accuracy/{kind}": hits.float().mean() for kind, hits in right.items()}
