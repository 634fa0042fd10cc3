"""Blocks of one size in which a trained system computes, whatever number of images it is given."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from data.images import Size, sides
from models import System
from trainer.precision import strict_fp32


class Blocks:
    """Blocks padded to one size, since a convolution may round differently in another; in float32 as it is written.

    Args:
        system: a trained system, in eval mode; it is moved to the device
        size: of its images
        device: torch's name of a device (default: a GPU if there is one)

    Raises:
        ValueError: the device cannot be used.
    """

    def __init__(self, system: System, size: Size, device: str | None = None):
        self.system, self.size = system, size
        self.block = min(
            64, max(1, 64**3 // math.prod(sides(size)))
        )  # as evaluations; fewer if padding would take minutes
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            system.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device} cannot be used: {str(error).splitlines()[0]}") from error

    def rows(self, num: int) -> list[range]:
        """Return the numbers 0 to num - 1 in blocks."""
        return [range(i, min(i + self.block, num)) for i in range(0, num, self.block)]

    @torch.no_grad()
    def padded(self, use: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """Return `use` of the rows of tensors, at most a block of them, computed on a whole block; on the CPU."""
        with strict_fp32(torch.device(self.device)):
            return use(*map(self._whole, given))[: len(given[0])].cpu()

    def _whole(self, given: Tensor) -> Tensor:
        padding = given.new_zeros(self.block - len(given), *given.shape[1:])
        return torch.cat([given, padding]).to(self.device)
