"""A trained system that makes images."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import models
from models.load import checkpoint_of
from trainer import schemas
from trainer.batch import to_uint8
from trainer.precision import strict_fp32

Ability = Literal["sample", "reconstruct", "translate"]
# The ability that a system needs for each command.
NEEDS: dict[str, Ability] = dict(
    sample="sample", reconstruct="reconstruct", interpolate="sample", translate="translate"
)


class Generator:
    """Makes a system's images in blocks padded to one size, since a convolution may round differently in another.

    Args:
        path: folder of a checkpoint or of a run
        command: the command that the system must be able to do, of NEEDS
        device: torch's name of a device

    Raises:
        ValueError: there is no such checkpoint or device, or the system cannot do this.
    """

    def __init__(self, path: Path, command: str, device: str | None = None):
        checkpoint = checkpoint_of(path)  # only once: a run that is still training may save another one
        self.system = models.load(checkpoint)
        able = [name for name, ability in NEEDS.items() if self.system.can(ability)]
        if command not in able:
            raise ValueError(f"{type(self.system).__name__} cannot {command}: choose {' or '.join(able)}")
        saved = schemas.checkpoint(checkpoint)
        self.size, self.channels = saved.configuration.data.size, saved.configuration.data.channels
        self.block = min(64, max(1, 64**3 // self.size**2))  # as evaluations; fewer if padding would take minutes
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.system.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device} cannot be used: {str(error).splitlines()[0]}") from error

    def blocks(self, num: int) -> Iterable[range]:
        """Return the numbers 0 to num - 1 in blocks, with a progress bar if stderr is a terminal."""
        return tqdm([range(i, min(i + self.block, num)) for i in range(0, num, self.block)], disable=None)

    def padded(self, use: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """Return `use` of the rows of `given`, at most a block of them, computed on a whole block; on the CPU."""
        padding = given.new_zeros(self.block - len(given), *given.shape[1:])
        with strict_fp32(torch.device(self.device)):
            return use(torch.cat([given, padding]).to(self.device))[: len(given)].cpu()

    def images(self, use: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """Return the images that `use` makes of the rows of `given`, uint8 [n, channels, size, size] on the CPU.

        Raises:
            ValueError: a pixel is not finite.
        """
        try:
            return to_uint8(self.padded(use, given))
        except FloatingPointError as error:
            raise ValueError(f"{error}: the run has diverged, choose an earlier checkpoint") from error
