"""What a run shows of its codes, to tell by eye whether they are healthy."""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from data.loader import Samples, read
from data.order import random_positions
from models import System
from trainer.batch import normalize, to_uint8
from trainer.config.settings import DataConfig
from trainer.log.pictures import grid

DIMENSIONS, STEPS, FAR = 8, 9, 3.0  # of a traversal: rows, columns, and how far from 0 its ends are
EMBEDDED = 400  # images in the projector


class CodeViews(NamedTuple):
    """How a system codes some images.

    Args:
        means: posterior means [n, numbers of a code]
        kl: KL divergence of posterior and prior by number of the code in nats, the mean over the images; None if codes
            are certain
        traversal: an image while one number of its code goes from -3 to 3, for the numbers with the largest KL, or
            variance; None for codes that are maps
    """

    means: Tensor
    kl: Tensor | None
    traversal: Image.Image | None


class Embedded(NamedTuple):
    """Codes [n, numbers] of images [n, channels, size, size] in [0, 1] and their labels, for the projector."""

    codes: Tensor
    images: Tensor
    labels: list[str]


@torch.no_grad()
def code_views(system: System, real: Tensor) -> CodeViews:
    """Return how a system that reconstructs codes images, uint8 [n, channels, size, size]."""
    mean, log_variance = (part.double() for part in system.posterior(normalize(real)))
    kl = (0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)).mean(0).flatten()
    means = mean.flatten(1)
    certain = not bool(kl.isfinite().all())
    traversal = None if mean.dim() > 2 else _traverse(system, mean[0].float(), means.var(0) if certain else kl)
    return CodeViews(means.cpu(), None if certain else kl.cpu(), traversal)


@torch.no_grad()
def embed(system: System, images: Samples, data: DataConfig, seed: int, device: torch.device) -> Embedded:
    """Return the codes of up to EMBEDDED images, chosen by the seed."""
    found = read(images, random_positions(len(images), min(EMBEDDED, len(images)), seed), data.size, data.channels)
    codes = [system.posterior(normalize(part.to(device)))[0].flatten(1).float().cpu() for part in found.image.split(50)]
    return Embedded(torch.cat(codes), found.image.float() / 255, [str(label) for label in found.label.tolist()])


def _traverse(system: System, code: Tensor, importance: Tensor) -> Image.Image:
    rows = importance.argsort(descending=True)[:DIMENSIONS].tolist()
    codes = code.repeat(len(rows), STEPS, 1)
    for row, number in enumerate(rows):
        codes[row, :, number] = torch.linspace(-FAR, FAR, STEPS, device=code.device)
    images = to_uint8(system.sample(codes.flatten(0, 1))).unflatten(0, (len(rows), STEPS))
    panels = {f"z{number}: {importance[number]:.2g}": images[row] for row, number in enumerate(rows)}
    return grid(panels, STEPS)
