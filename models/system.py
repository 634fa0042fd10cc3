"""What the trainer knows of a system: its networks, its passes, and which player trains which weights on which loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from models.losses import at_least_fp32
from models.settings import OptimizerConfig

Terms = dict[str, Tensor]


class Loss(NamedTuple):
    """A player's loss, scalars to log, and statistics: tensors whose mean over the global batch its `after` gets."""

    value: Tensor
    terms: Terms
    statistics: Terms = {}  # noqa: RUF012 - never written to


class Batch(Protocol):
    """A batch as a system sees it: images, random draws and schedules, but no step, rank or seed.

    `images` has one entry per data set; `image` is the first one's: [n, channels, size, size] in [-1, 1].
    """

    images: tuple[Tensor, ...]

    @property
    def image(self) -> Tensor: ...

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the draw `name` from N(0, I), [n, *shape]: the same for every player of a step."""

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the draw `name` from U[0, 1), [n, *shape]: the same for every player of a step."""

    def ramp(self, start: int, steps: int) -> float:
        """Return 0 before step `start`, then a linear rise to 1 in `steps` more; a jump to 1 if `steps` is 0."""

    def due(self, every: int, start: int = 0) -> bool:
        """Return whether this step is `start`, or a multiple of `every` after it."""

    def positions(self) -> Tensor:
        """Return the positions of these rows in the global batch, int64 [n]."""

    def placed(self, value: Tensor) -> Tensor:
        """Return [batch_size, ...] with these rows filled in, a statistic whose global mean contains every row."""


@dataclass(frozen=True)
class Player:
    """A row of the table of players: an optimizer that trains some networks on one loss.

    Args:
        name: name of the player, its optimizer and its settings
        networks: names of the system's children that it trains
        loss: (batch, passes) -> Loss
        optimizer: settings of its optimizer
        every: steps between its updates
        start: step of its first update
        after: called after each update with the mean of its loss's statistics over the global batch

    Raises:
        ValueError: a setting of its optimizer is out of its range.
    """

    name: str
    networks: tuple[str, ...]
    loss: Callable[[Batch, Any], Loss]
    optimizer: OptimizerConfig
    every: int = 1
    start: int = 0
    after: Callable[[Terms], None] | None = None

    def __post_init__(self) -> None:
        self.optimizer.check(self.name)

    def moves(self, step: int) -> bool:
        """Return whether it updates its networks at this step."""
        return step >= self.start and (step - self.start) % self.every == 0


class System(nn.Module, ABC):
    """Networks and how they are trained.

    A subclass's typed `__init__` is its configuration, whose help is its docstring; it raises a ValueError that names
    the setting if one is out of its range or has no effect. The children are the networks. Buffers of the system itself
    are statistics that players keep from step to step. A system defines those of `sample`, `reconstruct`, `posterior`
    and `translate` that it is capable of.
    """

    averaged: tuple[str, ...]  # networks that are used after training: the EMA averages these
    frozen: ClassVar[tuple[str, ...]] = ("perceptual",)  # children that nobody trains and no checkpoint contains
    latent_shape: tuple[int, ...] = ()  # of a draw from the prior; () without a prior
    domains: int = 1  # data sets per batch
    group: int = 1  # images that a network sees as a group: micro-batches are multiples of it

    def networks(self) -> dict[str, nn.Module]:
        """Return the children that some player trains, by name."""
        return {name: child for name, child in self.named_children() if name not in self.frozen}

    def can(self, use: Literal["sample", "reconstruct", "posterior", "translate"]) -> bool:
        """Return whether the system defines this use."""
        return getattr(type(self), use) is not getattr(System, use)

    @abstractmethod
    def passes(self, batch: Batch) -> Any:
        """Run the forward passes that all players of a step share."""

    @abstractmethod
    def players(self) -> list[Player]:
        """Return the players in the order in which they are updated."""

    def sample(self, z: Tensor) -> Tensor:
        """Decode draws from the prior [n, *latent_shape] to images [n, channels, size, size] in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} does not sample")

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of z given images, both [n, *latent_shape]; -inf if the code is certain."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    def reconstruct(self, image: Tensor) -> Tensor:
        """Return reconstructions of images, without noise: [n, channels, size, size] in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} does not reconstruct")

    def translate(self, image: Tensor, direction: Literal["a2b", "b2a"]) -> Tensor:
        """Return images of one domain as images of the other: [n, channels, size, size] in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} does not translate")


class Autoencoding:
    """A mixin for systems with an `encoder` of means and log-variances and a `decoder`; it goes before `System`."""

    encoder: nn.Module
    decoder: nn.Module

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = at_least_fp32(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decoder(self.posterior(image)[0])


def freeze_all_but(system: System, names: Iterable[str]) -> None:
    """Let gradients reach the named networks only."""
    names = set(names)
    for name, network in system.networks().items():
        network.requires_grad_(name in names)
