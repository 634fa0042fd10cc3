"""Settings of optimizers and discriminators, and checks that raise errors naming a setting as it is typed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from models.augment import Augmentation
from models.losses import Adversarial
from models.schedule import Schedule, Varying, at, largest


class WeightsFile(str):
    """Path of a file of weights, which the trainer's parser makes absolute; empty in a system that is only used."""


def check(fits: bool, name: str, value: object, expected: str) -> None:
    """Raise a ValueError that names a setting, its value and what is expected, unless it fits."""
    if not fits:
        raise ValueError(f"system.{name} is {value}, expected {expected}")


def check_varying(fits: Callable[[float], bool], name: str, setting: Varying, expected: str) -> None:
    """Raise a ValueError as `check` does, unless a number, or both ends of a schedule fit and it has steps."""
    if not isinstance(setting, Schedule):
        return check(fits(setting), name, setting, expected)
    check(fits(setting.start), f"{name}.start", setting.start, expected)
    check(fits(setting.end), f"{name}.end", setting.end, expected)
    check(setting.start != setting.end, f"{name}.end", setting.end, "another number than start, or no schedule")
    check(setting.steps > 0, f"{name}.steps", setting.steps, "more than 0")


def check_positive(prefix: str = "", /, **settings: Varying) -> None:
    """Raise a ValueError that names the first setting that is not above 0."""
    for name, value in settings.items():
        check_varying(lambda number: number > 0, prefix + name, value, "more than 0")


def check_not_negative(prefix: str = "", /, **settings: Varying) -> None:
    """Raise a ValueError that names the first setting below 0."""
    for name, value in settings.items():
        check_varying(lambda number: number >= 0, prefix + name, value, "0 or more")


def check_unused(when: str, **settings: tuple[object, object]) -> None:
    """Raise a ValueError if a setting (value, default) that has no effect, such as "while ...", was changed."""
    for name, (value, default) in settings.items():
        if value != default:
            raise ValueError(f"system.{name} has no effect {when}: leave it unset")


def check_kl(kl_weight: float, kl_warmup: int, free_bits: float) -> None:
    """Raise a ValueError if settings of the KL term are below 0 or have no effect."""
    check_not_negative(kl_weight=kl_weight, kl_warmup=kl_warmup, free_bits=free_bits)
    if not kl_weight:
        check_unused("while system.kl_weight is 0", kl_warmup=(kl_warmup, 0), free_bits=(free_bits, 0.0))


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer of one player.

    A setting that may vary is a number, or {start: NUMBER, end: NUMBER, steps: N}, which goes from the one to the other
    along half a cosine in N steps of the run and then stays (Huang et al. 2024).

    Args:
        lr: learning rate, the peak of the schedule; lower it if losses oscillate or diverge. It may vary;
            `schedule` multiplies its value at each step
        betas: decay rates of the running means of the gradient and of its square, both in [0, 1); the second may vary
        weight_decay: decay of the weights per step, times the learning rate; with adam it is added to the gradient
        clip: largest norm of the gradient of all the player's weights; null does not clip
        algorithm: adam (Kingma & Ba 2015) or adamw (Loshchilov & Hutter 2019); they differ in weight_decay only
        schedule: how the learning rate decays from `hold` to the end of the run
        warmup: steps in which the learning rate rises linearly from 0 to lr; a discriminator's begin at its `start`
        hold: fraction of the run, in [0, 1), after which the learning rate begins to decay; no effect if constant
        final: fraction of lr, in [0, 1], that is left at the end of the run; no effect if constant
    """

    lr: Varying = 2e-4
    betas: tuple[float, Varying] = (0.5, 0.99)
    weight_decay: float = 0.0
    clip: float | None = None
    algorithm: Literal["adam", "adamw"] = "adamw"
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    hold: float = 0.0
    final: float = 0.0

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate at a step, counted from 0, of a run of `steps`."""
        fallen = min(1.0, max(0.0, step / steps - self.hold) / (1 - self.hold))
        left = {"constant": 1.0, "linear": 1 - fallen, "cosine": (1 + math.cos(math.pi * fallen)) / 2}[self.schedule]
        return at(self.lr, step) * self.risen(step) * (self.final + (1 - self.final) * left)

    def risen(self, step: int) -> float:
        """Return the fraction of the rate that `warmup` has reached at a step, counted from 0."""
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0

    def betas_at(self, step: int) -> tuple[float, float]:
        """Return the decay rates at a step, counted from 0."""
        return self.betas[0], at(self.betas[1], step)

    def varying(self, step: int) -> dict[str, float]:
        """Return the values at a step, counted from 0, of the settings that vary, but for the learning rate."""
        settings = {one.name: getattr(self, one.name) for one in fields(self)} | {"beta2": self.betas[1]}
        return {name: of.at(step) for name, of in settings.items() if isinstance(of, Schedule) and name != "lr"}

    def check(self, player: str) -> None:
        """Raise a ValueError that names the first setting of this player that is out of its range or has no effect."""
        check_positive(f"{player}.", lr=self.lr)
        check_not_negative(f"{player}.", weight_decay=self.weight_decay, warmup=self.warmup)
        for beta in self.betas:
            check_varying(lambda number: 0 <= number < 1, f"{player}.betas", beta, "a number in [0, 1)")
        check(self.clip is None or self.clip > 0, f"{player}.clip", self.clip, "more than 0, or null for no clipping")
        check(0 <= self.hold < 1, f"{player}.hold", self.hold, "a fraction in [0, 1)")
        check(0 <= self.final <= 1, f"{player}.final", self.final, "a fraction in [0, 1]")
        if self.schedule == "constant":
            decay = {f"{player}.hold": (self.hold, 0.0), f"{player}.final": (self.final, 0.0)}
            check_unused(f"while system.{player}.schedule is constant", **decay)


@dataclass(frozen=True)
class DiscriminatorConfig(OptimizerConfig):
    """One discriminator: its optimizer, its loss and its regularization.

    Args:
        every: steps between its updates; 1 updates it at every step
        start: first step at which it is trained; raise it to train a VAE first
        counts_from: first step at which it counts for its opponents, `start` or later (Esser et al. 2021's
            disc_start); null takes `start`. A later one lets it learn first, as a discriminator that has learnt nothing
            spoils the reconstructions of its opponents
        ramp: steps after `counts_from` in which its weight for its opponents rises linearly from 0 to 1
        adversarial: loss on realness: logistic (non-saturating, Goodfellow et al. 2014), hinge (Lim & Ye 2017),
            least_squares (Mao et al. 2017) or relativistic (each fake against a real image, Jolicoeur-Martineau 2019)
        r1_weight: weight of the gradient penalty on real images, gamma of Mescheder et al. 2018, eq. 9; 0 turns it off.
            A binary loss, but for relativistic, is the mean of the terms of real images and of fakes, and in most
            papers their sum: take half of a published gamma then. Raise it if training oscillates or the discriminator
            wins; usual are 0.01 to 10, more for larger images. It may vary; R3GAN lowers it to a tenth
        r2_weight: weight of the gradient penalty on fakes; 0 turns it off. R3GAN uses it with the relativistic loss. It
            may vary
        penalty_every: updates between penalties, each of which counts this many times (Karras et al. 2020, appendix B);
            a larger number saves compute and keeps the mean
        lecam_weight: weight of LeCam's regularization (Tseng et al. 2021), for little data; 0 turns it off. Usual are
            0.001 (tokenizers) to 0.15 (0.3 in the paper, whose hinge loss is a sum); 0.3 made a logistic GAN collapse
            here, with one seed (docs/tried.md)
        lecam_decay: decay, in [0, 1), of the running means of realness that LeCam compares with
        augment: DiffAugment (Zhao et al. 2020), for little data: a list of color, translation, cutout. All
            three in each image spoiled a GAN of 6,000 steps on CIFAR-10 (docs/tried.md): there use a low probability
        augment_probability: probability, in [0, 1], that each of these kinds changes an image (Karras et al. 2020,
            "Training GANs with limited data", section 3.1). It may vary; R3GAN raises it from 0
        spectral_norm: divide every weight matrix by its largest singular value (Miyato et al. 2018)
        minibatch_stddev: images per group whose common standard deviation it is shown, which counters mode collapse
            (Karras et al. 2018); a micro-batch must be a multiple of it; 0 turns it off
        dino_weights: file of a vision transformer of DINO, such as ViT-S/8, whose frozen features of an image are shown
            to light heads in place of the image (Sauer et al. 2023), with R1 and R2 off; as there, best with hinge,
            augment and spectral_norm.
            The file is as for perceptual_weights of dino; null trains a discriminator of pixels
    """

    every: int = 1
    start: int = 0
    counts_from: int | None = None
    ramp: int = 0
    adversarial: Adversarial = "logistic"
    r1_weight: Varying = 0.1
    r2_weight: Varying = 0.0
    penalty_every: int = 1
    lecam_weight: float = 0.0
    lecam_decay: float = 0.99
    augment: tuple[Augmentation, ...] = ()
    augment_probability: Varying = 1.0
    spectral_norm: bool = False
    minibatch_stddev: int = 0
    dino_weights: WeightsFile | None = None

    def risen(self, step: int) -> float:
        """Return the fraction of the rate that `warmup`, counted from `start`, has reached at a step."""
        return super().risen(max(0, step - self.start))

    def check(self, player: str) -> None:
        super().check(player)
        check_positive(f"{player}.", every=self.every, penalty_every=self.penalty_every)
        names = ("start", "ramp", "r1_weight", "r2_weight", "lecam_weight", "minibatch_stddev")
        check_not_negative(f"{player}.", **{name: getattr(self, name) for name in names})
        late = self.counts_from is None or self.counts_from >= self.start
        expected = f"{self.start} or more, as system.{player}.start is {self.start}, or null for the same step"
        check(late, f"{player}.counts_from", self.counts_from, expected)
        check(0 <= self.lecam_decay < 1, f"{player}.lecam_decay", self.lecam_decay, "a fraction in [0, 1)")
        check(self.minibatch_stddev != 1, f"{player}.minibatch_stddev", 1, "0 (off) or 2 or more images")
        name, expected = f"{player}.augment_probability", "a probability in [0, 1]"
        check_varying(lambda share: 0 <= share <= 1, name, self.augment_probability, expected)
        if not self.augment:
            check_unused(f"while system.{player}.augment is empty", **{name: (self.augment_probability, 1.0)})
        if not self.lecam_weight:
            decay = (self.lecam_decay, DiscriminatorConfig.lecam_decay)
            check_unused(f"while system.{player}.lecam_weight is 0", **{f"{player}.lecam_decay": decay})
        if self.dino_weights is not None:
            for name in ("r1_weight", "r2_weight", "minibatch_stddev"):
                value, alone = getattr(self, name), f"0 while system.{player}.dino_weights is set"
                check(not value, f"{player}.{name}", value, alone)
        if not self.penalized:
            every = {f"{player}.penalty_every": (self.penalty_every, 1)}
            check_unused(f"while system.{player}.r1_weight and r2_weight are 0", **every)

    @property
    def first_counting(self) -> int:
        """The first step at which it counts for its opponents."""
        return self.start if self.counts_from is None else self.counts_from

    @property
    def penalized(self) -> bool:
        return largest(self.r1_weight) > 0 or largest(self.r2_weight) > 0
