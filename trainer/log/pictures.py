"""What a system makes, as grids to look at."""

import math

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from models import System
from trainer.batch import normalize, to_uint8

Panels = dict[str, Tensor]  # uint8 images [n, channels, size, size] by title


@torch.no_grad()
def panels(system: System, real: list[Tensor], z: Tensor) -> Panels:
    """Uint8 images of each data set, and what the system makes of them and of prior draws."""
    if system.can("translate"):
        a, b = real
        to_b, to_a = system.translate(normalize(a), "a2b"), system.translate(normalize(b), "b2a")
        return {"a": a, "a to b": to_uint8(to_b), "b": b, "b to a": to_uint8(to_a)}
    made = {"real": real[0]}
    if system.can("reconstruct"):
        made["reconstructed"] = to_uint8(system.reconstruct(normalize(real[0])))
    return made | {"generated": to_uint8(system.sample(z))}


def grid(panels: Panels, columns: int = 12, pixels: int = 64) -> Image.Image:
    """Titled panels below each other, each of uint8 images [n, channels, size, size] in rows of `columns`.

    Images smaller than `pixels` are shown a whole number of times larger.
    """
    n, size = max(len(images) for images in panels.values()), next(iter(panels.values())).shape[-1]
    scale, gap, title = max(1, pixels // size), 2, 20
    cell = size * scale + gap
    height = math.ceil(n / columns) * cell + title
    canvas = Image.new("RGB", (columns * cell - gap, height * len(panels) - gap), "white")
    draw = ImageDraw.Draw(canvas)
    for panel, (name, images) in enumerate(panels.items()):
        draw.text((2, panel * height + 1), name, fill="black", font_size=15)
        for i, image in enumerate(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()):
            picture = Image.fromarray(image).resize((size * scale, size * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (i % columns * cell, panel * height + title + i // columns * cell))
    return canvas


def interpolate(a: Tensor, b: Tensor, steps: int, prior: bool) -> Tensor:
    """[steps, ...] from a to b: straight between codes, whose space between may be anything; for draws of the prior
    along cos(t) a + sin(t) b, every point of which is a draw of N(0, I) again, where the middle of a straight line
    would be too short."""
    share = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).view(-1, *[1] * a.dim())
    if not prior:
        return a + share * (b - a)
    return a * (share * math.pi / 2).cos() + b * (share * math.pi / 2).sin()


@torch.no_grad()
def interpolation_rows(system: System, real: Tensor, z: Tensor, rows: int, columns: int) -> Tensor:
    """Uint8 images on `rows` ways of `columns` steps: between codes of images, or of draws if it has none."""
    encodes = system.can("posterior")
    ends = system.posterior(normalize(real[: 2 * rows]))[0] if encodes else z[: 2 * rows]
    ways = [interpolate(a, b, columns, prior=not encodes) for a, b in ends.unflatten(0, (rows, 2))]
    return to_uint8(system.sample(torch.cat(ways)))
