"""DiffAugment (Zhao et al. 2020): what a discriminator sees is changed at random, real and fake images alike."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.losses import at_least_fp32

Augmentation = Literal["color", "translation", "cutout"]
DRAWS = 7  # uniform numbers an image needs


def augment(image: Tensor, kinds: tuple[Augmentation, ...], u: Tensor) -> Tensor:
    """Images [n, channels, size, size] in [-1, 1] changed by draws u [n, DRAWS] from U[0, 1); differentiable. A size
    is a multiple of 8, as all are that the networks take.

    Colour: brightness +-1/2, saturation x [0, 2], contrast x [1/2, 3/2]. Translation: by up to an eighth of the size,
    over zeros. Cutout: a square of half the size is zero.
    """
    if not kinds:
        return image
    image = at_least_fp32(image)  # real images come in fp32 and fakes may not: both are changed alike
    if "color" in kinds:
        image = _color(image, *u[:, :3, None, None, None].to(image.dtype).unbind(1))
    if "translation" in kinds:
        image = _translate(image, u[:, 3], u[:, 4])
    if "cutout" in kinds:
        image = _cut(image, u[:, 5], u[:, 6])
    return image


def _color(image: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    image = image + (brightness - 0.5)
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * (2 * saturation)
    mean = image.mean((1, 2, 3), keepdim=True)
    return mean + (image - mean) * (contrast + 0.5)


def _translate(image: Tensor, down: Tensor, right: Tensor) -> Tensor:
    n, _, height, width = image.shape
    most = height // 8
    rows = torch.arange(height, device=image.device) + (down * (2 * most + 1)).long()[:, None]
    columns = torch.arange(width, device=image.device) + (right * (2 * most + 1)).long()[:, None]
    of = torch.arange(n, device=image.device)[:, None, None]
    padded = pad(image, [most] * 4).permute(0, 2, 3, 1)
    return padded[of, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cut(image: Tensor, down: Tensor, right: Tensor) -> Tensor:
    size = image.shape[-1]
    side = size // 2
    at = torch.arange(size, device=image.device)

    def inside(start: Tensor) -> Tensor:  # the square may reach over the edge
        corner = (start * (size + 1)).long()[:, None] - side // 2
        return (at >= corner) & (at < corner + side)

    hole = inside(down)[:, None, :, None] & inside(right)[:, None, None, :]
    return image * ~hole
