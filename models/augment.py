"""DiffAugment (Zhao et al. 2020): the same kinds of random changes to real images and fakes."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.losses import at_least_fp32

Augmentation = Literal["color", "translation", "cutout"]
DRAWS = 7  # uniform numbers per image


def augment(image: Tensor, kinds: tuple[Augmentation, ...], u: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Return images under random changes, differentiably.

    Args:
        image: [n, channels, height, width] in [-1, 1]
        kinds: color (brightness +-1/2, saturation x [0, 2], contrast x [1/2, 3/2]), translation (by up to 1/8 of the
            height and width, zeros outside), cutout (a part of half the height and width is zero). Of four channels
            the fourth is alpha, whose values color leaves as they are
        u: draws [n, DRAWS] from U[0, 1)
        chosen: bool [n, kinds], whether each of the kinds changes an image; None if all do
    """
    image = at_least_fp32(image)  # real images come in fp32 and fakes may not; both must be changed alike
    changes: dict[Augmentation, Callable[[Tensor], Tensor]] = {
        "color": lambda x: _color(x, *u[:, :3, None, None, None].to(x.dtype).unbind(1)),
        "translation": lambda x: _translate(x, u[:, 3], u[:, 4]),
        "cutout": lambda x: _cut(x, u[:, 5], u[:, 6]),
    }
    for kind, change in changes.items():
        if kind in kinds:
            changed = change(image)
            image = (
                changed
                if chosen is None
                else torch.where(chosen[:, kinds.index(kind), None, None, None], changed, image)
            )
    return image


def _color(image: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    if image.shape[1] == 4:
        return torch.cat([_color(image[:, :3], brightness, saturation, contrast), image[:, 3:]], 1)
    image = image + (brightness - 0.5)
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * (2 * saturation)
    mean = image.mean((1, 2, 3), keepdim=True)
    return mean + (image - mean) * (contrast + 0.5)


def _translate(image: Tensor, down: Tensor, right: Tensor) -> Tensor:
    n, _, height, width = image.shape
    down_most, right_most = height // 8, width // 8
    rows = torch.arange(height, device=image.device) + (down * (2 * down_most + 1)).long()[:, None]
    columns = torch.arange(width, device=image.device) + (right * (2 * right_most + 1)).long()[:, None]
    index = torch.arange(n, device=image.device)[:, None, None]
    padded = pad(image, [right_most, right_most, down_most, down_most]).permute(0, 2, 3, 1)
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cut(image: Tensor, down: Tensor, right: Tensor) -> Tensor:
    def inside(start: Tensor, size: int) -> Tensor:  # the part may reach over the edge
        side, position = size // 2, torch.arange(size, device=image.device)
        corner = (start * (size + 1)).long()[:, None] - side // 2
        return (position >= corner) & (position < corner + side)

    hole = inside(down, image.shape[2])[:, None, :, None] & inside(right, image.shape[3])[:, None, None, :]
    return image * ~hole
