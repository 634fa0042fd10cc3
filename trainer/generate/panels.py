"""What each command shows: in blocks, the names of pictures and the panels that form each picture."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.latents import unpack
from data.shards.reader import Shards
from trainer.batch import normalize
from trainer.classes import check_labels
from trainer.draws import prior
from trainer.generate.generator import Generator
from trainer.generate.images import decode_file, open_folder
from trainer.generate.whole import check_tile, in_own_size
from trainer.log.pictures import Panels
from trainer.log.pictures import interpolate as path_between
from trainer.progress import progress
from trainer.samplers import Sampler

Pictures = Iterator[tuple[Sequence[str], Panels]]
Direction = Literal["a2b", "b2a"]


class Given(NamedTuple):
    """Images of a folder, without those that cannot be read."""

    names: list[str]
    images: Tensor  # uint8 or uint16 [n, channels, height, width]
    numbers: list[int]  # their places among all images of the folder


def sample(generator: Generator, num: int, seed: int, sampler: Sampler) -> Pictures:
    """Yield images that are drawn."""
    for names, z in draws(generator, num, seed, sampler):
        yield names, {"generated": generator.images(generator.system.sample, z, *generator.told(map(int, names)))}


def draws(generator: Generator, num: int, seed: int, sampler: Sampler) -> Iterator[tuple[list[str], Tensor]]:
    """Yield blocks of numbers of samples and their z [n, *latent_shape]."""
    for rows in generator.blocks(num):
        yield [f"{i:06d}" for i in rows], sampler(seed, torch.tensor(rows))


def given(generator: Generator, folder: Path, num: int | None, left_out: list[str]) -> Iterator[Given]:
    """Yield blocks of images of a folder, and add a message to `left_out` for each image that cannot be read.

    Raises:
        DataError: none can be read.
    """
    names, images = open_folder(folder, *generator.format)
    return _readable(names, images, generator.blocks(min(num or len(names), len(names))), left_out)


def _readable(
    names: list[str], images: Callable[[range], Tensor], blocks: Iterable[range], left_out: list[str]
) -> Iterator[Given]:
    """Yield blocks of images by number, without those that cannot be read, of which `left_out` gets the messages.

    Raises:
        DataError: none can be read.
    """
    found = 0
    for rows in blocks:
        try:
            parts = dict(zip(rows, images(rows), strict=True))
        except DataError:  # which of the block it is, is found one by one
            parts = {}
            for row in rows:
                try:
                    parts[row] = images(range(row, row + 1))[0]
                except DataError as error:
                    left_out.append(str(error))
        if parts:
            yield Given([names[row] for row in parts], torch.stack([*parts.values()]), [*parts])
        found += len(parts)
    if not found:
        raise DataError(left_out[0])


def compare(
    generator: Generator, folder: Path, num: int | None, direction: Direction | None, left_out: list[str]
) -> Pictures:
    """Yield images beside their translations, or beside their reconstructions if there is no direction."""
    title, use = _made_of_images(generator, direction)
    for names, images, numbers in given(generator, folder, num, left_out):
        made = generator.images(use, normalize(images), *generator.told(numbers))
        yield names, {"original": images, title: made}


def whole(
    generator: Generator,
    folder: Path,
    num: int | None,
    direction: Direction | None,
    tile: int | None,
    left_out: list[str],
) -> Pictures:
    """Yield images of their own sizes, one by one, as `compare` does; made in tiles if their side is given.

    Raises:
        ValueError: the system's networks take images of one size alone, or the tile does not fit them.
    """
    title, use = _made_of_images(generator, direction)
    stride = check_tile(generator, tile)
    names, images = open_folder(folder, None, *generator.format[1:])
    each = [range(i, i + 1) for i in range(min(num or len(names), len(names)))]
    for name, image, _ in _readable(names, images, progress(each), left_out):
        made = in_own_size(generator, use, image[0], stride, tile)  # systems whose codes are maps have no classes
        yield name, {"original": image, title: made[None]}


def _made_of_images(generator: Generator, direction: Direction | None) -> tuple[str, Callable[..., Tensor]]:
    """Return what the system makes of images, and how: translations, or reconstructions without a direction."""
    if direction is None:
        return "reconstructed", generator.system.reconstruct
    return f"translated {direction}", lambda image: generator.system.translate(image, direction)


def decode(generator: Generator, folder: Path, num: int | None) -> Pictures:
    """Yield the images of the means in a folder of latents, of the classes that it has as labels or `generator` names.

    Raises:
        DataError: a sample holds no latents, or those of other networks.
    """
    shards, system = Shards(folder), generator.system

    def mean(position: int, content: bytes) -> Tensor:
        try:
            found = unpack(content)["mean"]
            if found.shape != system.latent_shape:
                raise ValueError(f"its latents are {[*found.shape]}, and the system's {[*system.latent_shape]}")
        except ValueError as error:
            raise DataError(f"cannot decode {shards.name(position)}: {error}") from error
        return found.float()

    for rows in generator.blocks(min(num or len(shards), len(shards))):
        contents, labels = shards.images(np.array(rows))
        told = generator.told(rows)
        if told and generator.classes is None:
            check_labels(shards, system.classes, labels, np.array(rows))
            told = (torch.from_numpy(labels),)
        z = torch.stack([mean(*one) for one in zip(rows, contents, strict=True)])
        yield [f"{i:06d}" for i in rows], {"decoded": generator.images(system.sample, z, *told)}


def interpolate(generator: Generator, between: Sequence[str], steps: int, seed: int) -> Pictures:
    """Yield one strip from each end to the next: codes of image files, or draws of the prior, by their numbers."""
    system = generator.system
    if steps < 2:
        raise ValueError(f"--steps is {steps}, expected at least 2: both ends are among the pictures")
    if len(between) < 2:
        raise ValueError(f"--between needs two or more ends; got {' '.join(between)}")
    drawn = all(end.isdecimal() for end in between)
    if drawn:
        ends = prior(seed, torch.tensor([int(end) for end in between]), system.latent_shape)
    elif system.can("posterior"):
        files = torch.stack([decode_file(Path(end), *generator.format) for end in between])
        ends, _ = generator.encoder(files)
    else:
        raise ValueError(
            f"{type(system).__name__} has no encoder, so --between needs the numbers of two samples, such as "
            f"0 1; got {' '.join(between)}"
        )
    # float64 keeps the ends to the bit; where two parts meet, the end is in both.
    parts = [path_between(a, b, steps, prior=drawn) for a, b in pairwise(ends.double())]
    codes = torch.cat([parts[0], *(part[1:] for part in parts[1:])]).float()
    rows = [(z, *generator.told([0] * len(z))) for z in codes.split(generator.block)]  # a strip is of one class
    images = torch.cat([generator.images(system.sample, *one) for one in rows])
    yield ["_to_".join(Path(end).stem for end in between)], {str(i): image[None] for i, image in enumerate(images)}
