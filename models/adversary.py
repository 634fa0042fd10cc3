"""One discriminator's game: what it lowers, what its opponents lower, and when."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import losses
from models.augment import DRAWS, Augmentation, augment
from models.losses import Adversarial, Mode, Opponent
from models.networks.blocks import iterate_spectra
from models.system import Batch, Loss, Optimizer, Player, System, Terms, check_effect, check_positive, check_weights

Images = dict[str, Tensor]  # of fakes, by kind: reconstructed, generated


@dataclass(frozen=True)
class Judge(Optimizer):
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
            decay = (self.lecam_decay, Judge.lecam_decay)
            check_effect(f"system.{name}.lecam_weight is 0", **{f"{name}.lecam_decay": decay})
        if self.minibatch_stddev == 1:
            raise ValueError(f"system.{name}.minibatch_stddev is 1, and one image has no deviation: expected 0 or 2 on")
        if self.penalty_every > 1 and not self.penalized:
            raise ValueError(f"system.{name}.penalty_every has no effect while r1_weight and r2_weight are 0")

    @property
    def penalized(self) -> bool:
        return self.r1_weight > 0 or self.r2_weight > 0


class Adversary:
    """The game of one discriminator within a system.

    Args:
        system: holds the discriminator as its child `network`
        mode: what it tells apart
        settings: its own
        name: of its player
        network: of its child
        opponent: what its opponents want: to be called real, or not to be called what they are (ternary only)
        class_weights: of real, reconstructed and generated images in a ternary judge's loss
    """

    def __init__(
        self,
        system: System,
        mode: Mode,
        settings: Judge,
        name: str,
        network: str,
        opponent: Opponent = "real",
        class_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ):
        settings.check(name)
        self.system, self.mode, self.settings, self.name, self.network = system, mode, settings, name, network
        self.opponent, self.class_weights = opponent, class_weights
        self.chance = losses.chance(mode, settings.adversarial, class_weights)
        if settings.lecam_weight:
            system.register_buffer(f"lecam_{network}", torch.zeros(2))  # mean realness of real images and of fakes
        if settings.minibatch_stddev:
            system.group = math.lcm(system.group, settings.minibatch_stddev)

    @property
    def discriminator(self) -> nn.Module:
        return self.system.get_submodule(self.network)

    def player(self, loss: Any) -> Player:
        settings = self.settings
        after = self.after if settings.lecam_weight or settings.spectral_norm else None
        return Player(self.name, (self.network,), loss, settings, settings.every, settings.start, after)

    def judge(self, batch: Batch, image: Tensor, fakes: Images) -> Loss:
        """The discriminator's loss: the judge's, and at its turns the gradient penalties.

        A penalty every n moves counts n times, so that its mean is that of one every move (Karras et al. 2020, B).
        """
        settings = self.settings
        due = settings.penalized and batch.due(settings.every * settings.penalty_every, settings.start)
        image = image.detach().requires_grad_(due)
        shown = {kind: fake.detach().requires_grad_(due) for kind, fake in fakes.items()}
        if due:  # apart, or the penalty would go back through the fakes, too
            logits = self._logits(batch, {"real": image}) | self._logits(batch, shown)
        else:
            logits = self._logits(batch, {"real": image} | shown)
        real, fake = logits["real"], {kind: logits[kind] for kind in fakes}
        loss = losses.judge(real, *fake.values(), kind=settings.adversarial, class_weights=self.class_weights)
        terms = {"judge": loss, "chance": loss.new_full((), self.chance)} | losses.confusion(
            logits, settings.adversarial == "relativistic" and self.mode.logits == 1
        )
        statistics: Terms = {}
        if due and settings.r1_weight:
            terms["r1"] = losses.gradient_penalty(image, real)
            loss = loss + settings.penalty_every * settings.r1_weight * terms["r1"]
        if due and settings.r2_weight:
            terms["r2"] = torch.stack([losses.gradient_penalty(shown[kind], fake[kind]) for kind in fakes]).mean()
            loss = loss + settings.penalty_every * settings.r2_weight * terms["r2"]
        if settings.lecam_weight:
            s_real, s_fake = losses.realness(real), losses.realness(torch.cat(list(fake.values())))
            terms["lecam"] = losses.lecam(s_real, s_fake, *self.system.get_buffer(f"lecam_{self.network}").unbind())
            loss = loss + settings.lecam_weight * terms["lecam"]
            statistics["realness"] = torch.stack([s_real.mean(), s_fake.mean()]).detach()
        return Loss(loss, terms, statistics)

    def weight(self, batch: Batch) -> float:
        """What its fool counts at this step."""
        return batch.ramp(self.settings.start, self.settings.ramp)

    def has_started(self, batch: Batch) -> bool:
        return batch.ramp(self.settings.start, 0) > 0

    def fool(self, batch: Batch, image: Tensor, fakes: Images) -> Tensor:
        """The opponents' loss: the mean over the kinds of fakes."""
        logits = self._logits(batch, fakes)
        if self.opponent == "not_own":
            own = {"reconstructed": 1, "generated": 2}
            return torch.stack([losses.not_own(logits[kind], own[kind]) for kind in fakes]).mean()  # type: ignore[arg-type]
        kind = self.settings.adversarial
        real = self._logits(batch, {"real": image})["real"] if kind == "relativistic" else None
        return torch.stack([losses.fool(fake, kind, real) for fake in logits.values()]).mean()

    def features(self, batch: Batch, layer: int, images: list[Tensor]) -> list[Tensor]:
        """A level's activations on images that are all augmented alike."""
        seen = torch.cat([self._augmented(batch, "real", image) for image in images])
        return list(losses.full(self.discriminator(seen, feature_layer=layer)).chunk(len(images)))

    def after(self, statistics: Terms) -> None:
        """What the discriminator's move leaves for the next step."""
        if self.settings.lecam_weight:
            means = self.system.get_buffer(f"lecam_{self.network}")
            means.lerp_(statistics["realness"], 1 - self.settings.lecam_decay)
        if self.settings.spectral_norm:
            iterate_spectra(self.discriminator)

    def _logits(self, batch: Batch, images: Images) -> Images:
        """Logits by kind of image, in fp32 at least."""
        seen = torch.cat([self._augmented(batch, kind, image) for kind, image in images.items()])
        logits = self.discriminator(seen)
        return dict(zip(images, losses.full(logits).chunk(len(images)), strict=True))

    def _augmented(self, batch: Batch, kind: str, image: Tensor) -> Tensor:
        if not self.settings.augment:
            return image
        return augment(image, self.settings.augment, batch.uniform(f"augment {self.network} {kind}", (DRAWS,)))


def mean_fool(adversaries: list[Adversary], batch: Batch, image: Tensor, fakes: Images) -> tuple[Tensor | None, Terms]:
    """The mean of the fools of those that have started, each times its ramp; None before the first has."""
    started = [adversary for adversary in adversaries if adversary.has_started(batch)]
    if not started:
        return None, {}
    fools = {adversary.name: adversary.fool(batch, image, fakes) for adversary in started}
    weighted = [adversary.weight(batch) * fools[adversary.name] for adversary in started]
    return torch.stack(weighted).mean(), {f"fool/{name}": value for name, value in fools.items()}
