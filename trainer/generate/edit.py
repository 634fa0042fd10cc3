"""Edits by attribute vectors: images with more and less of what a label stands for.

An attribute vector is the difference between the mean codes of images with and without the label (Larsen et al. 2016,
"Visual attribute vectors").
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.dataset import read_dataset
from data.loader import read
from data.shards.reader import Shards
from trainer.exact_sum import ExactSum
from trainer.generate.generator import Generator
from trainer.generate.panels import Pictures
from trainer.log.pictures import Panels
from trainer.samplers import chosen

Codes = Iterator[tuple[Sequence[str], Sequence[int], Panels, Tensor]]  # names, numbers, panels of originals, and codes


def edit(generator: Generator, codes: Codes, direction: Tensor, strengths: Sequence[float]) -> Pictures:
    """Yield images decoded from z + strength * direction for each strength, beside the originals if there are any."""
    for names, numbers, panels, z in codes:
        told = generator.told(numbers)
        moved = ((z.double() + strength * direction).float() for strength in strengths)
        made = [generator.images(generator.system.sample, one, *told) for one in moved]
        titles = [f"{strength:+g}" if strength else "0" for strength in strengths]
        yield names, panels | dict(zip(titles, made, strict=True))


def attribute_vector(generator: Generator, images: Shards, having: str, lacking: str | None, num: int | None) -> Tensor:
    """Return the mean code of images with a label minus that of images without it, float64 [*latent_shape].

    Codes are the posteriors' means. Their sums are exact, and so the same in blocks of any size.

    Args:
        generator: its system has an encoder
        images: labelled images
        having: the label, or its name in the data set's dataset.json
        lacking: label of those without it; None stands for all other labels
        num: images of which those with these labels are encoded, which a fixed permutation chooses; None for all

    Raises:
        ValueError: no image has such a label.
        DataError: an image is damaged.
    """
    labels, positions = images.labels, chosen(images, num)
    label = _label(images, "with", having)
    other = None if lacking is None else _label(images, "without", lacking)
    if other == label:
        raise ValueError(
            f"--without {lacking} is the label of --with, and nothing remains: name another, or leave it out"
        )
    found = labels[positions]
    sides = found == label, (found != label) & (found >= 0) if other is None else found == other
    means = []
    for option, side in zip(("with", "without"), sides, strict=True):
        if not side.any():
            given = having if option == "with" else lacking or "(all other labels)"
            raise ValueError(f"--{option} {given}: none of {len(positions):,} images of {images.source} has this label")
        means.append(_mean_code(generator, images, positions[side]))
    return means[0] - means[1]


def _mean_code(generator: Generator, images: Shards, positions: np.ndarray) -> Tensor:
    encoder = generator.encoder
    total = ExactSum(generator.system.latent_shape, torch.device("cpu"))
    for rows in generator.blocks(len(positions)):
        mean, _ = encoder(read(images, positions[rows.start : rows.stop], *encoder.format).image)
        total.add(mean.double())
    return total.parts.sum(0) / len(positions)


def _label(images: Shards, option: str, given: str) -> int:
    """A label by its name, or by its number unless names are numbers, too."""
    source = Path(images.source)  # a folder of shards, or its index.json; dataset.json is beside such folders
    found = (read_dataset(folder) for folder in (source, *source.parents[:2]) if folder.is_dir())
    classes = next((dataset.classes for dataset in found if dataset), [])
    if given in classes:
        return classes.index(given)
    names_are_numbers = any(name.isdecimal() for name in classes)  # then a number that is no name is a mistake
    if given.isdecimal() and not names_are_numbers:
        return int(given)
    expected = [] if names_are_numbers else ["the number of a label"]
    expected += [f"one of {', '.join(classes)}"] if classes else []
    unnamed = f": no dataset.json beside {source} names classes, which data.prepare takes from sub-folders"
    raise ValueError(f"--{option} {given}: expected {' or '.join(expected)}{'' if classes else unnamed}")
