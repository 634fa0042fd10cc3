"""What the trainer knows of a system: its networks, its passes, and who moves which weights on which loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any, Protocol

from torch import Tensor, nn

Terms = dict[str, Tensor]
Loss = tuple[Tensor, Terms]


class Batch(Protocol):
    """What a system sees of a batch; it knows no step, rank or seed.

    `image` is [n, channels, size, size] in [-1, 1].
    """

    image: Tensor

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The draw `name` from N(0, I), [n, *shape]: the same for every player of a step."""


@dataclass(frozen=True)
class Optimizer:
    """Settings of one player's AdamW (Loshchilov & Hutter 2019; Adam at weight_decay 0).

    Args:
        lr: learning rate
        betas: decay of the running means of the gradient and of its square
        weight_decay: decoupled weight decay
        clip: largest gradient norm over all weights of the player; unset does not clip
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.99)
    weight_decay: float = 0.0
    clip: float | None = None


@dataclass(frozen=True)
class Player:
    """One row of the table of moves.

    Args:
        name: of the player, its optimizer and its settings
        networks: names of the system's children that it may change
        loss: (batch, passes) -> (loss, terms to log), all scalars
        optimizer: settings of its optimizer
        every: it moves at steps divisible by this

    Raises:
        ValueError: a setting of its optimizer is out of its range.
    """

    name: str
    networks: tuple[str, ...]
    loss: Callable[[Batch, Any], Loss]
    optimizer: Optimizer
    every: int = 1

    def __post_init__(self) -> None:
        lr, betas, weight_decay, clip = astuple(self.optimizer)
        setting = f"system.{self.name}"
        check_positive(**{f"{self.name}.lr": lr})
        check_weights(**{f"{self.name}.weight_decay": weight_decay})
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{setting}.betas is {list(betas)}, expected two numbers in [0, 1)")
        if clip is not None and not clip > 0:
            raise ValueError(f"{setting}.clip is {clip}, expected more than 0; leave it unset not to clip")


class System(nn.Module, ABC):
    """Networks (the children) and their game. A subclass's typed `__init__` is its configuration.

    `averaged` names the networks that `sample` and `reconstruct` use: those get an exponential moving average.
    """

    averaged: tuple[str, ...]
    latent_dim: int

    @abstractmethod
    def passes(self, batch: Batch) -> Any:
        """The forward passes that all players of a step share."""

    @abstractmethod
    def players(self) -> list[Player]:
        """Who moves, in order."""

    @abstractmethod
    def sample(self, z: Tensor) -> Tensor:
        """Images [n, channels, size, size] in [-1, 1] of prior draws z [n, latent_dim]."""

    @abstractmethod
    def reconstruct(self, image: Tensor) -> Tensor:
        """Reconstructions of images [n, channels, size, size] in [-1, 1], without noise."""


def freeze_all_but(system: System, names: Iterable[str]) -> None:
    """Let gradients reach the named networks only."""
    names = set(names)
    for name, network in system.named_children():
        network.requires_grad_(name in names)


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
