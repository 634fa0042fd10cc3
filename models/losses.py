"""Losses as their papers write them: pure functions of network outputs that return the mean over the batch."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, relu, softplus

Likelihood = Literal["gaussian", "laplace", "bernoulli"]
Mode = Literal["binary", "ternary"]
LOGITS: dict[Mode, int] = {"binary": 1, "ternary": 3}  # real or fake; real, reconstructed or generated
Adversarial = Literal["logistic", "hinge", "least_squares", "relativistic"]
Opponent = Literal["real", "not_own"]
# Log-variance above which a variance's exponential goes on as its tangent; that of a good posterior is below 0.
TANGENT = 4.0


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x as fp32 if it is in half precision, in which no loss is computed."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def mean(values: Iterable[Tensor]) -> Tensor:
    """Return the mean of scalars."""
    first, *rest = values
    return sum(rest, first) / (1 + len(rest))


def weighted_mean(values: Mapping[Mode, Tensor], weights: Mapping[Mode, float]) -> Tensor:
    """Return the mean of scalars by weights, or the plain mean if all weights are 0."""
    total = sum(weights.values())
    if not total:
        return mean(values.values())
    first, *rest = (weights[name] / total * value for name, value in values.items())
    return sum(rest, first)


def reparameterize(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Return z = mean + sigma * noise, a draw from N(mean, sigma^2) (Kingma & Welling 2014, eq. 4)."""
    return mean + (0.5 * log_variance).exp() * noise


def gaussian_kl(mean: Tensor, log_variance: Tensor, free_bits: float = 0.0) -> Tensor:
    """Return KL(N(mean, sigma^2) || N(0, I)) in nats, summed over the code (Kingma & Welling 2014, appendix B).

    Each number of a code counts at least `free_bits` nats, in each image, not in a batch's mean as in Kingma et al.
    2016, section C.8, so that the result does not depend on micro-batches.

    Above a log-variance of 4, where a young encoder's may stray at a high learning rate, sigma^2 goes on as a tangent.
    Else the gradient of one such image is 10^8, which Adam's mean of squares remembers for thousands of steps.
    """
    variance = log_variance.clamp(max=TANGENT).exp() * (1 + relu(log_variance - TANGENT))
    kl = 0.5 * (mean.square() + variance - 1 - log_variance)
    return (kl.clamp(min=free_bits) if free_bits else kl).flatten(1).sum(1).mean()


def gaussian_likelihood(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return -log N(z; mean, sigma^2) in nats, summed over the code."""
    nll = 0.5 * ((z - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
    return nll.flatten(1).sum(1).mean()


def likelihood(kind: Likelihood, target: Tensor, prediction: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Return -log p(target | prediction) in nats, summed over pixels, up to a constant.

    Gaussian: 1/2 ||x - y||^2 / s^2 + D log s. Laplace: |x - y| / s + D log s. Bernoulli: cross-entropy in [0, 1].
    """
    if kind == "bernoulli":
        p, x = ((at_least_fp32(image) + 1) / 2 for image in (prediction, target))
        with torch.autocast(p.device.type, enabled=False):  # autocast forbids this loss on CUDA in any precision
            error = binary_cross_entropy(p.clamp(1e-6, 1 - 1e-6), x, reduction="none")
        return error.flatten(1).sum(1).mean()
    error = 0.5 * (target - prediction).square() if kind == "gaussian" else (target - prediction).abs()
    if log_scale is not None:
        error = error * (-(2 if kind == "gaussian" else 1) * log_scale).exp() + log_scale
    return error.flatten(1).sum(1).mean()


def realness(logits: Tensor) -> Tensor:
    """Return s with sigmoid(s) = p(real): the logit [n, 1, ...], or l_real - logsumexp(l_rec, l_gen) of [n, 3, ...]."""
    return logits.squeeze(1) if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1:].logsumexp(1)


def loss_on_real(kind: Adversarial, s: Tensor) -> Tensor:
    """Return the discriminator's loss on the realness s of real images, elementwise.

    Logistic: -log sigmoid(s) (Goodfellow et al. 2014, section 3). Hinge: max(0, 1 - s) (Lim & Ye 2017). Least squares:
    (t - 1)^2 with t = (s + 1) / 2 (Mao et al. 2017, targets 0 and 1). On fakes its loss is that on -s.
    """
    if kind == "logistic":
        return softplus(-s)
    if kind == "hinge":
        return relu(1 - s)
    assert kind == "least_squares"
    return (s - 1) ** 2 / 4


def discriminator_loss(
    real: Tensor,
    *fakes: Tensor,
    kind: Adversarial = "logistic",
    class_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Return the discriminator's loss on its logits [n, 1 or 3, ...].

    Binary: half the loss is on real images, half on fakes (Goodfellow et al. 2014, eq. 1). Ternary: the cross-entropy
    of three classes, which splits into -log p_real = softplus(-s) and -log p_own = softplus(s) + softplus(l_other -
    l_own) of the realness s. A `kind` other than logistic replaces the terms in s only. Relativistic: softplus(s_fake -
    s_real) with the real image at the same position (Jolicoeur-Martineau 2019; Huang et al. 2024, eq. 2). `fakes` and
    `class_weights` of a ternary discriminator are in the order real, reconstructed, generated.
    """
    ternary = real.shape[1] == 3
    shares = _class_shares(ternary, len(fakes), class_weights)
    s, s_fakes = realness(real), [realness(fake) for fake in fakes]
    if kind == "relativistic":
        among = [share / sum(shares[1:]) for share in shares[1:]]
        loss = sum(share * softplus(fake - s).mean() for share, fake in zip(among, s_fakes, strict=True))
    else:
        loss = shares[0] * loss_on_real(kind, s).mean() + sum(
            share * loss_on_real(kind, -fake).mean() for share, fake in zip(shares[1:], s_fakes, strict=True)
        )
    if ternary:
        reconstructed, generated = fakes
        loss = loss + shares[1] * softplus(reconstructed[:, 2] - reconstructed[:, 1]).mean()
        loss = loss + shares[2] * softplus(generated[:, 1] - generated[:, 2]).mean()
    assert isinstance(loss, Tensor)
    return loss


def chance(
    mode: Mode, kind: Adversarial = "logistic", class_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> float:
    """Return the least loss of a discriminator that cannot tell images apart: ln 2 if binary, ln 3 if ternary."""
    real, *fakes = _class_shares(mode == "ternary", 2, class_weights)
    fake = sum(fakes)
    losses = {"hinge": 2 * min(real, fake), "least_squares": real * fake, "relativistic": math.log(2)}
    blind = losses[kind] if kind in losses else _entropy(real, fake)
    return blind + (fake * _entropy(*(share / fake for share in fakes)) if mode == "ternary" else 0.0)


def generator_loss(fakes: Tensor, kind: Adversarial = "logistic", real: Tensor | None = None) -> Tensor:
    """Return the opponent's loss on logits of fakes: that of the discriminator on real images.

    Hinge: -s. Relativistic: softplus(s_real - s_fake), with the logits of `real` images at the same positions.
    """
    s = realness(fakes)
    if kind == "relativistic":
        assert real is not None
        return softplus(realness(real) - s).mean()
    return -s.mean() if kind == "hinge" else loss_on_real(kind, s).mean()


def not_own(logits: Tensor, own: Literal[1, 2]) -> Tensor:
    """Return -log(1 - p_own) of ternary logits on fakes of class `own`: low if they are taken for any other class."""
    others = torch.stack([logits[:, 0], logits[:, 3 - own]], 1)  # indexing with a list would synchronize with the GPU
    return softplus(logits[:, own] - others.logsumexp(1)).mean()


def gradient_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """Return 1/2 E||ds/dx||^2 of the realness s, its mean over patches (Mescheder et al. 2018, eq. 9 and 10)."""
    s = realness(logits).view(len(logits), -1).mean(1)
    (gradient,) = torch.autograd.grad(s.sum(), images, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def lecam(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """Return E max(0, s_real - m_fake)^2 + E max(0, m_real - s_fake)^2 (Tseng et al. 2021, eq. 3, as in their code)."""
    return relu(real - mean_fake).square().mean() + relu(mean_real - fake).square().mean()


def confusion(logits: dict[str, Tensor], relativistic: bool = False) -> dict[str, Tensor]:
    """Return `accuracy/KIND` of each kind of image, and `named/KIND/CLASS`, its fraction in each of three classes.

    A fake is right if its logit is 0 or less, or, if `relativistic`, less than that of the real image at its position.
    """
    if relativistic:
        s = {kind: realness(values) for kind, values in logits.items()}
        fakes = (kind for kind in s if kind != "real")
        return {f"accuracy/{kind}": (s[kind] < s["real"]).to(s[kind].dtype).mean() for kind in fakes}
    terms = {}
    for kind, values in logits.items():
        if values.shape[1] == 1:
            right = values > 0 if kind == "real" else values <= 0
            terms[f"accuracy/{kind}"] = right.to(values.dtype).mean()
            continue
        names = ("real", "reconstructed", "generated")
        named = values.argmax(1).unsqueeze(-1) == torch.arange(3, device=values.device)
        shares = dict(zip(names, named.to(values.dtype).flatten(0, -2).mean(0).unbind(), strict=True))
        terms[f"accuracy/{kind}"] = shares[kind]
        terms |= {f"named/{kind}/{name}": share for name, share in shares.items()}
    return terms


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, largest: float) -> Tensor:
    """Return the ratio of two gradients' norms, at most `largest` (Esser et al. 2021, eq. 7), or NaN if not finite."""
    norm, adversarial_norm = reconstruction.norm(), adversarial.norm()
    ratio = (norm / (adversarial_norm + 1e-4)).clamp(max=largest)
    return torch.where((norm + adversarial_norm).isfinite(), ratio, torch.nan)


def _class_shares(ternary: bool, fakes: int, class_weights: tuple[float, float, float]) -> list[float]:
    """The weight of each kind of image in a discriminator's loss, real first; they sum to 1."""
    return [weight / sum(class_weights) for weight in class_weights] if ternary else [0.5, *[0.5 / fakes] * fakes]


def _entropy(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares)
