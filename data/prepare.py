"""Make shards: `python -m data.prepare SOURCE OUT`.

SOURCE is a folder of images (one sub-folder a class, or flat; `train` and `test` sub-folders are kept as the split),
or the word `digits` for the data set that comes with scikit-learn. OUT gets `train` and `test`, each a folder of
WebDataset shards. The images' bytes are kept as they are: size and colours are set when a run reads them.
"""

import argparse
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.shards import IMAGE_EXTENSIONS, DataError, write

Sample = dict[str, Any]


class Found(NamedTuple):
    key: str  # its path without the ending: decides the order and the split
    path: Path
    category: str | None  # the sub-folder that it lies in


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder of images, or digits")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument(
        "--test_fraction",
        type=float,
        default=0.1,
        help="share held out for evaluation where SOURCE has no train and test folders, by a hash of each path",
    )
    parser.add_argument("--per_shard", type=int, default=10_000, help="images in a shard")
    settings = parser.parse_args(arguments)
    try:
        counts = prepare(settings.source, settings.out, settings.test_fraction, settings.per_shard)
    except (DataError, ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{settings.out}: " + ", ".join(f"{count} images in {split}" for split, count in counts.items()))


def prepare(source: str, out: Path, test_fraction: float = 0.1, per_shard: int = 10_000) -> dict[str, int]:
    """Write the `train` and `test` shards of a source; OUT appears when all of it is there. Returns the counts.

    Raises:
        DataError: the source has no images, or OUT exists.
        ValueError: a setting is out of its range.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"--test_fraction is {test_fraction}, expected a share between 0 and 1")
    if per_shard < 1:
        raise ValueError(f"--per_shard is {per_shard}, expected at least 1")
    if out.exists():
        raise DataError(f"{out} exists already: name a new folder, or remove it first")
    splits = digits() if source == "digits" else folder(Path(source), test_fraction)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    counts = {split: write(unfinished / split, samples, per_shard) for split, samples in splits.items()}
    for split, count in counts.items():
        if not count:
            raise DataError(f"no image of {source} fell to the {split} split: change --test_fraction")
    os.rename(unfinished, out)
    return counts


def digits() -> dict[str, Iterator[Sample]]:
    """scikit-learn's handwritten digits, every fifth held out.

    1,797 grey 8x8 images in ten classes (Alpaydin & Kaynak 1998, UCI Machine Learning Repository).
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)

    def samples(held_out: bool) -> Iterator[Sample]:
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            if (i % 5 == 4) == held_out:
                file = io.BytesIO()
                Image.fromarray(image).save(file, "PNG")
                yield {"__key__": f"{i:06d}", "png": file.getvalue(), "cls": str(label)}

    return {"train": samples(False), "test": samples(True)}


def folder(source: Path, test_fraction: float) -> dict[str, Iterator[Sample]]:
    """Samples of an image folder, in order of a hash of their paths, so that every shard mixes the classes.

    Raises:
        DataError: the folder is missing, or holds no images.
    """
    if not source.is_dir():
        raise DataError(f"{source} is no folder: expected a folder of images, or the word digits")
    if (source / "train").is_dir() and (source / "test").is_dir():
        splits = {split: find(source / split) for split in ("train", "test")}
    else:
        found = find(source)
        held_out = {one.key for one in found if int(_hash(one.key), 16) < test_fraction * 16**40}
        splits = {
            "train": [one for one in found if one.key not in held_out],
            "test": [one for one in found if one.key in held_out],
        }
    categories = sorted({one.category for found in splits.values() for one in found if one.category is not None})
    return {split: _samples(found, categories) for split, found in splits.items()}


def find(source: Path) -> list[Found]:
    """All images under a folder; its sub-folders are the classes, if it has any.

    Raises:
        DataError: there is no image.
    """
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not paths:
        raise DataError(f"{source} holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
    relative = [path.relative_to(source) for path in paths]
    return [
        Found(str(name.with_suffix("")), path, name.parts[0] if len(name.parts) > 1 else None)
        for path, name in zip(paths, relative, strict=True)
    ]


def _samples(found: list[Found], categories: list[str]) -> Iterator[Sample]:
    """A class's label is the place of its name among those of all splits."""
    for i, one in enumerate(sorted(found, key=lambda one: _hash(one.key))):
        sample: Sample = {"__key__": f"{i:08d}", one.path.suffix.lower().lstrip("."): one.path.read_bytes()}
        if one.category is not None:
            sample["cls"] = str(categories.index(one.category))
        yield sample


def _hash(key: str) -> str:
    return hashlib.sha1(key.encode("utf-8", "surrogateescape")).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
