"""A trained system that makes images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import models
from models.load import checkpoint_of
from trainer import schemas
from trainer.batch import to_pixels
from trainer.blocks import Blocks
from trainer.classes import in_turn
from trainer.config.settings import DataConfig
from trainer.latents import LatentEncoder
from trainer.progress import progress

Ability = Literal["sample", "reconstruct", "posterior", "translate"]
# The ability that a system needs for each command.
NEEDS: dict[str, Ability] = {
    "sample": "sample",
    "reconstruct": "reconstruct",
    "decode": "sample",
    "interpolate": "sample",
    "edit": "posterior",
    "neighbours": "posterior",
    "translate": "translate",
}


class Generator(Blocks):
    """Makes a system's images in blocks, so that an image does not depend on how many are made.

    Args:
        path: folder of a checkpoint or of a run
        command: the command that the system must be able to do, of NEEDS; None: any
        device: torch's name of a device
        classes: classes of the images, in turn (default: all of the system's)

    Raises:
        ValueError: there is no such checkpoint, device or class, or the system cannot do this.
    """

    def __init__(
        self, path: Path, command: str | None, device: str | None = None, classes: Sequence[int] | None = None
    ):
        # Only once: a run that is still training may save another one.
        self.checkpoint = checkpoint = checkpoint_of(path)
        system = models.load(checkpoint)
        able = [name for name, ability in NEEDS.items() if system.can(ability)]
        if command is not None and command not in able:
            raise ValueError(f"{type(system).__name__} cannot {command}: choose {' or '.join(able)}")
        saved = schemas.checkpoint(checkpoint).configuration.data
        super().__init__(system, saved.size, device)
        self.data = DataConfig.of_manifest(saved)
        self.format = self.data.format
        self.classes = classes
        for one in classes or ():
            if one >= system.classes:
                known = f"classes 0 to {system.classes - 1}" if system.classes else "no classes: leave it out"
                raise ValueError(f"--classes {one}: the system was trained with {known}")

    @cached_property
    def encoder(self) -> LatentEncoder:
        """The system's encoder, in blocks too; a ValueError says that there is none."""
        return LatentEncoder(self.system, self.size, self.format.channels, self.device, self.format.bits)

    def blocks(self, num: int) -> Iterator[range]:
        """Yield the numbers 0 to num - 1 in blocks, and show how far the command is."""
        return progress(self.rows(num))

    def told(self, rows: Iterable[int]) -> tuple[Tensor, ...]:
        """Return the classes of the images with these numbers, int64 [n], as `System.sample` takes them."""
        return in_turn(self.system, torch.tensor([*rows]), None if self.classes is None else [*self.classes])

    def images(self, use: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """Return the images that `use` makes of the rows of tensors, [n, channels, height, width] on the CPU.

        They have the run's depth: uint8, or uint16 with data.bits 16.

        Raises:
            ValueError: a pixel is not finite.
        """
        try:
            return to_pixels(self.padded(use, *given), self.format.bits)
        except FloatingPointError as error:
            raise ValueError(f"{error}: the run has diverged, choose an earlier checkpoint") from error
