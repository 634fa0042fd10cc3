"""Images of any size through networks that are convolutions alone: whole, or in tiles that overlap."""

import math
from collections.abc import Callable
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.nn.functional import pad

from data.images import sides
from trainer.batch import normalize, to_pixels
from trainer.generate.generator import Generator
from trainer.precision import strict_fp32

OVERLAP = 4  # tiles overlap by their side divided by this number, as in diffusers


def check_tile(generator: Generator, tile: int | None) -> int:
    """Return the number by which the sides of an image must be divisible.

    Raises:
        ValueError: the system's codes are vectors, so that its images have one size, or the tile does not fit.
    """
    system, shape, size = generator.system, generator.system.latent_shape, sides(generator.size)
    if system.stride is None and len(shape) != 3:
        raise ValueError(
            f"system.networks.latent_stride is null, so codes are vectors and images have {size[1]} x {size[0]} "
            "pixels; --whole and --tile expect maps of codes, which networks of convolutions alone make: leave these "
            "options out, or train with --system.networks.latent_stride 8"
        )
    stride = system.stride or size[0] // shape[1]
    least = OVERLAP * stride
    if tile is not None and tile % least:
        nearest = max(1, round(tile / least)) * least
        raise ValueError(
            f"--tile is {tile}, expected a multiple of {least}, as networks make {stride} pixels a side at once, and "
            f"tiles overlap by a quarter: such as {nearest}"
        )
    return stride


def in_own_size(
    generator: Generator, use: Callable[[Tensor], Tensor], pixels: Tensor, stride: int, tile: int | None
) -> Tensor:
    """Return what a system makes of an image of any size, [channels, height, width] in its depth.

    Args:
        generator: of the system
        use: reconstructs or translates images on the system's device
        pixels: uint8 or uint16 [channels, height, width]
        stride: that `check_tile` returns
        tile: pixels of a tile's side; None: the image as a whole

    Raises:
        ValueError: a pixel is not finite.
    """
    height, width = pixels.shape[1:]
    # Reflected edges need two places of a translator's smallest map.
    right, below = (max(-side % stride, 2 * stride - side) for side in (width, height))
    image = pad(normalize(pixels[None]), (0, right, 0, below), mode="replicate")
    made = in_tiles(lambda part: _run(use, part, generator.device), image, stride, tile)
    try:
        return to_pixels(made[0, :, :height, :width], generator.format.bits)
    except FloatingPointError as error:
        raise ValueError(f"{error}: the run has diverged, choose an earlier checkpoint") from error


@torch.no_grad()
def _run(use: Callable[[Tensor], Tensor], image: Tensor, device: str) -> Tensor:
    with strict_fp32(torch.device(device)):
        return use(image.to(device)).cpu()


def in_tiles(use: Callable[[Tensor], Tensor], image: Tensor, stride: int, tile: int | None) -> Tensor:
    """Return what a function makes of an image [1, channels, height, width], tile by tile, blended where they overlap.

    All tiles have one size. Neighbours overlap by at least a quarter of it, and in the middle of what they share the
    one fades into the other linearly.

    Args:
        use: maps images to images of the same size
        image: its sides are multiples of `stride`
        stride: tiles begin at multiples of it
        tile: side of a tile, a multiple of `OVERLAP` times the stride; None for one tile
    """
    lengths = image.shape[2:]
    tiles = [length if tile is None else min(tile, length) for length in lengths]
    begins = [_begins(*of_axis, stride) for of_axis in zip(lengths, tiles, strict=True)]
    rows, columns = (_weights(*of_axis) for of_axis in zip(begins, tiles, lengths, strict=True))
    result = torch.zeros_like(image)
    for (top, row), (left, column) in product(zip(begins[0], rows, strict=True), zip(begins[1], columns, strict=True)):
        place = (..., slice(top, top + tiles[0]), slice(left, left + tiles[1]))
        result[place] += use(image[place]) * row[place[1], None] * column[place[2]]
    return result


def _begins(length: int, tile: int, stride: int) -> list[int]:
    """Return where tiles begin: the first at 0, the last such that it ends at `length`, evenly spaced between them."""
    last, step = length - tile, tile - tile // OVERLAP
    parts = math.ceil(last / step)
    return [i * (last // stride) // parts * stride for i in range(parts)] + [last]


def _weights(begins: list[int], tile: int, length: int) -> Tensor:
    """Return the weight of each tile at each place, [tiles, length]; over the tiles, they sum to 1 at each place."""
    weights, fade = torch.zeros(len(begins), length), tile // OVERLAP
    weights[0] = 1
    for i, (before, begin) in enumerate(pairwise(begins), 1):
        seam = (before + tile + begin) / 2
        weights[i] = ((torch.arange(length) + 0.5 - seam) / fade + 0.5).clamp(0, 1)
        weights[:i] *= 1 - weights[i]
    return weights
