"""Look into a data set: `python -m data.inspect FOLDER [--verify]`.

FOLDER is what `python -m data.prepare` made, or any folder of WebDataset shards. Prints what it holds, and writes a
contact sheet. With `--verify`, or where there is no `dataset.json`, every sample is decoded, and compared with its
checksum in the index where there is one. Exit code 1: something is wrong with the data, and listed.
"""

import argparse
import hashlib
import io
import json
import math
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.errors import DataError, command_errors
from data.files import escaped, parse, read, regular_file
from data.images import FORMATS, LIMITS, Limits, decode, decode_whole
from data.processes import run_in_parallel
from data.shards import index
from data.shards.index import checksum, digest, known, load_table, samples
from data.shards.reader import Shards

COUNTED = ("label", "width", "height", "mode", "format")
TILE, MARGIN, EACH, MOST_CLASSES = 96, 6, 10, 40  # of the contact sheet


@dataclass
class DatasetSummary:
    """What can be said of some samples; tallies of parts add up to that of the whole, exactly and in any order.

    Args:
        images, encoded: how many, and their bytes
        digest: sum of the samples' hashes (key, label, image)
        counts: for each of COUNTED, how many images have each value
        pixels: int64 [4, 256], how many pixels have each value: of the grey images, of the others' three channels
    """

    images: int = 0
    encoded: int = 0
    digest: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in COUNTED})
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((4, 256), np.int64))

    def add(self, key: str, content: bytes, label: int, limits: Limits = LIMITS) -> None:
        """Decode a sample and count it.

        Raises:
            ValueError: a run could not read the image; nothing has been counted.
        """
        image = decode_whole(content, limits)
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            mode, form = header.mode, str(header.format)
        if form in ("JPEG", "MPO"):
            decode(content, 32, 3, limits=limits)  # runs read it by another decoder, which takes offence at more
        self.images += 1
        self.encoded += len(content)
        head = f"{key}\n{label}\n".encode("utf-8", "surrogateescape")
        self.digest += int.from_bytes(hashlib.sha256(head + content).digest())
        for name, value in zip(COUNTED, (label, *image.size, mode, form), strict=True):
            self.counts[name][str(value)] += 1
        histogram = np.reshape(image.histogram(), (-1, 256))
        self.pixels[slice(0, 1) if len(histogram) == 1 else slice(1, 4)] += histogram

    def __iadd__(self, other: "DatasetSummary") -> "DatasetSummary":
        self.images += other.images
        self.encoded += other.encoded
        self.digest += other.digest
        for name in COUNTED:
            self.counts[name].update(other.counts[name])
        self.pixels = self.pixels + np.array(other.pixels)
        return self

    def to_json(self) -> dict[str, Any]:
        """For `DatasetSummary(**content)`, which may be added to another."""
        return {**vars(self), "pixels": self.pixels.tolist()}

    @property
    def fingerprint(self) -> str:
        """Of keys, labels and images, whatever shards they lie in."""
        return f"{self.digest % 2**128:032x}"

    def summary(self) -> dict[str, Any]:
        """For dataset.json. Mean and standard deviation are of all pixels, from 0 to 1; grey images among coloured ones
        count as coloured."""
        labels = {int(label): count for label, count in self.counts["label"].items()}
        mean, std = self._moments()
        return {
            "images": self.images,
            "image_bytes": self.encoded,
            "fingerprint": self.fingerprint,
            "unlabelled": labels.pop(-1, 0),
            "labels": {str(label): labels[label] for label in sorted(labels)},
            "width": _spread(self.counts["width"]),
            "height": _spread(self.counts["height"]),
            "modes": dict(sorted(self.counts["mode"].items())),
            "formats": dict(sorted(self.counts["format"].items())),
            "mean": mean,
            "std": std,
        }

    def _moments(self) -> tuple[list[float], list[float]]:
        grey, *colours = self.pixels.tolist()
        channels = [[*map(sum, zip(grey, one, strict=True))] for one in colours] if any(colours[0]) else [grey]
        mean, std = [], []
        for channel in channels:  # in whole numbers of any length, so that no order of adding can be seen
            n = sum(channel) or 1
            total = sum(value * count for value, count in enumerate(channel))
            squares = sum(value**2 * count for value, count in enumerate(channel))
            mean.append(round(total / n / 255, 6))
            std.append(round(math.sqrt(n * squares - total**2) / n / 255, 6))
        return mean, std


def _spread(counts: Counter[str]) -> dict[str, int]:
    values = sorted((int(value), count) for value, count in counts.items())
    half, seen = sum(counts.values()) / 2, 0
    for value, count in values:
        seen += count
        if seen >= half:
            return {"min": values[0][0], "median": value, "max": values[-1][0]}
    return {}


class Shard(NamedTuple):
    split: str
    path: Path
    entry: index.Shard | None = None  # as it was last indexed


class Measured(NamedTuple):
    shard: Shard
    tally: DatasetSummary
    problems: list[str]


def measure(shard: Shard, advance: Callable[[int], Any], limits: Limits = LIMITS) -> Measured:
    """Decode every sample of a shard; what is wrong with it becomes a problem, with shard, member and reason."""
    tally, problems, keys, found = DatasetSummary(), list[str](), set(), list[int]()
    entry = shard.entry
    table = None if entry is None else load_table(shard.path, entry)
    try:
        with open(regular_file(shard.path), "rb") as file:
            for sample in samples(shard.path):
                advance(1)
                content = os.pread(file.fileno(), min(sample.size, limits.bytes + 1), sample.offset)
                try:
                    if sample.key in keys:
                        raise ValueError("another sample of this shard has the same key")
                    if not content:
                        raise ValueError("it has no image")
                    keys.add(sample.key)
                    found.append(checksum(file.fileno(), sample.offset, sample.size))
                    tally.add(sample.key, content, sample.label, limits)
                    if table is not None and (len(found) > len(table) or found[-1] != table[len(found) - 1, 3]):
                        raise ValueError("its bytes are not those that were indexed")
                except ValueError as error:
                    problems.append(f"{shard.path}, member {escaped(sample.name or sample.key)}: {error}")
    except (tarfile.TarError, OSError, ValueError) as error:
        problems.append(f"{shard.path}: it is damaged, cut short or no tar: {error}")
    if entry is not None and entry.checksum and not problems and entry.checksum != digest(np.array(found, np.int64)):
        problems.append(f"{shard.path}: its images are not those that were indexed")
    return Measured(shard, tally, problems)


def describe_shard(path: Path, tally: DatasetSummary) -> dict[str, Any]:
    """A shard's row of dataset.json."""
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "images": tally.images,
        "fingerprint": tally.fingerprint,
    }


def fingerprint(classes: list[str], splits: dict[str, dict[str, Any]]) -> str:
    """Of a data set's images, keys and labels, split by split, and of its classes' names."""
    content = [classes, {split: one["fingerprint"] for split, one in splits.items()}]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def inspect(
    folder: Path, workers: int = 1, verify: bool = False, limits: Limits = LIMITS
) -> tuple[dict[str, Any], list[str]]:
    """What a folder holds, as in dataset.json, and what is wrong with it.

    Args:
        folder: of shards, or of such folders
        verify: decode every sample, even where a dataset.json says what there should be
        limits: of an image

    Raises:
        DataError: there are no shards, or dataset.json cannot be read.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder here: name one that `python -m data.prepare` made, or one of shards (*.tar)"
        )
    described = _described(folder)
    shards = _shards(folder, described)
    if described and not verify:
        return described, []
    measured: list[Measured] = []
    total = sum(split["images"] for split in described["splits"].values()) if described else None
    run_in_parallel(partial(measure, limits=limits), shards, workers, measured.append, "verifying", total)
    measured.sort(key=lambda one: one.shard)
    problems = [problem for one in measured for problem in one.problems]
    splits: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(shard.split for shard in shards):
        parts, whole = [one for one in measured if one.shard.split == name], DatasetSummary()
        for one in parts:
            whole += one.tally
        rows = [describe_shard(one.shard.path, one.tally) for one in parts]
        splits[name] = whole.summary() | {"shards": rows}
    if not described:
        described = {"fingerprint": fingerprint([], splits), "classes": [], "splits": splits, "rejected": []}
        return described, problems
    problems += _differences(folder, described["splits"], splits)
    if not problems and described["fingerprint"] != fingerprint(described["classes"], splits):
        problems = [f"{folder / 'dataset.json'}: its classes or its fingerprint were changed"]
    return described, problems


Count = Annotated[int, msgspec.Meta(ge=0)]
_Spread = dict[Literal["min", "median", "max"], Count]  # of no images, it is empty


class _Row(msgspec.Struct):
    name: str
    bytes: Count


class _Split(msgspec.Struct):
    images: Count
    unlabelled: Count
    labels: dict[Annotated[str, msgspec.Meta(pattern=r"^\d{1,7}$")], Count]
    shards: list[_Row]
    width: _Spread
    height: _Spread
    modes: dict[str, Count]
    formats: dict[str, Count]
    mean: list[float]
    std: list[float]
    fingerprint: str

    def __post_init__(self) -> None:
        if any(len(spread) not in (0, 3) for spread in (self.width, self.height)):
            raise ValueError("width and height have a min, a median and a max")


class _Rejected(msgspec.Struct):
    file: str
    reason: str


class _Described(msgspec.Struct):
    """dataset.json: what of it is read. A split is a folder beside it, and nowhere else."""

    splits: Annotated[dict[Annotated[str, msgspec.Meta(pattern=r"^\w[\w-]*$")], _Split], msgspec.Meta(min_length=1)]
    classes: list[str]
    fingerprint: str
    rejected: list[_Rejected]


def _described(folder: Path) -> dict[str, Any]:
    """The content of dataset.json; empty if there is none."""
    path = folder / "dataset.json"
    try:
        parse(content := read(path), _Described)
        return json.loads(content)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}): prepare the data anew, or remove it to inspect without"
        ) from error


def _shards(folder: Path, described: dict[str, Any]) -> list[Shard]:
    folders = [folder / split for split in described["splits"]] if described else [folder, *sorted(folder.glob("*/"))]
    entries = {one: known(one) for one in folders}
    shards = [
        Shard(one.name, path, entries[one].get(path.name)) for one in folders for path in sorted(one.glob("*.tar"))
    ]
    if not shards and not described:
        raise DataError(f"{folder} holds no shards (*.tar), nor do its sub-folders: name a folder that does")
    return shards


def _differences(folder: Path, expected: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> list[str]:
    """Shards that differ from dataset.json; where none does, the figures that do."""
    problems = []
    for split, want in expected.items():
        have = found.get(split, DatasetSummary().summary() | {"shards": []})
        rows = [{row["name"]: row for row in one["shards"]} for one in (want, have)]
        differing = sorted(name for name in rows[0].keys() | rows[1].keys() if rows[0].get(name) != rows[1].get(name))
        for name in differing:
            before, now = ({k: v for k, v in row.get(name, {}).items() if k != "name"} or "none" for row in rows)
            problems.append(f"{folder / split / name}: dataset.json says {before}, there is {now}")
        keys = [] if differing else [key for key in want if want[key] != have.get(key)]
        problems += [f"{split}: {key} is {have.get(key)}, dataset.json says {want[key]}" for key in keys]
    return problems


def table(folder: Path, described: dict[str, Any]) -> str:
    """What dataset.json says, to be read."""
    splits, classes = described["splits"], described["classes"]

    def both(values: dict[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in values.items())

    def spread(values: dict[str, int]) -> str:
        return f"{values['min']} to {values['max']}, median {values['median']}" if values else "-"

    rows: list[list[str]] = [
        ["", *splits],
        ["images", *(f"{one['images']:,}" for one in splits.values())],
        ["unlabelled", *(f"{one['unlabelled']:,}" for one in splits.values())],
        ["shards", *(f"{len(one['shards']):,}" for one in splits.values())],
        ["bytes", *(f"{sum(shard['bytes'] for shard in one['shards']):,}" for one in splits.values())],
        *([name, *(spread(one[name]) for one in splits.values())] for name in ("width", "height")),
        *([name, *(both(one[name]) for one in splits.values())] for name in ("formats", "modes")),
        *([name, *(" ".join(f"{v:.4f}" for v in one[name]) for one in splits.values())] for name in ("mean", "std")),
        ["fingerprint", *(one["fingerprint"] for one in splits.values())],
    ]
    labels = sorted({int(label) for one in splits.values() for label in one["labels"]})
    counts = [[one["labels"].get(str(label), 0) for one in splits.values()] for label in labels]
    if len(labels) <= 30:
        rows += [[f"class {_class(label, classes)}", *map(str, n)] for label, n in zip(labels, counts, strict=True)]
    else:
        columns = zip(*counts, strict=True)
        rows += [[f"{len(labels)} classes", *(f"{min(n)} to {max(n)} images each" for n in columns)]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [f"{folder}, fingerprint {described['fingerprint']}"]
    text += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if rejected := described["rejected"]:
        text += [f"rejected: {len(rejected):,}", *(f"  {one['file']}: {one['reason']}" for one in rejected[:20])]
        text += ["  ... all are in dataset.json"] if len(rejected) > 20 else []
    return "\n".join(escaped(line) for line in text)


def _class(label: int, classes: list[str]) -> str:
    return escaped(classes[label]) if label < len(classes) else str(label)


def sheet(folder: Path, described: dict[str, Any]) -> Image.Image:
    """Some images of each class of the first split, a row a class; more of them where there are no classes."""
    split = next(iter(described["splits"]))
    shards = Shards(folder / split if (folder / split).is_dir() else folder)
    labels = np.unique(shards.labels)
    chosen = _spaced(labels, MOST_CLASSES)
    names = [_class(label, described["classes"])[:40] if label >= 0 else "no class" for label in chosen]
    title, small = (ImageFont.load_default(size) for size in (20, 14))
    columns = 2 if len(chosen) > MOST_CLASSES // 3 else 1
    across, each = EACH // columns, EACH // columns if len(labels) > 1 else 4 * EACH
    step, top, left = TILE + MARGIN, 64, 4 * MARGIN + max(60, *(int(small.getlength(name)) for name in names))
    width, height, down = left + across * step, each // across * step, math.ceil(len(chosen) / columns)
    page = Image.new("RGB", (columns * width + MARGIN, top + down * height + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    note = f"{len(shards):,} images" + (f", {len(labels):,} classes" if len(labels) > 1 else "")
    note += f", of which {len(chosen)} are escaped" if len(chosen) < len(labels) else ""
    draw.text((2 * MARGIN, 10), escaped(f"{folder.resolve().name}, {split}"), "black", title)
    draw.text((2 * MARGIN, 36), note, "dimgray", small)
    for number, (label, name) in enumerate(zip(chosen, names, strict=True)):
        positions = np.flatnonzero(shards.labels == label)
        x, y = number // down * width, top + number % down * height
        draw.text((x + 2 * MARGIN, y + TILE // 2 - 18), name, "black", small)
        draw.text((x + 2 * MARGIN, y + TILE // 2 + 2), f"{len(positions):,}", "dimgray", small)
        for i, position in enumerate(_spaced(positions, each)):
            tile = _tile(shards, int(position))
            corner = x + left + i % across * step, y + i // across * step
            page.paste(tile, (corner[0] + (TILE - tile.width) // 2, corner[1] + (TILE - tile.height) // 2))
    return page


def _spaced(values: np.ndarray, most: int) -> np.ndarray:
    return values[np.linspace(0, len(values) - 1, min(len(values), most)).astype(int)]


def _tile(shards: Shards, position: int) -> Image.Image:
    try:
        image = decode_whole(shards.image(position)).convert("RGB")
    except ValueError:  # --verify says which
        tile = Image.new("RGB", (TILE, TILE), "mistyrose")
        ImageDraw.Draw(tile).text((8, 8), "damaged", "firebrick", ImageFont.load_default(14))
        return tile
    enlarged = max(image.size) * 2 <= TILE  # pixels stay pixels
    return ImageOps.contain(image, (TILE, TILE), Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options that bound an image."""
    for name, what in {"pixels": "of an image", "bytes": "of an encoded image", "scans": "of a JPEG"}.items():
        limit = getattr(LIMITS, name)
        parser.add_argument(f"--max_{name}", type=int, default=limit, help=f"{what}, at most (default: %(default)s)")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="made by data.prepare, or of WebDataset shards")
    parser.add_argument("--verify", action="store_true", help="decode every sample, compare with dataset.json")
    parser.add_argument(
        "--sheet", metavar="PNG", type=Path, help="the contact sheet (default: FOLDER/contact_sheet.png)"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    add_limits(parser)
    settings = parser.parse_args(arguments)
    path = settings.sheet or settings.folder / "contact_sheet.png"
    limits = Limits(settings.max_pixels, settings.max_bytes, settings.max_scans)
    with command_errors(parser):
        described, problems = inspect(settings.folder, settings.workers, settings.verify, limits)
        print(table(settings.folder, described))
        if not problems:  # to open the shards would index anew those that have changed, and hide it from the next look
            drawn = io.BytesIO()
            sheet(settings.folder, described).save(drawn, "PNG")
            if not index.keep(path, drawn.getvalue()):  # never through a link that lies there
                raise DataError(f"{path} cannot be written: name another --sheet")
            print(f"contact sheet: {path}")
    if problems:
        told = "".join(f"  {escaped(problem)}\n" for problem in problems)
        changed = "If shards were made anew, remove their index.json.\n" * any(
            "were indexed" in one for one in problems
        )
        parser.exit(1, f"{len(problems):,} wrong:\n{told}{changed}")
    if settings.verify:
        print("every sample is as it should be")


if __name__ == "__main__":
    main(sys.argv[1:])
