"""Images beside the training images whose codes are nearest, which shows whether a system has memorized images."""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.loader import read
from data.redact import redacted
from data.shards.reader import Shards
from trainer.generate.generator import Generator
from trainer.generate.panels import Pictures
from trainer.samplers import chosen


class Neighbours(NamedTuple):
    """Images and the training images whose codes are nearest, the nearest first."""

    names: list[str]
    images: Tensor  # uint8 [n, channels, height, width]
    distances: Tensor  # float64 [n, nearest], between the means of posteriors
    positions: Tensor  # int64 [n, nearest], of the training images


def find_neighbours(
    generator: Generator, queries: Iterator[tuple[Sequence[str], Tensor]], images: Shards, num: int | None, nearest: int
) -> Neighbours:
    """Return the nearest training images of some images, in Euclidean distance between the means of posteriors.

    Args:
        generator: its system has an encoder
        queries: blocks of names and images, uint8 [n, channels, height, width]
        images: training images
        num: number of training images that are searched, which a fixed permutation chooses; None for all
        nearest: number of neighbours

    Raises:
        ValueError: there are fewer training images than neighbours.
        DataError: an image is damaged.
    """
    positions, encoder = chosen(images, num), generator.encoder
    if len(positions) < nearest:
        raise ValueError(f"--nearest {nearest} needs as many training images; there are {len(positions)}")
    blocks = [*queries]
    pixels = torch.cat([block for _, block in blocks])
    codes = encoder(pixels)[0].flatten(1).double()
    best = torch.full((len(codes), nearest), torch.inf, dtype=torch.float64)
    places = torch.zeros(len(codes), nearest, dtype=torch.int64)
    for rows in generator.blocks(len(positions)):
        part = positions[rows.start : rows.stop]
        mean, _ = encoder(read(images, part, *encoder.format).image)
        # Products of matrices would leave a distance above 0 between equal codes.
        found = torch.cdist(codes, mean.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist")
        best, order = torch.cat([best, found], 1).sort(stable=True)
        places = torch.cat([places, torch.from_numpy(part).expand(len(codes), -1)], 1).gather(1, order)[:, :nearest]
        best = best[:, :nearest]
    return Neighbours([name for names, _ in blocks for name in names], pixels, best, places)


def show(generator: Generator, found: Neighbours, images: Shards, title: str) -> Pictures:
    """Yield images, whose panel has a title, each beside its neighbours."""
    for rows in generator.rows(len(found.names)):
        part = slice(rows.start, rows.stop)
        nearest = read(images, found.positions[part].flatten().numpy(), *generator.format).image
        columns = nearest.unflatten(0, (len(rows), -1)).unbind(1)
        beside = {str(i): column for i, column in enumerate(columns, 1)}
        yield found.names[part], {title: found.images[part], **beside}


def report(found: Neighbours, images: Shards) -> str:
    """Return a line of JSON for each image: its name, and of each neighbour the original name, place and distance."""
    lines = []
    # By shard, as each shard's list of names is read.
    named = {i: (images.original(i) or None, redacted(images.name(i))) for i in found.positions.unique().tolist()}
    for name, distances, positions in zip(found.names, found.distances.tolist(), found.positions.tolist(), strict=True):
        near = [
            {"file": named[i][0], "image": named[i][1], "distance": distance}
            for i, distance in zip(positions, distances, strict=True)
        ]
        lines.append(json.dumps({"image": name, "neighbours": near}) + "\n")
    return "".join(lines)
