"""One discriminator's game: what it lowers, what its opponents lower, and when."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models import losses
from models.augment import DRAWS, augment
from models.losses import Mode, Opponent
from models.networks.blocks import iterate_spectra
from models.settings import DiscriminatorConfig
from models.system import Batch, Loss, Player, System, Terms

Images = dict[str, Tensor]  # of fakes, by kind: reconstructed, generated


class Adversary:
    """The game of one discriminator within a system.

    Args:
        system: holds the discriminator as its child `network`
        mode: what it tells apart
        settings: its own
        name: of its player
        network: of its child
        opponent: what its opponents want: to be called real, or not to be called what they are (ternary only)
        class_weights: of real, reconstructed and generated images in a ternary discriminator's loss
    """

    def __init__(
        self,
        system: System,
        mode: Mode,
        settings: DiscriminatorConfig,
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

    def discriminator_loss(self, batch: Batch, image: Tensor, fakes: Images) -> Loss:
        """the discriminator's loss: the adversarial one, and at its turns the gradient penalties.

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
        loss = losses.discriminator_loss(
            real, *fake.values(), kind=settings.adversarial, class_weights=self.class_weights
        )
        terms = {"discriminator_loss": loss, "chance": loss.new_full((), self.chance)} | losses.confusion(
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
        """The weight of its generator loss at this step."""
        return batch.ramp(self.settings.start, self.settings.ramp)

    def has_started(self, batch: Batch) -> bool:
        return batch.ramp(self.settings.start, 0) > 0

    def generator_loss(self, batch: Batch, image: Tensor, fakes: Images) -> Tensor:
        """The opponents' loss: the mean over the kinds of fakes."""
        logits = self._logits(batch, fakes)
        if self.opponent == "not_own":
            own = {"reconstructed": 1, "generated": 2}
            return torch.stack([losses.not_own(logits[kind], own[kind]) for kind in fakes]).mean()  # type: ignore[arg-type]
        kind = self.settings.adversarial
        real = self._logits(batch, {"real": image})["real"] if kind == "relativistic" else None
        return torch.stack([losses.generator_loss(fake, kind, real) for fake in logits.values()]).mean()

    def features(self, batch: Batch, layer: int, images: list[Tensor]) -> list[Tensor]:
        """A level's activations on images that are all augmented alike."""
        seen = torch.cat([self._augmented(batch, "real", image) for image in images])
        return list(losses.at_least_fp32(self.discriminator(seen, feature_layer=layer)).chunk(len(images)))

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
        return dict(zip(images, losses.at_least_fp32(logits).chunk(len(images)), strict=True))

    def _augmented(self, batch: Batch, kind: str, image: Tensor) -> Tensor:
        if not self.settings.augment:
            return image
        return augment(image, self.settings.augment, batch.uniform(f"augment {self.network} {kind}", (DRAWS,)))


def mean_generator_loss(
    adversaries: list[Adversary], batch: Batch, image: Tensor, fakes: Images
) -> tuple[Tensor | None, Terms]:
    """The mean generator loss of those that have started, each times its ramp; None before the first has."""
    started = [adversary for adversary in adversaries if adversary.has_started(batch)]
    if not started:
        return None, {}
    generator_losses = {adversary.name: adversary.generator_loss(batch, image, fakes) for adversary in started}
    weighted = [adversary.weight(batch) * generator_losses[adversary.name] for adversary in started]
    return torch.stack(weighted).mean(), {f"generator_loss/{name}": value for name, value in generator_losses.items()}
