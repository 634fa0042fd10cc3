"""The memory that a step of one process takes, by a rehearsal on tensors that have shapes but no content."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import group_norm, interpolate, softmax
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from models import Loss, Player
from trainer.batch import Batch
from trainer.config.parser import Config
from trainer.ema import EMA
from trainer.step import TrainStep

Device = Literal["cpu", "cuda"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
PIXEL = 1 + 4  # bytes of a channel of an image: as it was decoded, and as networks see it


@dataclass
class Peak:
    """What a step takes at its highest, in bytes.

    Args:
        gradients: of the weights that move
        activations: outputs kept for backward passes, and all that lives for a moment
        player: who moves then
    """

    gradients: int = 0
    activations: int = 0
    player: str = ""


class Rehearsal:
    """A run's networks, averages and optimizers, and a step of them, as fake tensors: nothing is computed, and a large
    system costs no memory.

    Args:
        config: of the run; its precision is settled
        device: whose rules of mixed precision are followed

    Raises:
        ValueError: a setting of the system is out of its range.
    """

    def __init__(self, config: Config, device: Device):
        self.config, self.device, self.fake = config, device, FakeTensorMode()
        settings = config.trainer
        with self._playing():
            self.system = config.system()
            self.system.players()  # checks their settings
            self.ema = EMA(self.system, settings.ema_half_life, settings.batch_size, settings.ema_ramp)

    def prepare(self, processes: int) -> None:
        """Make the optimizers of a process of so many, with their moments."""
        settings = self.config.trainer
        # DDP averages gradients where they are; those that are averaged flat take memory, which the step shows.
        alone = _Alone(processes if settings.grad_sync == "flat" else 1, settings.precision, self.device)
        with self._playing():
            self.step = TrainStep(cast(Accelerator, alone), self.system, settings.steps, settings.share_passes)
            for mover in self.step.player_states:
                for weight in mover.parameters.values():
                    weight.grad = torch.zeros_like(weight)
                mover.optimizer.step()
                mover.optimizer.zero_grad()

    def peak(self, share: int, micro: int, apart: bool) -> Peak:
        """The highest moment of a step in which every player moves and takes its penalties.

        Args:
            share: images of the process
            micro: of them, go through the networks at once
            apart: gradients lie in memory that is held all the time, and do not count
        """
        with self._playing():
            batches = self._batches(share, micro)
            known = [*self._held(), *(image for batch in batches for image in batch.images)]
            tally, movers = Tally(known, self._gradients, apart), self.step.player_states
            try:
                self.step.player_states = [replace(mover, player=tally.busy(mover.player)) for mover in movers]
                with tally:
                    self.step(batches, 0)
            finally:
                self.step.player_states = movers
        return tally.peak

    def weights(self) -> int:
        """Bytes of the networks, those that nobody moves too, and of statistics."""
        return size_of((*self.system.parameters(), *self.system.buffers()))

    def averages(self) -> int:
        return size_of((*self.ema.system.parameters(), *self.ema.system.buffers()))

    def moments(self) -> int:
        return size_of(self._moments())

    def moved(self) -> int:
        """Bytes of the weights that some player moves, which is what DDP holds for gradients."""
        return size_of(weight for mover in self.step.player_states for weight in mover.parameters.values())

    def images(self, share: int) -> int:
        data = self.config.data
        return share * self.system.domains * data.channels * data.size**2 * PIXEL

    def _batches(self, share: int, micro: int) -> list[Batch]:
        """Micro-batches, of which the second already meets gradients, so that more would add nothing."""
        data = self.config.data
        image = torch.empty(micro, data.channels, data.size, data.size)
        return [
            Busiest((image,) * self.system.domains, slice(i * micro, (i + 1) * micro), *self._source())
            for i in range(min(share // micro, 2))
        ]

    def _source(self) -> tuple[int, int, int]:
        settings = self.config.trainer
        return settings.batch_size, 0, 2**40  # a late step: all have started, and every ramp is 1

    def _held(self) -> Iterator[Tensor]:
        for system in (self.system, self.ema.system):
            yield from (*system.parameters(), *system.buffers())
        yield from self._moments()

    def _moments(self) -> Iterator[Tensor]:
        for mover in self.step.player_states:
            for state in mover.optimizer.state.values():
                yield from state.values()

    def _gradients(self) -> int:
        return size_of(weight.grad for weight in self.system.parameters() if weight.grad is not None)

    @contextmanager
    def _playing(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by copy.deepcopy
            stack.enter_context(self.fake)
            yield


class Busiest(Batch):
    """Rows of a step at which everything is due."""

    def due(self, every: int, start: int = 0) -> bool:
        return True


class Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that live, while it is on.

    Args:
        known: tensors that were there before, and do not count
        gradients: tells the bytes of the gradients that live
        apart: do not count these either
    """

    def __init__(self, known: Iterable[Tensor], gradients: Callable[[], int], apart: bool):
        super().__init__()
        self.gradients, self.apart = gradients, apart
        self.live, self.most, self.mover, self.peak = 0, 0, "", Peak()
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def busy(self, player: Player) -> Player:
        """The player at every step; what lives from its loss on is said to be due to it."""

        def loss(batch: Any, passes: Any) -> Loss:
            self.mover = player.name
            return player.loss(batch, passes)

        return replace(player, every=1, start=0, loss=loss)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        if self.live > self.most:
            self._look()
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.live += size

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size

    def _look(self) -> None:
        gradients = self.gradients()
        counted = self.live - gradients * self.apart
        if counted > self.most:
            self.most = counted
            self.peak = Peak(gradients * (not self.apart), self.live - gradients, self.mover)


class _Alone:
    """What a step asks of accelerate, for a process without others."""

    # Under fp16 a player's scaler adds a few numbers only, and would look at them.
    mixed_precision = "no"

    def __init__(self, processes: int, precision: str | None, device: Device):
        self.num_processes, self.precision = processes, precision
        self.rules = device
        self.device = torch.device("cpu")

    @contextmanager
    def autocast(self) -> Iterator[None]:
        half = HALF.get(self.precision or "no")
        with ExitStack() as stack:
            if half:
                stack.enter_context(torch.autocast("cpu", half))
                if self.rules == "cuda":
                    stack.enter_context(OnGPU())
            yield

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value.clone()  # as accelerate does

    def gather(self, value: Tensor) -> Tensor:
        return value


class OnGPU(TorchFunctionMode):
    """Autocast as it is on a GPU, of what networks here are made of: these keep fp32 there, and not on a CPU."""

    full = frozenset({group_norm, interpolate, softmax, torch.softmax, Tensor.softmax})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.full:
            args = [value.float() if isinstance(value, Tensor) else value for value in args]
        return func(*args, **(kwargs or {}))


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; memory that several share counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
