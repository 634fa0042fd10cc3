"""Latents: the codes that a trained system's encoder gives images, and their statistics over a set of images."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.dataset import LatentStatistics
from data.images import Format, Size
from data.loader import Samples, read
from models import System
from trainer.batch import normalize
from trainer.blocks import Blocks
from trainer.exact_sum import ExactSum

Of = Literal["draws", "means"]


class LatentEncoder(Blocks):
    """An encoder whose code of an image depends on nothing but that image.

    Args:
        system: a trained system, as `models.load` returns it
        size, channels: of its images
        device: torch's name of a device (default: a GPU if there is one)
        bits: of a channel of its images

    Raises:
        ValueError: the system has no encoder, or the device cannot be used.
    """

    def __init__(self, system: System, size: Size, channels: int, device: str | None = None, bits: int = 8):
        if not system.can("posterior"):
            raise ValueError(f"{type(system).__name__} has no encoder, and so no latents")
        super().__init__(system, size, device)
        self.format = Format(size, channels, bits)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of z given images, both float32 [n, *latent_shape] on the CPU.

        The log-variance is -inf if the code is certain.

        Args:
            pixels: uint8 or uint16 [n, channels, height, width]

        Raises:
            ValueError: a code is not finite.
        """
        parts = [
            self.padded(lambda image: torch.stack(self.system.posterior(normalize(image)), 1), part)
            for part in pixels.split(self.block)
        ]
        mean, log_variance = torch.cat(parts).unbind(1)
        if not (mean.isfinite().all() and (log_variance < torch.inf).all()):  # nan compares as false
            raise ValueError(
                "the codes of some images are not finite: the run has diverged, choose an earlier checkpoint"
            )
        return mean, log_variance


class LatentSums(ExactSum):
    """Sums over the codes of images, which may be added in any order, and over ranks.

    Args:
        channels: of a code, or its numbers if it is no map
        of: "draws" or "means", as `LatentStatistics` has it. The moments of draws are known in closed form, so nothing
            is drawn: var z = var mean + E[variance]
    """

    def __init__(self, channels: int, of: Of = "draws"):
        super().__init__((4, channels), torch.device("cpu"))
        self.of = of

    def update(self, mean: Tensor, log_variance: Tensor | None) -> None:
        """Add the means and log-variances [n, channels, ...] of images; the latter only count for draws."""
        mean = mean.double()
        variance = torch.zeros_like(mean) if self.of == "means" or log_variance is None else log_variance.double().exp()
        moments = torch.stack([mean, mean.square(), variance], 1)
        # numpy's sums do not depend on the number of threads.
        averages = torch.from_numpy(moments.reshape(*moments.shape[:3], -1).numpy().mean(-1))
        self.add(torch.cat([averages, torch.ones_like(averages[:, :1])], 1))

    def compute(self) -> LatentStatistics:
        """Return the statistics.

        Raises:
            ValueError: there are no images, or all latents are the same number.
        """
        total = self.parts.sum(0)
        images = int(total[3, 0])
        if not images:
            raise ValueError("statistics of latents need images, and there are none")
        mean, second = total[0] / images, (total[1] + total[2]) / images
        variance = (second - mean.square()).clamp(min=0)
        shift = mean.mean()
        whole = (variance + (mean - shift).square()).mean().sqrt().item()
        if not whole:
            raise ValueError("all latents are the same number: the run has collapsed, choose an earlier checkpoint")
        return LatentStatistics(images, self.of, mean.tolist(), variance.sqrt().tolist(), shift.item(), 1 / whole)


def latent_statistics(
    encoder: LatentEncoder, sets: Sequence[Samples], num: int | None = None, of: Of = "draws"
) -> LatentStatistics:
    """Return the statistics of the latents of images.

    Args:
        encoder: gives the latents
        sets: images by position, such as `Shards`
        num: how many images of each set, evenly spaced, are measured (default: all)
        of: "draws" or "means"

    Raises:
        DataError: an image is damaged, or cannot be read.
        ValueError: a code is not finite, or all are the same.
    """
    sums = LatentSums(encoder.system.latent_shape[0], of)
    for images in sets:
        count = min(num or len(images), len(images))
        for rows in encoder.rows(count):
            positions = np.array(rows) * len(images) // count
            sums.update(*encoder(read(images, positions, *encoder.format).image))
    return sums.compute()
