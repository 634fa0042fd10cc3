"""The memory that a training step takes, counted on fake tensors, which have shapes but take none.

`MemoryTracker` is our own because MemTracker of torch.distributed._tools, which finds the same peaks, raises
NotImplementedError as soon as a step calls one network twice, as GANs and micro-batches do.
"""

import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import group_norm, interpolate, softmax
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from models import Player
from trainer.batch import Batch
from trainer.config.parser import Config
from trainer.ema import EMA
from trainer.networks import checkpoint_activations
from trainer.step import PlayerState, TrainStep, frozen_networks


class FakeRun:
    """One process's networks, averages and optimizers as fake tensors, which have shapes but take no memory.

    `held` has the bytes of each kind of tensors that are there between steps.
    """

    def __init__(self, config: Config, device: str, processes: int):
        self.config, settings, self.fake, self.tracker = config, config.trainer, FakeTensorMode(), MemoryTracker()
        self.cuda_autocast = device == "cuda" and settings.precision != "no"
        buckets = processes > 1 and settings.grad_sync == "ddp"
        alone: Any = fake_accelerator(1 if buckets else processes, settings.precision)
        with self.fake, self.tracker as tracker, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by EMA's copy
            self.system, sizes = config.system(), [tracker.live]
            self.ema = EMA(
                self.system, settings.ema_half_life, settings.batch_size, settings.ema_ramp, settings.ema_lengths
            )
            sizes.append(tracker.live)
            checkpoint_activations(self.system, settings.activation_checkpointing)
            self.system.hold(slice(0, max(1, settings.batch_size // processes)), settings.batch_size)
            sizes.append(tracker.live)
            self.frozen = frozen_networks(self.system, settings.train_only)
            self.step = TrainStep(alone, self.system, settings.steps, settings.share_passes, frozen=self.frozen)
            for state in self.step.player_states:
                _make_gradients(state)
                state.optimizer.step()  # makes the moments
                state.optimizer.zero_grad()
            sizes.append(tracker.live)
            # DDP keeps gradients between steps; without it they are made in each.
            self.buckets = [_make_gradients(state) for state in self.step.player_states if buckets]
            sizes.append(tracker.live)
        names = ("weights", "averages", "by_position", "moments", "gradients")
        self.held = {name: size - before for name, size, before in zip(names, sizes, [0, *sizes], strict=False)}

    def peak(self, per_rank_batch: int, micro_batch: int) -> tuple[int, str]:
        """Return the most bytes that a step adds to those held between steps, and the player that is updated then.

        Args:
            per_rank_batch: images of the process in a step, in which every player is updated with all its penalties
            micro_batch: images of a micro-batch
        """
        data, step, tracker = self.config.data, self.step, self.tracker
        step.player_states = [replace(state, player=tracker.watch(state.player)) for state in step.player_states]
        # Two micro-batches suffice: the second one adds to gradients. At a late step all ramps are at 1.
        rows = [slice(i * micro_batch, (i + 1) * micro_batch) for i in range(min(per_rank_batch // micro_batch, 2))]
        with self.fake, tracker, CudaAutocast() if self.cuda_autocast else nullcontext():
            images = (torch.empty(micro_batch, *data.shape),) * self.system.domains
            label = torch.zeros(micro_batch, dtype=torch.int64)
            before = tracker.peak = tracker.live
            size = self.config.trainer.batch_size
            step([BusiestBatch(images, part, size, 0, 2**40, label) for part in rows], 0)
        return tracker.peak - before, tracker.player


def _make_gradients(state: PlayerState) -> list[Tensor]:
    for weight in state.parameters.values():
        weight.grad = torch.zeros_like(weight)
    return [weight.grad for weight in state.parameters.values() if weight.grad is not None]


class BusiestBatch(Batch):
    """A batch at which every penalty is due."""

    def due(self, every: int, start: int = 0) -> bool:
        return True


class MemoryTracker(TorchDispatchMode):
    """A mode that counts the bytes of the tensors that are made while it is on and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.updated, self.player = 0, 0, "", ""
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    def watch(self, player: Player) -> Player:
        """Return the player as one that is updated at every step, and that this tracker can name."""

        def loss(batch: Any, passes: Any) -> Any:
            self.updated = player.name
            return player.loss(batch, passes)

        return replace(player, every=1, start=0, loss=loss)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in (value.untyped_storage() for value in tree_iter(made) if isinstance(value, Tensor)):
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        if self.live > self.peak:
            self.peak, self.player = self.live, self.updated
        return made

    def _free(self, size: int) -> None:
        self.live -= size


class CudaAutocast(TorchFunctionMode):
    """CUDA's rules of autocast on a CPU: these operations of the networks stay in float32 on CUDA alone."""

    in_float32 = frozenset({group_norm, interpolate, softmax, torch.softmax, Tensor.softmax})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.in_float32:
            args = [value.float() if isinstance(value, Tensor) else value for value in args]
        return func(*args, **(kwargs or {}))


def fake_accelerator(
    processes: int, precision: str | None, device: torch.device = torch.device("cpu")
) -> SimpleNamespace:
    """Return what a step and an extractor use of accelerate's Accelerator, for tensors of a device."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or "no")
    return SimpleNamespace(
        num_processes=processes,
        mixed_precision="no",  # under fp16 a loss scaler would read values
        device=device,
        is_main_process=True,
        autocast=lambda: torch.autocast(device.type, half, enabled=half is not None),
        reduce=lambda value, _: value.clone(),  # as accelerate's
        wait_for_everyone=lambda: None,
    )
