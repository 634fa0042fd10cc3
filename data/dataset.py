"""dataset.json: what a prepared data set holds."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from data.errors import DataError
from data.files import parse, read

Count = Annotated[int, msgspec.Meta(ge=0)]

FEW = 100  # held-out images below which scores say little


class Spread(msgspec.Struct):
    """Pixels that images are wide or high."""

    min: Count
    median: Count
    max: Count


class ShardEntry(msgspec.Struct):
    """A shard of a split."""

    name: str
    bytes: Count
    images: Count
    fingerprint: str


class LatentStatistics(msgspec.Struct, frozen=True):
    """What latents are scaled by before the next model sees them.

    (z - shift_factor) * scaling_factor has the mean 0 and the variance 1 over all images, channels and places;
    (z - latents_mean) / latents_std has them in each channel, or each number of a code that is no map.
    """

    images: Count  # an image and its mirrored copy are two
    of: Literal["draws", "means"]  # draws z ~ N(mean, variance) from each image's posterior, or their means
    latents_mean: list[float]
    latents_std: list[float]
    shift_factor: float  # the mean of all latents
    scaling_factor: float  # 1 / their deviation: 0.18215 of latent diffusion's first autoencoder (Rombach et al. 2022)


class Split(msgspec.Struct, omit_defaults=True):
    """A split: a folder of shards beside dataset.json.

    Mean and deviation are of its images' pixels, from 0 to 1. If it holds latents, these are empty, width and height
    are places of a latent, modes are types of its numbers, and image_bytes and formats are those of the latents.
    """

    images: Count
    image_bytes: Count
    fingerprint: str
    unlabelled: Count
    labels: dict[Annotated[str, msgspec.Meta(pattern=r"^\d{1,7}$")], Count]
    width: Spread | None  # None if there are no images
    height: Spread | None
    modes: dict[str, Count]
    formats: dict[str, Count]
    mean: list[float]
    std: list[float]
    shards: list[ShardEntry]
    latents: LatentStatistics | None = None


class Rejected(msgspec.Struct):
    """An image that was left out."""

    file: str
    reason: str


class Dataset(msgspec.Struct, kw_only=True):
    """A data set: how it was made, and what it holds; a split's name is a plain word, so it names no other folder."""

    source: str = ""
    settings: dict[str, Any] = {}
    fingerprint: str
    classes: list[str]
    splits: Annotated[dict[Annotated[str, msgspec.Meta(pattern=r"^\w[\w-]*$")], Split], msgspec.Meta(min_length=1)]
    ignored: dict[str, int] = {}
    rejected: list[Rejected]

    def to_json(self) -> str:
        return json.dumps(msgspec.to_builtins(self), indent=1)

    def class_name(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)


class Description(msgspec.Struct):
    """What is read of a dataset.json beside shards, which another program may have written."""

    classes: list[str] = []


def class_names(folder: Path) -> list[str]:
    """Return the names of the labels 0, 1, ... of a folder of shards, or of a split; empty without a dataset.json.

    Raises:
        DataError: dataset.json is damaged.
    """
    for path in (folder / "dataset.json", folder.parent / "dataset.json"):
        if path.exists():
            try:
                return parse(read(path), Description).classes
            except (OSError, ValueError) as error:
                raise DataError(
                    f"cannot read {path}: {error}. Repair it, or remove it: it names the classes"
                ) from error
    return []


def dataset_fingerprint(classes: list[str], splits: dict[str, Split]) -> str:
    """Return a checksum of the images, keys and labels of each split, and of the classes' names."""
    content = [classes, {name: split.fingerprint for name, split in splits.items()}]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def splits_of(source: str) -> dict[str, str]:
    """Return the splits' folders by name, if a source is what data.prepare wrote or its train split; {} otherwise."""
    folder = Path(source)
    roots = [folder, folder.parent] if folder.name == "train" else [folder]
    root = next((root for root in roots if os.path.isfile(root / "dataset.json")), None)
    return {path.name: str(path) for path in root.iterdir() if path.is_dir()} if root else {}


def held_out_of(source: str) -> str:
    """Return the held-out images of a folder that data.prepare wrote; any other source itself.

    Raises:
        DataError: the folder has none.
    """
    if not os.path.isfile(os.path.join(source, "dataset.json")):
        return source
    splits = splits_of(source)
    if held_out := splits.get("test") or splits.get("validation"):
        return held_out
    raise DataError(f"{source} has no held-out images: name a split, such as {next(iter(splits.values()), source)}")


def read_dataset(folder: Path) -> Dataset | None:
    """Return the content of a folder's dataset.json, or None if it has none; raise DataError if it is damaged."""
    path = folder / "dataset.json"
    try:
        return parse(read(path), Dataset)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): prepare the data again, or remove the file") from error
