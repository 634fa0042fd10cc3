"""The game of one discriminator: its loss, the loss of its opponents, and the statistics that it keeps."""

from typing import Any, Literal, cast

import torch
from torch import Tensor

from models import losses
from models.augment import DRAWS, augment
from models.losses import LOGITS, Mode, Opponent
from models.networks import Discriminator, ImageSize, NetworkConfig
from models.networks.dino import DINO
from models.networks.heads import Heads
from models.networks.spectral_norm import iterate_spectral_norms
from models.schedule import largest
from models.settings import DiscriminatorConfig, check, check_unused
from models.system import Batch, Loss, Player, System, Terms

Fakes = dict[str, Tensor]  # fakes by kind: reconstructed, generated


class Adversary:
    """A discriminator of a system, which becomes its child, and what it and its opponents are trained on.

    Args:
        mode: the classes that it tells apart; also its player's name
        opponent: aim of its opponents: to be classified as `real`, or, `not_own`, as any class but their own
        class_weights: relative weights of real, reconstructed and generated images in a ternary discriminator's loss
        network: name of the child, by default discriminator_MODE
        options: further arguments of `Discriminator`, if it sees images
    """

    def __init__(
        self,
        system: System,
        mode: Mode,
        config: DiscriminatorConfig,
        networks: NetworkConfig,
        image_size: ImageSize,
        channels: int,
        opponent: Opponent = "real",
        class_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        network: str = "",
        **options: Any,
    ):
        config.check(mode)
        check(all(weight > 0 for weight in class_weights), "class_weights", [*class_weights], "three numbers above 0")
        possible = opponent == "real" or config.adversarial == "logistic"
        check(possible, "opponent", opponent, "real because system.ternary.adversarial is not logistic")
        self.system, self.mode, self.config, self.network = system, mode, config, network or f"discriminator_{mode}"
        self.opponent, self.class_weights = opponent, class_weights
        self.chance = losses.chance(mode, config.adversarial, class_weights)
        alone = f"null while system.classes is {system.classes}, as its heads see no class"
        check(not system.classes or config.dino_weights is None, f"{mode}.dino_weights", config.dino_weights, alone)
        check(not system.classes or not networks.patches, "networks.patches", "true", alone.replace("null", "false"))
        shape = (image_size, channels, LOGITS[mode], config.spectral_norm, config.minibatch_stddev)
        if config.dino_weights is None:
            system.add_module(self.network, Discriminator(networks, *shape, classes=system.classes, **options))
        elif config.dino_weights:  # a system that is only used has no such discriminator
            if not hasattr(system, self.dino):
                system.add_module(self.dino, DINO(config.dino_weights, f"system.{mode}.dino_weights"))
            width = cast(DINO, system.get_submodule(self.dino)).width
            system.add_module(self.network, Heads(width, LOGITS[mode], config.spectral_norm))
        if config.lecam_weight:
            system.register_buffer(f"lecam_{self.network}", torch.zeros(2))  # mean realness of real images and fakes
        if config.minibatch_stddev:
            system.groups = {**system.groups, f"system.{mode}.minibatch_stddev": config.minibatch_stddev}

    @property
    def discriminator(self) -> Discriminator:
        return cast(Discriminator, self.system.get_submodule(self.network))

    @property
    def dino(self) -> str:
        """The name of the child whose frozen features the discriminator sees, if it does not see images."""
        return f"dino_{self.mode}"

    @property
    def _lecam(self) -> Tensor:
        return self.system.get_buffer(f"lecam_{self.network}")

    def player(self, loss: Any) -> Player:
        config = self.config
        after = self.after if config.lecam_weight or config.spectral_norm else None
        return Player(self.mode, (self.network,), loss, config, config.every, config.start, after)

    def discriminator_loss(self, batch: Batch, image: Tensor, fakes: Fakes) -> Loss:
        """Return the adversarial loss plus, when they are due, the gradient penalties, and LeCam's regularization."""
        config = self.config
        due = config.penalized and batch.due(config.every * config.penalty_every, config.start)
        image = image.detach().requires_grad_(due)
        shown = {kind: fake.detach().requires_grad_(due) for kind, fake in fakes.items()}
        if due:  # in two passes, or the penalty on real images would go back through the fakes, too
            logits = self._logits(batch, {"real": image}) | self._logits(batch, shown)
        else:
            logits = self._logits(batch, {"real": image} | shown)
        real, *fake = logits.values()
        loss = losses.discriminator_loss(real, *fake, kind=config.adversarial, class_weights=self.class_weights)
        terms = {"discriminator_loss": loss, "chance": loss.new_full((), self.chance)}
        if config.ramp or config.first_counting > config.start:
            terms["weight_for_opponents"] = loss.new_full((), self.weight(batch))
        terms |= losses.confusion(logits, config.adversarial == "relativistic" and self.mode == "binary")
        statistics: Terms = {}
        for name, weight, images in (("r1", config.r1_weight, {"real": image}), ("r2", config.r2_weight, shown)):
            if due and largest(weight):
                penalties = [losses.gradient_penalty(x, logits[kind]) for kind, x in images.items()]
                terms[name] = losses.mean(penalties)
                loss = loss + config.penalty_every * batch.at(weight) * terms[name]
        if config.lecam_weight:
            s_real, s_fake = losses.realness(real), losses.realness(torch.cat(fake))
            terms["lecam"] = losses.lecam(s_real, s_fake, *self._lecam.unbind())
            loss = loss + config.lecam_weight * terms["lecam"]
            statistics[f"realness_{self.network}"] = torch.stack([s_real.mean(), s_fake.mean()]).detach()
        return Loss(loss, terms, statistics)

    def counts(self, batch: Batch) -> bool:
        """Return whether the step is one from which on it counts for its opponents."""
        return batch.ramp(self.config.first_counting, 0) > 0

    def weight(self, batch: Batch) -> float:
        """Return its weight for its opponents at this step, in [0, 1]."""
        return batch.ramp(self.config.first_counting, self.config.ramp)

    def generator_loss(self, batch: Batch, image: Tensor, fakes: Fakes) -> Tensor:
        """Return the opponents' loss, the mean over the kinds of fakes."""
        logits = self._logits(batch, fakes)
        if self.opponent == "not_own":
            own: dict[str, Literal[1, 2]] = {"reconstructed": 1, "generated": 2}
            return losses.mean(losses.not_own(logits[kind], own[kind]) for kind in fakes)
        kind = self.config.adversarial
        real = self._logits(batch, {"real": image})["real"] if kind == "relativistic" else None
        return losses.mean(losses.generator_loss(fake, kind, real) for fake in logits.values())

    def features(self, batch: Batch, layer: int, images: list[Tensor]) -> list[Tensor]:
        """Return a level's activations for images that are all augmented by the same draws."""
        shown = torch.cat([self._augmented(batch, "real", image) for image in images])
        return list(losses.at_least_fp32(self.discriminator(shown, feature_layer=layer)).chunk(len(images)))

    def after(self, statistics: Terms) -> None:
        """Update the statistics and the spectral norms, after the discriminator's weights were updated."""
        if self.config.lecam_weight:
            self._lecam.lerp_(statistics[f"realness_{self.network}"], 1 - self.config.lecam_decay)
        if self.config.spectral_norm:
            iterate_spectral_norms(self.discriminator)

    def _logits(self, batch: Batch, images: Terms) -> Terms:
        shown = torch.cat([self._augmented(batch, kind, image) for kind, image in images.items()])
        seen = shown if self.config.dino_weights is None else self.system.get_submodule(self.dino)(shown)
        told = self.system.told(batch.label, len(images))
        logits = losses.at_least_fp32(self.discriminator(seen, *told)).chunk(len(images))
        return dict(zip(images, logits, strict=True))

    def _augmented(self, batch: Batch, kind: str, image: Tensor) -> Tensor:
        kinds, probability = self.config.augment, self.config.augment_probability
        if not kinds:
            return image
        name, chosen = f"augment {self.network} {kind}", None
        if probability != 1:
            chosen = batch.uniform(f"{name} chosen", (len(kinds),)) < batch.at(probability)
        return augment(image, kinds, batch.uniform(name, (DRAWS,)), chosen)


def check_patches(networks: NetworkConfig, *adversaries: Adversary) -> None:
    """Raise a ValueError if networks.patches has no effect, as no discriminator sees images."""
    if all(game.config.dino_weights is not None for game in adversaries):
        why = "while every discriminator has dino_weights"
        check_unused(why, **{"networks.patches": (networks.patches, False)})
