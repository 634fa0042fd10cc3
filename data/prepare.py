"""Make shards: `python -m data.prepare SOURCE OUT`.

SOURCE is one of
  a folder of images, one sub-folder a class, or flat; an archive of one: .tar, .tar.gz, .tar.xz, .tar.bz2, .zip
  a .parquet file or a folder of them, as Hugging Face keeps data sets
  WebDataset shards: a folder of .tar, or a pattern such as 'shards/{000..009}.tar'
  torchvision:NAME, a data set of torchvision.datasets that lies under --root
  digits, the data set that comes with scikit-learn
OUT gets a folder of WebDataset shards for each split, and dataset.json, which says what they hold. Splits that SOURCE
names (train, test, validation) are kept; else --test_fraction of the images is held out as `test`.

Images keep their bytes, unless --size, --crop or --format changes them. One that cannot be read or decoded is left out
and listed. The same command goes on from where it was killed, and OUT appears when all of it is there.
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import webdataset
from PIL import Image, ImageOps

from data.errors import DataError, command_errors
from data.files import escaped
from data.images import FORMATS, LIMITS, Limits, decode_whole
from data.inspect import DatasetSummary, add_limits, describe_shard, fingerprint
from data.processes import run_in_parallel
from data.shards.reader import Shards
from data.sources import MAX_RATIO, SPLITS, Bounds, Item, Reader, Source, open_source

ENDINGS = {  # of a shard's members, by Pillow's name of the format; the first where the file's own does not fit
    "PNG": ("png",),
    "JPEG": ("jpg", "jpeg"),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "PPM": ("ppm", "pgm"),
    "TIFF": ("tif", "tiff"),
    "GIF": ("gif",),
}
ENCODERS = ("png", "jpeg", "webp")


@dataclass(frozen=True)
class Settings:
    """What decides OUT, with the source.

    Args:
        test_fraction: share held out where the source names no splits, by a hash of each path
        per_shard: most images in a shard
        shard_bytes: most bytes in a shard, as the source has them
        size: pixels of the shorter side, or of both with `crop`
        crop: keep the largest centred square
        format: png, jpeg, webp, or keep
        quality: of JPEG and WebP, where images are encoded
        max_pixels, max_bytes, max_scans: of an image; one that has more is left out

    Raises:
        ValueError: one is out of its range.
    """

    test_fraction: float = 0.1
    per_shard: int = 10_000
    shard_bytes: int = 1_000_000_000
    size: int | None = None
    crop: bool = False
    format: str = "keep"
    quality: int = 95
    max_pixels: int = LIMITS.pixels
    max_bytes: int = LIMITS.bytes
    max_scans: int = LIMITS.scans

    @property
    def limits(self) -> Limits:
        return Limits(self.max_pixels, self.max_bytes, self.max_scans)

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("test_fraction", 0 <= self.test_fraction < 1, "a share from 0 (nothing is held out) to below 1"),
            ("per_shard", self.per_shard >= 1, "at least 1"),
            ("shard_bytes", self.shard_bytes >= 1, "at least 1"),
            ("size", self.size is None or self.size >= 1, "at least 1 pixel"),
            ("format", self.format in ("keep", *ENCODERS), f"keep, {', '.join(ENCODERS)}"),
            ("quality", 1 <= self.quality <= 100, "1 to 100"),
            *((f"max_{name}", most >= 1, "at least 1") for name, most in self.limits._asdict().items()),
        ):
            if not fits:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected {expected}")


class Task(NamedTuple):
    """A shard to be written: its images, each with its key."""

    split: str
    number: int
    items: list[tuple[str, Item]]

    @property
    def tar(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"

    @property
    def report(self) -> str:
        return f"{self.split}-{self.number:05d}.json"


def prepare(
    source: str,
    out: Path,
    workers: int = 1,
    max_rejected: float = 0.01,
    max_ratio: float = MAX_RATIO,
    root: Path = Path("datasets/torchvision"),
    download: bool = False,
    **settings: Any,
) -> dict[str, int]:
    """Write a source's shards, a folder a split, and dataset.json. OUT appears when all of it is there.

    Args:
        source: a word or path, as on the command line
        out: a new folder; beside it lies `.NAME.unfinished` until then
        workers: processes; they do not change a byte
        max_rejected: share of the images that may be left out
        max_ratio: bytes that a packed source may unpack to, in multiples of its own
        root, download: torchvision's folder, and whether it may fetch what is missing
        settings: those of `Settings`

    Returns:
        The number of images in each split.

    Raises:
        DataError: the source has no images or is damaged, too many cannot be read, or OUT exists.
        ValueError: a setting is out of its range.
        OSError: a file cannot be read or written.
    """
    chosen = Settings(**settings)
    if not 0 <= max_rejected <= 1:
        raise ValueError(f"--max_rejected is {max_rejected}, expected a share from 0 to 1")
    if workers < 1:
        raise ValueError(f"--workers is {workers}, expected at least 1")
    unfinished = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    with _alone(unfinished):
        if out.exists():
            raise DataError(f"{out} exists already: name a new folder, or remove it first")
        bounds = Bounds(max_ratio, chosen.limits)
        opened = open_source(source, unfinished / "source", root, download, bounds=bounds)
        tasks = plan(opened, chosen, source)
        files = hashlib.sha256()
        for item in opened.items:
            files.update(repr(item).encode())
        state = {"images": len(opened.items), "files": files.hexdigest()[:16]}
        _begin(unfinished, {"source": source, **asdict(chosen), **state})
        rejected = _write_all(tasks, Writer(opened.read, chosen, unfinished), workers, max_rejected)
        splits = _describe(tasks, unfinished)
        described = {
            "source": source,
            "settings": asdict(chosen),
            "fingerprint": fingerprint(opened.classes, splits),
            "classes": opened.classes,
            "splits": splits,
            "ignored": dict(sorted(opened.ignored.items())),
            "rejected": rejected,
        }
        for split in splits:
            Shards(unfinished / "out" / split)  # makes the index
        with _whole(unfinished / "dataset.json", unfinished / "out" / "dataset.json") as file:
            file.write(json.dumps(described, indent=1).encode())
        os.rename(unfinished / "out", out)
        shutil.rmtree(unfinished)
    return {split: one["images"] for split, one in splits.items()}


def plan(source: Source, settings: Settings, name: str) -> list[Task]:
    """Which image goes to which shard: in order of a hash of their keys, so that every shard mixes the classes.

    Raises:
        DataError: a split would be empty, or is not known.
    """
    items = source.items if source.ordered else sorted(source.items, key=lambda item: _hash(item.key))
    named = [split for split in dict.fromkeys(SPLITS.values()) if any(item.split == split for item in items)]
    if len(named) > 1:
        if left := [item for item in items if item.split is None]:
            raise DataError(
                f"{name} names its splits ({', '.join(named)}), but not that of {len(left):,} images, such as "
                f"{left[0].name}: give all of its files such a name, or leave some out"
            )
        splits = {split: [item for item in items if item.split == split] for split in named}
    else:
        held_out = settings.test_fraction * 16**40
        splits = {
            "train": [item for item in items if int(_hash(item.key), 16) >= held_out],
            "test": [item for item in items if int(_hash(item.key), 16) < held_out],
        }
        if settings.test_fraction == 0:
            del splits["test"]
    tasks = []
    for split, items in splits.items():
        if not items:
            raise DataError(
                f"no image of {name} fell to the {split} split: change --test_fraction {settings.test_fraction} (0 "
                "holds nothing out), or bring more images"
            )
        keyed = [(item.key if source.ordered else f"{i:08d}", item) for i, item in enumerate(items)]
        tasks += [Task(split, number, part) for number, part in enumerate(_parts(keyed, settings))]
    return tasks


def _hash(key: str) -> str:
    return hashlib.sha1(key.encode("utf-8", "surrogateescape")).hexdigest()


def _parts(items: list[tuple[str, Item]], settings: Settings) -> Iterator[list[tuple[str, Item]]]:
    part, total = list[tuple[str, Item]](), 0
    for key, item in items:
        if part and (len(part) == settings.per_shard or total + item.size > settings.shard_bytes):
            yield part
            part, total = [], 0
        part.append((key, item))
        total += item.size
    yield part


def convert(content: bytes, settings: Settings) -> tuple[str, bytes]:
    """An image's format, and its bytes in the size, crop and format asked for: its own where that is nothing new.

    A changed image is upright, of mode L or RGB, and, with the format `keep`, JPEG or WebP if it was that, else PNG.

    Raises:
        ValueError: the bytes are no image or damaged, or the new one would be too large.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            form, (width, height) = str(header.format).replace("MPO", "JPEG"), header.size  # MPO: a JPEG and more
    except Exception:
        decode_whole(content, settings.limits)  # says what is wrong, in words
        raise
    wanted = form if settings.format == "keep" else settings.format.upper()
    sized = settings.size in (None, min(width, height)) and not (settings.crop and width != height)
    if sized and wanted == form:
        return form, content
    image = decode_whole(content, settings.limits)
    if settings.crop:
        side = settings.size or min(image.size)
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)  # as a run does that reads it
    elif not sized and settings.size:
        width, height = (round(side * settings.size / min(image.size)) for side in image.size)
        if width * height > settings.max_pixels:
            raise ValueError(f"it would have {width} x {height} pixels, more than {settings.max_pixels:,}")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    wanted = wanted if wanted.lower() in ENCODERS else "PNG"
    file = io.BytesIO()
    try:
        image.save(file, wanted, **({} if wanted == "PNG" else {"quality": settings.quality}))
    except (OSError, ValueError) as error:  # WebP ends at 16,383 pixels a side
        raise ValueError(f"it cannot be written as {wanted}: {error}") from error
    return wanted, file.getvalue()


@dataclass
class Writer:
    """Writes one shard a call, in any process: OUT/SPLIT/NUMBER.tar, and before it a report of what it holds."""

    read: Reader
    settings: Settings
    unfinished: Path

    def __call__(self, task: Task, advance: Callable[[int], Any]) -> list[dict[str, str]]:
        """The images that were left out, and why."""
        tally, rejected, tar = DatasetSummary(), [], self.unfinished / "out" / task.tar
        tar.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(_whole(self.unfinished / f"{task.report}.tar", tar))
            with webdataset.TarWriter(file, mtime=0) as writer:
                for key, item in task.items:
                    try:
                        content, label = self.read(item)
                        ending, content = self._encoded(item, content)
                        tally.add(key, content, label, self.settings.limits)
                    except ValueError as error:
                        rejected.append({"file": item.name, "reason": str(error)})
                    else:
                        writer.write({"__key__": key, ending: content, **({"cls": str(label)} if label >= 0 else {})})
                    advance(1)
            report = stack.enter_context(_whole(self.unfinished / f"{task.report}.part", self.unfinished / task.report))
            report.write(json.dumps({"tally": tally.to_json(), "rejected": rejected}).encode())
        return rejected

    def _encoded(self, item: Item, content: bytes) -> tuple[str, bytes]:
        if not content:
            raise ValueError("it holds no bytes")
        form, content = convert(content, self.settings)
        ending = Path(item.name).suffix.lower().lstrip(".")
        return ending if ending in ENDINGS[form] else ENDINGS[form][0], content


def _write_all(tasks: list[Task], writer: Writer, workers: int, max_rejected: float) -> list[dict[str, str]]:
    total = sum(len(task.items) for task in tasks)
    rejected: list[dict[str, str]] = []

    def collect(more: list[dict[str, str]]) -> None:
        rejected.extend(more)
        if len(rejected) > max_rejected * total:
            reasons = "".join(f"\n  {escaped(one['file'])}: {one['reason']}" for one in rejected[:10])
            raise DataError(
                f"{len(rejected):,} of {total:,} images could not be read, more than --max_rejected {max_rejected}. "
                f"Mend or remove them, or raise --max_rejected to leave them out; the first are:{reasons}"
            )

    done = {task.tar for task in tasks if (writer.unfinished / "out" / task.tar).exists()}
    todo = [task for task in tasks if task.tar not in done]
    for task in tasks:
        if task.tar in done:
            collect(json.loads((writer.unfinished / task.report).read_text())["rejected"])
    run_in_parallel(writer, todo, workers, collect, "preparing", total, total - sum(len(task.items) for task in todo))
    return sorted(rejected, key=lambda one: one["file"])


def _describe(tasks: list[Task], unfinished: Path) -> dict[str, dict[str, Any]]:
    """The splits of dataset.json, from the shards' reports. A shard none of whose images could be read is removed."""
    whole = {task.split: DatasetSummary() for task in tasks}
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in whole}
    for task in tasks:
        tally = DatasetSummary(**json.loads((unfinished / task.report).read_text())["tally"])
        path = unfinished / "out" / task.tar
        if tally.images:
            whole[task.split] += tally
            shards[task.split].append(describe_shard(path, tally))
        else:
            path.unlink()
    if empty := [split for split, tally in whole.items() if not tally.images]:
        raise DataError(f"none of the images of the {empty[0]} split could be read: see the reasons in {unfinished}")
    return {split: tally.summary() | {"shards": shards[split]} for split, tally in whole.items()}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process works in the unfinished folder, which goes again if it fails before there is a plan."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is at work in {folder}: wait for it, or end it") from error
        try:
            yield
        except BaseException:
            if not (folder / "plan.json").exists():
                shutil.rmtree(folder)
            raise


def _begin(unfinished: Path, planned: dict[str, Any]) -> None:
    """Go on with what was begun by the same plan, or begin where no shard is finished.

    Raises:
        DataError: it was another plan.
    """
    path = unfinished / "plan.json"
    if not (path.exists() and any((unfinished / "out").glob("*/*.tar"))):
        shutil.rmtree(unfinished / "out", ignore_errors=True)
        with _whole(unfinished / "plan.json.part", path) as file:
            file.write(json.dumps(planned).encode())
    before = json.loads(path.read_text())
    if before != planned:
        raise DataError(
            f"{unfinished} holds the beginning of another plan:"
            + "".join(f"\n  {k}: {before.get(k)} then, {v} now" for k, v in planned.items() if before.get(k) != v)
            + f"\nGo on with its settings and its source, or remove {unfinished} to begin anew"
        )


@contextlib.contextmanager
def _whole(temporary: Path, path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when all of it is on the disk."""
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, Settings()
    add("source", metavar="SOURCE", help="where the images are, see above")
    add("out", metavar="OUT", type=Path, help="a new folder")
    add("--size", type=int, help="resize the shorter side to that many pixels (bicubic, antialiased)")
    add("--crop", action="store_true", help="keep the largest centred square")
    add("--format", default=default.format, help="png, jpeg or webp; keep (default): as it is where nothing changes")
    add("--quality", type=int, default=default.quality, help="of JPEG and WebP (default: %(default)s)")
    add("--test_fraction", type=float, default=default.test_fraction,
        help="share held out where SOURCE names no splits, by a hash of each path (default: %(default)s)")  # fmt: skip
    add("--per_shard", type=int, default=default.per_shard, help="most images in a shard (default: %(default)s)")
    add("--shard_bytes", type=int, default=default.shard_bytes,
        help="most bytes in a shard, as SOURCE has them (default: %(default)s)")  # fmt: skip
    add("--max_rejected", type=float, default=0.01,
        help="share of images that may be left out because they cannot be read (default: %(default)s)")  # fmt: skip
    add("--max_ratio", type=float, default=MAX_RATIO,
        help="most bytes that a packed SOURCE unpacks to, in multiples of its own (default: %(default)s)")  # fmt: skip
    add_limits(parser)
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)")
    add("--root", type=Path, default=Path("datasets/torchvision"), help="torchvision's folder (default: %(default)s)")
    add("--download", action="store_true", help="let torchvision fetch what is not there")
    settings = parser.parse_args(arguments)
    with command_errors(parser, "stopped: the same command goes on from here"):
        counts = prepare(**vars(settings))
        described = json.loads((settings.out / "dataset.json").read_text())
    classes = len(described["classes"])
    print(f"{settings.out}: {', '.join(f'{n:,} images in {split}' for split, n in counts.items())}, {classes} classes")
    if ignored := described["ignored"]:
        print("ignored: " + ", ".join(f"{count:,} {escaped(ending)}" for ending, count in ignored.items()))
    if rejected := described["rejected"]:
        print(f"rejected: {len(rejected):,} images, listed with their reasons in {settings.out / 'dataset.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
