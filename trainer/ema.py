"""The exponential moving average of the networks that make images."""

import copy

import torch

from models import System


class EMA:
    """A copy of a system that holds averaged networks only, and follows the system's own.

    Args:
        system: not yet wrapped for distribution
        half_life: images after which an old weight counts half
        batch_size: images a step
        ramp: the half-life is at most this share of the images seen (Karras et al. 2020), so that a run's first
            weights are forgotten
    """

    def __init__(self, system: System, half_life: int, batch_size: int, ramp: float = 0.05):
        self.system = copy.deepcopy(system).eval().requires_grad_(False)
        for name, _ in list(self.system.named_children()):
            if name not in system.averaged:
                delattr(self.system, name)
        self.half_life, self.batch_size, self.ramp = half_life, batch_size, ramp
        self.pairs = [
            (mine, theirs)
            for name in system.averaged
            for mine, theirs in zip(
                self.system.get_submodule(name).parameters(), system.get_submodule(name).parameters(), strict=True
            )
        ]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Follow the weights after `steps` steps of the run."""
        half_life = min(self.half_life, steps * self.batch_size * self.ramp)
        weight = 1 - 0.5 ** (self.batch_size / half_life)
        torch._foreach_lerp_([mine for mine, _ in self.pairs], [theirs for _, theirs in self.pairs], weight)
