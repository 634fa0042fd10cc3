"""What the trainer knows of a system: its networks, its passes, and which player trains which weights on which loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.losses import at_least_fp32
from models.schedule import Varying
from models.settings import DiscriminatorConfig, OptimizerConfig

Terms = dict[str, Tensor]


class Loss(NamedTuple):
    """A player's loss, scalars to log, and what its `after` gets.

    Args:
        value: the loss, a scalar
        terms: scalars to log
        statistics: tensors whose mean over the global batch `after` gets
        by_position: tensors with a row for each of the batch's [n, ...]; `after` gets those of all this process's rows,
            and no other process does
    """

    value: Tensor
    terms: Terms
    statistics: Terms = {}  # noqa: RUF012 - never written to
    by_position: Terms = {}  # noqa: RUF012


class Batch(Protocol):
    """A batch as a system sees it: images, random draws and schedules, but no step, rank or seed."""

    images: tuple[Tensor, ...]  # one entry per data set: [n, channels, height, width] in [-1, 1]
    label: Tensor | None  # of the first one's images, int64 [n]; checked for a system with classes

    @property
    def image(self) -> Tensor: ...  # the first one's

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the draw `name` from N(0, I), [n, *shape]: the same for every player of a step."""

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the draw `name` from U[0, 1), [n, *shape]: the same for every player of a step."""

    def common(self, name: str, count: int) -> list[float]:
        """Return the draw `name` of numbers from U[0, 1) that all images of a step share; no device computes them."""

    def ramp(self, start: int, steps: int) -> float:
        """Return 0 before step `start`, then a linear rise to 1 in `steps` more; a jump to 1 if `steps` is 0."""

    def at(self, setting: Varying) -> float:
        """Return the value at this step of a setting that may vary."""

    def due(self, every: int, start: int = 0) -> bool:
        """Return whether this step is `start`, or a multiple of `every` after it."""

    def positions(self) -> Tensor:
        """Return the positions of these rows in the global batch, int64 [n]."""


@dataclass(frozen=True)
class Player:
    """A row of the table of players: an optimizer that trains some networks on one loss."""

    name: str  # of its optimizer and of its settings, too
    networks: tuple[str, ...]  # names of the system's children that it trains
    loss: Callable[[Batch, Any], Loss]  # of a batch and its passes
    optimizer: OptimizerConfig
    every: int = 1  # steps between its updates
    start: int = 0  # step of its first update
    after: Callable[[Terms], None] | None = None  # called after an update with the loss's statistics and by_position

    def __post_init__(self) -> None:
        self.optimizer.check(self.name)

    @property
    def starts(self) -> set[int]:
        """The step of its first update, and the one from which on it counts for its opponents."""
        config = self.optimizer
        return {self.start, config.first_counting if isinstance(config, DiscriminatorConfig) else self.start}

    def moves(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0


class System(nn.Module, ABC):
    """Networks and how they are trained.

    A subclass's typed `__init__` is its configuration, and its docstring is the help of the settings that are not
    described here. The children are the networks. Buffers of the system itself are what players keep from step to step:
    statistics, which are the same on all processes, and those named in `by_position`, of which a process holds only the
    rows of its own positions of the global batch, so that no step exchanges them. A system defines those of `sample`,
    `reconstruct`, `posterior` and `translate` that it is capable of.

    Args:
        image_size: side of square images in pixels, or height and width; set by data.size
        channels: 1 (grey), 3 (colour), 4 (colour and alpha), or others; set by data.channels
        latent_dim: numbers per code, or channels of the code's map if networks.latent_stride is set; raise it for
            sharper reconstructions
        networks: architecture of the networks
        classes: number of classes that images are told apart by, 0 for none. The label of an image (`.cls` in its
            shard), from 0 to classes - 1, is given to the decoder, which gets a learned vector of the class beside z,
            and to the discriminators, whose logits get the class's projection of their features (Miyato & Koyama 2018).
            A generated image has the label of the training image at its position of the batch, so that both have the
            same shares of classes. Set it if the data has labels: samples are better, and of a class that one chooses
        kl_warmup: steps in which kl_weight rises linearly from 0; raise it if the KL term falls to 0 early
        free_bits: nats per number of a code below which the KL term does not count, against codes that carry nothing
            (Kingma et al. 2016)
        codes: what makes codes easier for a model that is trained on them; null adds nothing
        autoencoder: optimizer of encoder and decoder
        generator: optimizer of the decoder, and of the encoder if there is one
        binary: settings of the binary discriminator
    """

    averaged: tuple[str, ...]  # networks that are used after training: the EMA averages these
    architecture: ClassVar[tuple[str, ...]] = ("latent_dim", "networks")  # settings that shape the averaged networks
    # children that nobody trains and no checkpoint contains
    frozen: ClassVar[tuple[str, ...]] = ("perceptual", "dino_binary", "dino_ternary", "dino_codes")
    latent_shape: tuple[int, ...] = ()  # of a draw from the prior; () without a prior
    domains: int = 1  # data sets per batch
    classes: int = 0  # of labels that the networks are given
    judged_by: Literal["fid", "rfid"] = "fid"  # of samples or translations, or of reconstructions: what it is for
    stride: int | None = None  # of images of any size that it translates, whose sides are multiples of it
    by_position: tuple[str, ...] = ()  # buffers [positions, ...], which `hold` makes; for training only
    rows: slice = slice(0, 0)  # the positions of these buffers
    groups: Mapping[str, int] = {}  # by setting, images that a network sees as a group; micro-batches are multiples

    def networks(self) -> dict[str, nn.Module]:
        """Return the children that are trained, by name."""
        return {name: child for name, child in self.named_children() if name not in self.frozen}

    def can(self, use: Literal["sample", "reconstruct", "posterior", "translate"]) -> bool:
        return getattr(type(self), use) is not getattr(System, use)

    def statistics(self) -> dict[str, Tensor]:
        """Return the system's own buffers that are the same on all processes, by name."""
        return {name: value for name, value in self.named_buffers(recurse=False) if name not in self.by_position}

    def hold(self, rows: slice, batch_size: int) -> None:
        """Make the buffers in `by_position` anew for some positions of the global batch; call it before training.

        A system that has such buffers extends this. It registers them as not persistent, all zeros at first, of shapes
        [rows, ...] whose rest depends on the settings and on `batch_size` alone.

        Args:
            rows: the positions that this process computes
            batch_size: images of the global batch
        """
        self.rows = rows

    @abstractmethod
    def passes(self, batch: Batch) -> Any:
        """Run the forward passes that all players of a step share."""

    @abstractmethod
    def players(self) -> list[Player]:
        """Return the players in the order in which they are updated."""

    def check_frozen(self, names: Collection[str]) -> None:
        """Raise a ValueError that names a setting that needs one of these networks, which are not trained."""

    def told(self, label: Tensor | None, copies: int = 1) -> tuple[Tensor | None, ...]:
        """Return labels, repeated, as further arguments of networks that are given them; none without `classes`."""
        if not self.classes:
            return ()
        return (label if label is None else label.repeat(copies),)

    def sample(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Decode draws from the prior [n, *latent_shape] to images [n, channels, height, width] in [-1, 1].

        `label`, int64 [n], is each image's class; a system with `classes` needs it, and no other gets it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not sample")

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of z given images, both [n, *latent_shape]; -inf if the code is certain."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Return reconstructions of images, without noise: [n, channels, height, width] in [-1, 1].

        `label` is as in `sample`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not reconstruct")

    def translate(self, image: Tensor, direction: Literal["a2b", "b2a"]) -> Tensor:
        """Return images of one domain as images of the other: [n, channels, height, width] in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} does not translate")


class Autoencoding:
    """A mixin before `System` for an `encoder` of means and log-variances and a `decoder`."""

    encoder: nn.Module
    decoder: nn.Module
    told: Callable[..., tuple[Tensor | None, ...]]

    def sample(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.decoder(z, *self.told(label))

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = at_least_fp32(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # as diffusers has it: exp() of more overflows in half precision

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        return self.sample(self.posterior(image)[0], label)


def last_layer(network: nn.Module) -> Any:
    """Return the layer that makes a network's images: its `last`, also if DDP wraps the network."""
    return (network.module if isinstance(network, DistributedDataParallel) else network).last
