"""Grids of a system's images."""

import math
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from data.deep import encode
from data.loader import Samples, read
from data.order import random_positions
from models import System
from models.resize import resize
from trainer.batch import normalize, to_uint8, visible_pixels
from trainer.classes import check_labels, in_turn
from trainer.config.settings import DataConfig
from trainer.draws import key
from trainer.log.charts import KINDS

GRID, COLUMNS = 48, 12  # images in each panel of a run's grids, and of those in a row, at most
WIDE, LARGE = 2048, 2**20  # pixels of a row, and of a panel of more rows, at most: a grid is written at every save
MADE_OF_IMAGES = re.compile(r"reconstructed|translated |. to .")  # titles of panels
Panels = dict[str, Tensor]  # uint8 images [n, channels, height, width] by title


class GridInputs(NamedTuple):
    """What a grid shows, on the system's device."""

    real: list[Tensor]  # images of each dataset, uint8 [n, channels, height, width]
    label: Tensor  # of the first dataset's, int64 [n]
    z: Tensor | None  # draws from the prior, [n, *latent_shape], unless none are shown
    drawn: tuple[Tensor, ...]  # their classes, int64 [n], if the system has any

    def part(self, rows: slice) -> "GridInputs":
        drawn = tuple(label[rows] for label in self.drawn)
        z = None if self.z is None else self.z[rows]
        return GridInputs([images[rows] for images in self.real], self.label[rows], z, drawn)


def panel_size(classes: int, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return how many images of a shape a row and a panel of a run's grids have: fewer of large ones.

    With classes each column shows one, of the first if many.
    """
    _, height, width = shape
    most = max(1, min(COLUMNS, WIDE // width))
    row = most // classes * classes if 0 < classes <= most else most
    return row, max(1, min(GRID, LARGE // (height * width)) // row) * row


def grid_inputs(
    sets: Sequence[Samples], data: DataConfig, seed: int, system: System, device: torch.device, draws: bool
) -> GridInputs:
    """Return GRID real images and prior draws, or as many as fill whole rows: the same for all of a run.

    Raises:
        DataError: an image is damaged, or its label is not one of the system's classes.
    """
    row, _ = panel_size(system.classes, data.shape)
    num = GRID // row * row
    positions = [random_positions(len(one), num, seed) for one in sets]
    found = [read(one, at, *data.format) for one, at in zip(sets, positions, strict=True)]
    if found:
        check_labels(sets[0], system.classes, found[0].label.numpy(), positions[0])
    z = torch.randn(num, *system.latent_shape, generator=torch.Generator().manual_seed(key(seed, "grid")))
    drawn = in_turn(system, torch.arange(num, device=device) % row)
    label = found[0].label.to(device) if found else torch.zeros(0, dtype=torch.int64)
    return GridInputs([one.image.to(device) for one in found], label, z.to(device) if draws else None, drawn)


@torch.no_grad()
def panels(system: System, inputs: GridInputs) -> Panels:
    """Return real images of each dataset, if any, uint8, and what the system makes of them and of draws from the prior.

    Raises:
        FloatingPointError: an image is not finite.
    """
    real, label, z, drawn = inputs
    if system.can("translate"):
        a, b = real
        to_b, to_a = system.translate(normalize(a), "a2b"), system.translate(normalize(b), "b2a")
        return {"a": a, "a to b": to_uint8(to_b), "b": b, "b to a": to_uint8(to_a)}
    made = {"real": real[0]} if real else {}
    if real and system.can("reconstruct"):
        made["reconstructed"] = to_uint8(system.reconstruct(normalize(real[0]), *system.told(label)))
    return made if z is None else made | {"generated": to_uint8(system.sample(z, *drawn))}


def picture(pixels: Tensor) -> Image.Image:
    """Return pixels [1, 3 or 4, height, width] as a picture of eight bits: grey, colour, or colour with alpha."""
    pixels = pixels if pixels.dtype == torch.uint8 else to_uint8(normalize(pixels))
    return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).cpu().numpy())


def encoded(pixels: Tensor) -> tuple[str, bytes]:
    """Return pixels [channels, height, width], uint8 or uint16, as a file of their depth, after its ending.

    It is a PNG, or a .npy file of other channels than 1, 3 and 4.
    """
    return encode(pixels.permute(1, 2, 0).cpu().numpy())


def grid(panels: Panels, columns: int = COLUMNS, pixels: int = 64, headings: Sequence[str] = ()) -> Image.Image:
    """Return a picture of titled panels below each other, with images in rows of `columns`.

    Each panel has the rows that its images fill. Transparent images are shown over white. Images smaller than `pixels`
    are enlarged by a whole number. `headings` stand above the first columns.
    """
    height, width = next(iter(panels.values())).shape[-2:]
    scale, gap = max(1, pixels // max(height, width)), 2
    row, column = height * scale + gap, width * scale + gap
    title = max(20, column // 8)  # large images are shown at a smaller scale, with their titles
    ends = list(accumulate(math.ceil(len(images) / columns) * row + title for images in panels.values()))
    canvas = Image.new("RGB", (columns * column - gap, ends[-1] - gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, heading in enumerate(headings):
        draw.text((i * column + 2, 1), heading, fill="black", font_size=title - 5)
    for top, (name, images) in zip([0, *ends], panels.items(), strict=False):
        draw.text((2, top + 1), name, fill="black", font_size=title - 5)
        for i, image in enumerate(visible_pixels(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()):
            picture = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (i % columns * column, top + title + i // columns * row))
    return canvas


def below_originals(panels: Panels, columns: int) -> Panels:
    """Return panels in which each row of images is followed by the row of what is made of them.

    A panel of reconstructions or translations is joined with the one before it; a last row is filled up with white.
    """
    joined: Panels = {}
    for title, images in panels.items():
        if not MADE_OF_IMAGES.match(title):
            joined[title] = images
            continue
        above, originals = joined.popitem()
        both = [visible_pixels(part) for part in (originals, images)]  # originals may have 16 bits
        white = torch.full_like(both[0][:1], 255).expand(-len(images) % columns, -1, -1, -1)
        rows = (torch.cat([part, white]).unflatten(0, (-1, columns)) for part in both)
        joined[f"{above}, and {title} below"] = torch.stack([*rows], 1).flatten(0, 2)
    return joined


def thumbnails(images: Tensor, side: int) -> Tensor:
    """Return uint8 images [n, channels, height, width] as squares of a side, in [0, 1], with black edges."""
    scale = side / max(images.shape[-2:])
    small = resize(visible_pixels(images) / 255, [max(1, round(length * scale)) for length in images.shape[-2:]])
    return F.pad(small, (0, side - small.shape[-1], 0, side - small.shape[-2]))


def confusion_picture(shares: dict[str, float]) -> Image.Image:
    """Return a ternary discriminator's confusion matrix, of shares by KIND/CLASS: rows are kinds, columns classes."""
    cell, left, top = 110, 120, 30
    canvas = Image.new("RGB", (left + cell * len(KINDS), top + cell * len(KINDS)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 8), "image | named", fill="gray", font_size=15)
    for row, kind in enumerate(KINDS):
        draw.text((4, top + cell * (row + 0.45)), kind, fill="black", font_size=15)
        draw.text((left + cell * row + 4, 8), kind, fill="black", font_size=15)
        for column, name in enumerate(KINDS):
            share, x, y = shares[f"{kind}/{name}"], left + cell * column, top + cell * row
            shade = round(255 * (1 - 0.6 * share)) if math.isfinite(share) else 255
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=(shade, shade, 255))
            draw.text((x + 36, y + 44), f"{share:.2f}", fill="black", font_size=18)
    return canvas


def interpolate(a: Tensor, b: Tensor, steps: int, prior: bool) -> Tensor:
    """Return `steps` points from a to b, [steps, ...].

    Between codes they lie on a straight line. Between draws of the prior they follow cos(t) a + sin(t) b, where every
    point is again distributed as N(0, I); the middle of a straight line would be too short.
    """
    position = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).view(-1, *[1] * a.dim())
    if not prior:
        return a + position * (b - a)
    return a * (position * math.pi / 2).cos() + b * (position * math.pi / 2).sin()


@torch.no_grad()
def interpolation_rows(system: System, real: Tensor, z: Tensor, rows: int, columns: int) -> Tensor:
    """Return uint8 images on `rows` paths of `columns` steps: between the codes of real images if the system has an
    encoder, else between prior draws. With classes, each path is of one, in turn."""
    encodes = system.can("posterior")
    ends = system.posterior(normalize(real[: 2 * rows]))[0] if encodes else z[: 2 * rows]
    paths = [interpolate(a, b, columns, prior=not encodes) for a, b in ends.unflatten(0, (rows, 2))]
    label = in_turn(system, torch.arange(rows, device=z.device).repeat_interleave(columns))
    return to_uint8(system.sample(torch.cat(paths), *label))
