"""The FLOPs of training steps, counted on fake tensors, and the share of a GPU's peak that they take (MFU)."""

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import DiscriminatorConfig, Player
from trainer.batch import Batch
from trainer.config.parser import Config
from trainer.step import TrainStep, frozen_networks
from trainer.step_memory import fake_accelerator

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

BEGIN = 60.0  # seconds after which rates are logged, so that short runs do not wait for the count
# TFLOP/s of dense products, in bf16 or fp16 and in fp32, as NVIDIA's data sheets of these GPUs have them. fp32 is TF32,
# in which torch computes convolutions by default, where the GPU has it. The first name within a GPU's counts.
PEAKS: dict[str, tuple[float, float]] = {
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417),
    "H100": (989, 494),  # SXM
    "H200": (989, 494),
    "A100": (312, 156),
    "L40S": (362, 183),
    "RTX 4090": (165, 82.6),  # the sums of half precision in fp32, as torch has them
    "T4": (65, 8.1),
}


def peak_tflops(device: str, precision: str | None) -> float | None:
    """Return the peak TFLOP/s of a GPU by the name that torch gives it, or None if it is not known.

    Args:
        device: such as "NVIDIA H100 80GB HBM3"
        precision: no, bf16 or fp16
    """
    words = f" {re.sub('[ -]', ' ', device)} "
    name = next((name for name in PEAKS if f" {name} " in words and "Laptop" not in words), "")
    if not name or (precision == "bf16" and name == "T4"):  # it has no units for bf16
        return None
    half, single = PEAKS[name]
    return half if precision in ("bf16", "fp16") else single


class StepFlops:
    """The FLOPs that the mathematics of a step needs, of the convolutions and matrix products of all its passes.

    Passes that are only replayed (`trainer.micro_batch`, `trainer.share_passes`, `trainer.activation_checkpointing`)
    are not counted. Steps in which the same players move with the same penalties are counted once, in about a second.

    Args:
        config: the run's settings
        images: images of a process in a step
    """

    def __init__(self, config: Config, images: int):
        self.config, self.images, self.counted = config, images, dict[Any, int]()
        self.step: TrainStep | None = None
        self.fake, self.made = FakeTensorMode(), time.monotonic()

    def __call__(self, steps: Sequence[int]) -> float:
        """Return the mean FLOPs of one process in each of these steps, counted from 0."""
        if self.step is None:
            alone: Any = fake_accelerator(1, None)
            with self.fake:
                system = self.config.system()
                system.hold(slice(0, self.images), self.images)
                frozen = frozen_networks(system, self.config.trainer.train_only)
                self.step = TrainStep(alone, system, self.config.trainer.steps, frozen=frozen)
        players = [player_state.player for player_state in self.step.player_states]
        kinds = {step: tuple(kind_of_move(player, step) for player in players) for step in steps}
        for kind in set(kinds.values()) - self.counted.keys():
            self.counted[kind] = self._count(self.step, next(step for step in steps if kinds[step] == kind))
        return sum(self.counted[kind] for kind in kinds.values()) / len(steps)

    def rates(self, steps: Sequence[int], per_second: float, device: torch.device) -> dict[str, float]:
        """Return `speed/tflops` of one process and, if its device's peak is known, `speed/mfu`; nothing at first.

        Args:
            steps: steps that were taken, counted from 0
            per_second: how many of them in a second
            device: where they were taken
        """
        if time.monotonic() - self.made < BEGIN or not steps:
            return {}
        tflops = self(steps) * per_second / 1e12
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_tflops(name, self.config.trainer.precision)
        return {"speed/tflops": tflops} | ({"speed/mfu": tflops / peak} if peak else {})

    def _count(self, train_step: TrainStep, step: int) -> int:
        data = self.config.data
        # The counter knows no fused attention of CPUs.
        with self.fake, sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
            shape = (self.images, *data.shape)
            images = tuple(torch.empty(shape) for _ in range(train_step.system.domains))
            label = torch.zeros(self.images, dtype=torch.int64)
            train_step([Batch(images, slice(0, self.images), self.images, 0, step, label)], step)
        return counter.get_total_flops()


def flop_counter() -> "FlopCounterMode":
    """Return torch's FLOP counter with a corrected formula for the backward pass of grouped convolutions.

    torch's own formula counts the gradient of their weights as if the convolution had no groups.
    """
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count  # Triton's import takes half a second

    def convolution_backward(gradient: Any, image: Any, weight: Any, *settings: Any, **_: Any) -> int:
        transposed, mask = settings[4], settings[7]
        return sum(mask[:2]) * conv_flop_count(image, weight, gradient, transposed)  # each as much as forwards

    formulas = {torch.ops.aten.convolution_backward: convolution_backward}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def kind_of_move(player: Player, step: int) -> tuple[bool, bool, bool]:
    """Return whether a player counts for others, is updated in a step, and whether its gradient penalties are due."""
    config, since = player.optimizer, step - player.start
    penalized = isinstance(config, DiscriminatorConfig) and config.penalized
    due = penalized and since % (player.every * getattr(config, "penalty_every", 1)) == 0
    return step >= max(player.starts), player.moves(step), since >= 0 and due
