"""Settings of optimizers and discriminators, and checks of settings."""

import math
from dataclasses import dataclass
from typing import Literal

from models.augment import Augmentation
from models.losses import Adversarial

Schedule = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of one player's optimizer.

    Args:
        lr: learning rate
        betas: decay of the running means of the gradient and of its square
        weight_decay: of the weights; decoupled from the gradient in adamw
        clip: largest gradient norm over all weights of the player; unset does not clip
        algorithm: adam (Kingma & Ba 2015) or adamw (Loshchilov & Hutter 2019); alike at weight_decay 0
        schedule: how the rate falls from `hold` to the run's end
        warmup: steps in which the rate rises from 0
        hold: share of the run after which it begins to fall
        final: share of the rate that is left at the end
    """

    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.99)
    weight_decay: float = 0.0
    clip: float | None = None
    algorithm: Literal["adam", "adamw"] = "adamw"
    schedule: Schedule = "constant"
    warmup: int = 0
    hold: float = 0.0
    final: float = 0.0

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at a step, 0 the first, of a run of `steps`."""
        risen = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fallen = min(1.0, max(0.0, step / steps - self.hold) / (1 - self.hold))
        left = {"constant": 1.0, "linear": 1 - fallen, "cosine": (1 + math.cos(math.pi * fallen)) / 2}[self.schedule]
        return self.lr * risen * (self.final + (1 - self.final) * left)

    def check(self, name: str) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: naming the setting, as of player `name`.
        """
        check_positive(**{f"{name}.lr": self.lr})
        check_weights(**{f"{name}.weight_decay": self.weight_decay, f"{name}.warmup": self.warmup})
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"system.{name}.betas is {list(self.betas)}, expected two numbers in [0, 1)")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"system.{name}.clip is {self.clip}, expected more than 0; leave it unset not to clip")
        if not 0 <= self.hold < 1 or not 0 <= self.final <= 1:
            raise ValueError(
                f"system.{name}.hold and .final are {self.hold} and {self.final}, expected shares: 0 <= hold < 1 and "
                "0 <= final <= 1"
            )
        if self.schedule == "constant" and (self.hold or self.final):
            raise ValueError(f"system.{name}.hold and .final have no effect while its schedule is constant")


def check_positive(**settings: float) -> None:
    """Refuse settings that are not above 0.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"system.{name} is {value}, expected more than 0")


def check_weights(**settings: float) -> None:
    """Refuse weights below 0.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise ValueError(f"system.{name} is {value}, expected 0 or more")


def check_effect(reason: str, **settings: tuple[object, object]) -> None:
    """Refuse settings (given, default) that were changed although, for the `reason`, they have no effect.

    Raises:
        ValueError: naming the setting and the reason.
    """
    for name, (given, default) in settings.items():
        if given != default:
            raise ValueError(f"system.{name} has no effect while {reason}: leave it unset")


@dataclass(frozen=True)
class DiscriminatorConfig(OptimizerConfig):
    """Settings of one discriminator: its optimizer's, and its game's.

    Args:
        every: it moves at every such step
        start: its first step; before it, it neither moves nor counts for its opponents
        ramp: steps after `start` in which its weight for its opponents rises from 0 to 1
        adversarial: logistic (non-saturating), hinge, least_squares, or relativistic (each fake beside a real image)
        r1_weight: gamma of the gradient penalty on real images; 0 is off
        r2_weight: gamma of the gradient penalty on fakes; 0 is off
        penalty_every: penalties are taken at every such move, times as many
        lecam_weight: of LeCam's regularization towards the running means of realness; 0 is off
        lecam_decay: of those means
        augment: DiffAugment of every image that it sees: color, translation, cutout
        spectral_norm: divide every weight matrix by its largest singular value
        minibatch_stddev: show it the deviation among runs of so many images of a kind; 0 is off
    """

    every: int = 1
    start: int = 0
    ramp: int = 0
    adversarial: Adversarial = "logistic"
    r1_weight: float = 0.1
    r2_weight: float = 0.0
    penalty_every: int = 1
    lecam_weight: float = 0.0
    lecam_decay: float = 0.99
    augment: tuple[Augmentation, ...] = ()
    spectral_norm: bool = False
    minibatch_stddev: int = 0

    def check(self, name: str) -> None:
        super().check(name)
        check_positive(**{f"{name}.{key}": getattr(self, key) for key in ("every", "penalty_every")})
        weights = ("start", "ramp", "r1_weight", "r2_weight", "lecam_weight", "minibatch_stddev")
        check_weights(**{f"{name}.{key}": getattr(self, key) for key in weights})
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(f"system.{name}.lecam_decay is {self.lecam_decay}, expected 0 or more and less than 1")
        if not self.lecam_weight:
            decay = (self.lecam_decay, DiscriminatorConfig.lecam_decay)
            check_effect(f"system.{name}.lecam_weight is 0", **{f"{name}.lecam_decay": decay})
        if self.minibatch_stddev == 1:
            raise ValueError(f"system.{name}.minibatch_stddev is 1, and one image has no deviation: expected 0 or 2 on")
        if self.penalty_every > 1 and not self.penalized:
            raise ValueError(f"system.{name}.penalty_every has no effect while r1_weight and r2_weight are 0")

    @property
    def penalized(self) -> bool:
        return self.r1_weight > 0 or self.r2_weight > 0
