"""What a run shows of its codes, to tell by eye whether they are healthy."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.dataset import read_dataset
from data.loader import Samples, read
from data.order import random_positions
from data.redact import printable
from models import System
from trainer.batch import normalize, to_uint8
from trainer.config.settings import DataConfig
from trainer.log.pictures import GRID, grid, thumbnails

DIMENSIONS, STEPS, FAR = 8, 9, 3.0  # of a traversal: rows, columns, and how many deviations from 0 its ends are
EMBEDDED, THUMBNAIL = 400, 32  # images in the projector, and their side in pixels


class CodeViews(NamedTuple):
    """How a system codes some images.

    Args:
        means: posterior means [n, numbers of a code]
        kl: KL divergence of posterior and prior by number of the code in nats, the mean over the images; None if codes
            are certain
        traversal: an image while one number of its code goes from -3 to 3 deviations, for the numbers with the largest
            KL, or variance if codes are certain; None for codes that are maps
    """

    means: Tensor
    kl: Tensor | None
    traversal: Image.Image | None


class Embedded(NamedTuple):
    """Codes [n, numbers of a code] of images, their labels, and thumbnails [n, channels, side, side] in [0, 1]."""

    codes: Tensor
    labels: list[str]
    images: Tensor


@torch.no_grad()
def code_views(system: System, real: Tensor, label: Tensor | None = None) -> CodeViews:
    """Return how a system with an encoder codes images, uint8 [n, channels, height, width], of classes [n].

    Raises:
        FloatingPointError: an image of the traversal is not finite.
    """
    mean, log_variance = (part.double() for part in system.posterior(normalize(real)))
    kl = (0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)).mean(0)
    certain = not bool(kl.isfinite().all())  # their variance is 0
    traversal = None
    if mean.dim() == 2:
        variance = mean.var(0, correction=0)  # a single image has one, too
        deviation = variance.sqrt() if certain else torch.ones_like(kl)  # the prior's
        told = () if label is None else system.told(label[:1], STEPS)
        traversal = _traverse(system, told, mean[0], deviation, *(("variance", variance) if certain else ("KL", kl)))
    return CodeViews(mean.flatten(1).cpu(), None if certain else kl.flatten().cpu(), traversal)


def _traverse(
    system: System, told: tuple[Tensor | None, ...], code: Tensor, deviation: Tensor, what: str, importance: Tensor
) -> Image.Image:
    panels, places = {}, torch.linspace(-FAR, FAR, STEPS, device=code.device, dtype=code.dtype)
    for number in importance.argsort(descending=True)[:DIMENSIONS].tolist():
        codes = code.repeat(STEPS, 1)
        codes[:, number] = places * deviation[number]
        panels[f"z{number}, {what} {importance[number]:.2g}"] = to_uint8(system.sample(codes.float(), *told))
    return grid(panels, STEPS)


@torch.no_grad()
def embed(system: System, images: Samples, data: DataConfig, seed: int, device: torch.device) -> Embedded:
    """Return the codes of up to EMBEDDED held-out or training images, which the seed chooses.

    Raises:
        DataError: an image is damaged.
    """
    codes, labels, shown = list[Tensor](), list[str](), list[Tensor]()
    dataset = read_dataset(Path((data.tests or data.trains)[0]).parent)
    positions = random_positions(len(images), EMBEDDED, seed)
    for part in np.array_split(positions, math.ceil(len(positions) / GRID)):
        found = read(images, part, *data.format)
        codes.append(system.posterior(normalize(found.image.to(device)))[0].flatten(1).float().cpu())
        names = [dataset.class_name(one) if dataset and one >= 0 else str(one) for one in found.label.tolist()]
        labels += [printable(name, keep="") for name in names]
        shown.append(thumbnails(found.image, THUMBNAIL))
    return Embedded(torch.cat(codes), labels, torch.cat(shown))
