"""Which image of a source goes to which shard."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.dataset import FEW
from data.errors import DataError
from data.images import LIMITS, Limits, Size, plain, sides
from data.sources import SPLITS, Item, Source

FORMATS = ("keep", "png", "jpeg", "webp")
HELD_OUT = 0.1, 0.3  # of the images, the least and the greatest share by default


@dataclass(frozen=True)
class PrepareSettings:
    """The options that, with the source, decide what a data set holds; `python -m data.prepare --help` explains them.

    Raises:
        ValueError: One is out of its range.
    """

    test_fraction: float | None = None  # `share_held_out` of the number of images
    per_shard: int = 10_000
    shard_bytes: int = 1_000_000_000
    size: Size | None = None  # height and width with `crop` only
    crop: bool = False
    alpha: bool = False
    format: str = "keep"
    quality: int = 95
    max_pixels: int = LIMITS.pixels
    max_bytes: int = LIMITS.bytes
    max_scans: int = LIMITS.scans

    @property
    def limits(self) -> Limits:
        return Limits(self.max_pixels, self.max_bytes, self.max_scans)

    def __post_init__(self) -> None:
        share = self.test_fraction or 0
        check_range("test_fraction", share, 0 <= share < 1, "a share from 0 (nothing is held out) to below 1")
        if self.size is not None:
            size = str(plain(self.size))
            check_range("size", size, min(sides(self.size)) >= 1, "at least 1 pixel")
            fits = self.crop or isinstance(self.size, int)
            check_range("size", size, fits, "one number, the shorter side, or --crop beside height and width")
        check_range("format", self.format, self.format in FORMATS, ", ".join(FORMATS))
        kept = "png, webp or keep with --alpha, as JPEGs are never transparent"
        check_range("format", self.format, not (self.alpha and self.format == "jpeg"), kept)
        check_range("quality", self.quality, 1 <= self.quality <= 100, "1 to 100")
        for name in ("per_shard", "shard_bytes", "max_pixels", "max_bytes", "max_scans"):
            check_range(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


def share_held_out(images: int) -> float:
    """Return the share of some images that is held out by default: a tenth, and more of few images.

    Scores by fewer than FEW images say little. A fifth is to spare, as a hash deals the images.
    """
    least, greatest = HELD_OUT
    return min(max(least, math.ceil(120 * FEW / max(images, 1)) / 100), greatest)


def check_range(option: str, value: Any, fits: bool, expected: str) -> None:
    """Raise ValueError if an option's value does not fit."""
    if not fits:
        raise ValueError(f"--{option} is {value}, expected {expected}")


class Task(NamedTuple):
    """A shard to write: its images, each with the key that it gets."""

    split: str
    number: int
    items: list[tuple[str, Item]]

    @property
    def tar(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"

    @property
    def report(self) -> str:
        return f"{self.split}-{self.number:05d}.json"


def plan(source: Source, settings: PrepareSettings, name: str) -> list[Task]:
    """Return the shards to write: images in order of a hash of their keys, so that every shard mixes the classes.

    Args:
        source: the images
        settings: sizes of shards and of a held-out split
        name: of the source, for messages

    Raises:
        DataError: A split would be empty, or only some images name their split.
    """
    tasks = []
    for split, items in _splits(source, settings, name).items():
        if not items:
            raise DataError(
                f"no image of {name} fell to the {split} split: change --test_fraction {settings.test_fraction} (0 "
                "holds nothing out), or bring more images"
            )
        keyed = [(item.key if source.ordered else f"{i:08d}", item) for i, item in enumerate(items)]
        tasks += [Task(split, number, part) for number, part in enumerate(_parts(keyed, settings))]
    return tasks


def _splits(source: Source, settings: PrepareSettings, name: str) -> dict[str, list[Item]]:
    items = source.items if source.ordered else sorted(source.items, key=lambda item: _hash(item.key))
    found = {item.split for item in items}
    named = [split for split in dict.fromkeys(SPLITS.values()) if split in found]
    if len(named) < 2:
        assert settings.test_fraction is not None
        held_out = settings.test_fraction * 16**40
        splits = {
            "train": [item for item in items if int(_hash(item.key), 16) >= held_out],
            "test": [item for item in items if int(_hash(item.key), 16) < held_out],
        }
        return splits if held_out else {"train": splits["train"]}
    if without := [item for item in items if item.split is None]:
        raise DataError(
            f"{name} names its splits ({', '.join(named)}), but not that of {len(without):,} images, such as "
            f"{without[0].name}: name the split of all of its files, or remove those"
        )
    return {split: [item for item in items if item.split == split] for split in named}


def _hash(key: str) -> str:
    return hashlib.sha1(key.encode("utf-8", "surrogateescape")).hexdigest()


def _parts(items: list[tuple[str, Item]], settings: PrepareSettings) -> Iterator[list[tuple[str, Item]]]:
    """Cut a split into shards."""
    part, total = list[tuple[str, Item]](), 0
    for key, item in items:
        if part and (len(part) == settings.per_shard or total + item.size > settings.shard_bytes):
            yield part
            part, total = [], 0
        part.append((key, item))
        total += item.size
    yield part
