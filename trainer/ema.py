"""The exponential moving averages of the networks that make images."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models import System
from models.schedule import Varying, at
from trainer.posthoc import POWER, exponent


class EMA:
    """A copy of a system with averaged networks only, which follow the system's own.

    Args:
        system: the system, before its networks are wrapped for distribution
        half_life: images after which an old weight counts half; while it is 0 the averages are the weights
        batch_size: images per step
        ramp: the half-life is at most this share of the images so far (Karras et al. 2020), so that the averages forget
            a run's first weights
        lengths: of further averages by power functions, from which trainer.posthoc makes those of other lengths
    """

    def __init__(
        self, system: System, half_life: Varying, batch_size: int, ramp: float = 0.05, lengths: Sequence[float] = ()
    ):
        self.system = _copy(system)
        self.half_life, self.batch_size, self.ramp = half_life, batch_size, ramp
        self.averages = _weights(self.system, system.averaged)
        self.weights = _weights(system, system.averaged)
        self.powers = {length: _copy(system) for length in lengths}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Average in the weights after `steps` steps of the run."""
        half_life = min(at(self.half_life, steps - 1), steps * self.batch_size * self.ramp)
        keep = 0.5 ** (self.batch_size / half_life) if half_life > 0 else 0.0
        torch._foreach_lerp_(self.averages, self.weights, 1 - keep)
        for length, system in self.powers.items():
            kept = (1 - 1 / steps) ** (exponent(length) + 1)  # Karras et al. 2024, eq. 127
            torch._foreach_lerp_(_weights(system, system.averaged), self.weights, 1 - kept)

    def networks(self) -> dict[str, nn.Module]:
        """Return the averaged networks by the names of their files in a checkpoint."""
        named = {"ema": self.system} | {f"{POWER}{length:g}": system for length, system in self.powers.items()}
        return {f"{kind}.{name}": one for kind, system in named.items() for name, one in system.named_children()}


def _copy(system: System) -> System:
    """Return a copy of a system with its averaged networks only."""
    # A dry run's fake tensors can be copied only once, so this must get the system itself, not a copy.
    copied = copy.deepcopy(system).eval().requires_grad_(False)
    for name, _ in list(copied.named_children()):
        if name not in system.averaged:
            delattr(copied, name)
    return copied


def _weights(system: System, names: tuple[str, ...]) -> list[Tensor]:
    return [weight for name in names for weight in system.get_submodule(name).parameters()]
