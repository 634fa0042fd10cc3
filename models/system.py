"""What the trainer knows of a system: its networks, its passes, and who moves which weights on which loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from models.settings import OptimizerConfig

Terms = dict[str, Tensor]


class Loss(NamedTuple):
    """What a player lowers, scalars to log, and statistics: tensors whose global mean its `after` gets."""

    value: Tensor
    terms: Terms
    statistics: Terms = {}  # noqa: RUF012 - never written to


class Batch(Protocol):
    """What a system sees of a batch: images, draws and schedules, but no step, rank or seed.

    `images` has one entry a data set; `image` is the first one's: [n, channels, size, size] in [-1, 1].
    """

    images: tuple[Tensor, ...]

    @property
    def image(self) -> Tensor: ...

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The draw `name` from N(0, I), [n, *shape]: the same for every player of a step."""

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The draw `name` from U[0, 1), [n, *shape]: the same for every player of a step."""

    def ramp(self, start: int, steps: int) -> float:
        """What rises linearly from 0 before step `start` to 1 after `steps` more; a jump where `steps` is 0."""

    def due(self, every: int, start: int = 0) -> bool:
        """Whether this step is `start` or a multiple of `every` after it."""

    def positions(self) -> Tensor:
        """int64 [n]: where this part's rows are in the global batch."""

    def placed(self, value: Tensor) -> Tensor:
        """[batch_size, ...] with this part's rows filled: a statistic whose global mean holds every row."""


@dataclass(frozen=True)
class Player:
    """One row of the table of moves.

    Args:
        name: of the player, its optimizer and its settings
        networks: names of the system's children that it may change
        loss: (batch, passes) -> Loss
        optimizer: settings of its optimizer
        every: it moves at steps `start`, `start` + `every`, ...
        start: its first step
        after: called after its move with the global mean of its loss's statistics

    Raises:
        ValueError: a setting of its optimizer is out of its range.
    """

    name: str
    networks: tuple[str, ...]
    loss: Callable[[Batch, Any], Loss]
    optimizer: OptimizerConfig
    every: int = 1
    start: int = 0
    after: Callable[[Terms], None] | None = field(default=None)

    def __post_init__(self) -> None:
        self.optimizer.check(self.name)

    def moves(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0


class System(nn.Module, ABC):
    """Networks (the children) and their game. A subclass's typed `__init__` is its configuration.

    Its children are the networks; those of `frozen` are nobody's to move and no part of a checkpoint. Its own buffers
    are the statistics that players keep from step to step. What it cannot do (sample, reconstruct, translate) it does
    not define, and `can` says so.

    `averaged` names the networks that use after training: those get an exponential moving average.
    """

    averaged: tuple[str, ...]
    frozen: ClassVar[tuple[str, ...]] = ("perceptual",)
    latent_shape: tuple[int, ...] = ()  # of a prior draw; () where there is no prior
    domains: int = 1  # data sets that a batch brings images of
    group: int = 1  # images that a network sees together: micro-batches are multiples of it

    def networks(self) -> dict[str, nn.Module]:
        """The children that some player moves."""
        return {name: child for name, child in self.named_children() if name not in self.frozen}

    def can(self, use: Literal["sample", "reconstruct", "posterior", "translate"]) -> bool:
        return getattr(type(self), use) is not getattr(System, use)

    @abstractmethod
    def passes(self, batch: Batch) -> Any:
        """The forward passes that all players of a step share."""

    @abstractmethod
    def players(self) -> list[Player]:
        """Who moves, in order."""

    def sample(self, z: Tensor) -> Tensor:
        """Images [n, channels, size, size] in [-1, 1] of prior draws z [n, *latent_shape]."""
        raise NotImplementedError(f"{type(self).__name__} does not sample")

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z given images, both [n, *latent_shape]; -inf where the code is certain."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    def reconstruct(self, image: Tensor) -> Tensor:
        """Reconstructions of images [n, channels, size, size] in [-1, 1], without noise."""
        raise NotImplementedError(f"{type(self).__name__} does not reconstruct")

    def translate(self, image: Tensor, direction: Literal["a2b", "b2a"]) -> Tensor:
        """Images of one domain as of the other, [n, channels, size, size] in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} does not translate")


def freeze_all_but(system: System, names: Iterable[str]) -> None:
    """Let gradients reach the named networks only."""
    names = set(names)
    for name, network in system.networks().items():
        network.requires_grad_(name in names)
