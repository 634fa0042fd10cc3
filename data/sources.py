"""Where `data.prepare` finds images: folders, archives, Parquet, torchvision's sets, WebDataset shards, the digits.

A source lists its images once; its reader then reads any of them by itself, in any process and order. Nothing is ever
written under a name that a source brings along. What allows no such reading (a compressed tar, Parquet) is first laid
out in one plain file beside the unfinished shards.
"""

import bz2
import difflib
import functools
import gzip
import hashlib
import inspect
import io
import json
import lzma
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import msgspec
import numpy as np
from braceexpand import braceexpand
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data.errors import DataError
from data.files import escaped, parse, read, regular_file
from data.images import LIMITS, Limits, header, limit_settings
from data.shards.index import IMAGE_EXTENSIONS, label_of, members, samples
from data.shards.reader import OnError

SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
OPENERS: dict[str, Callable[..., Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
    ".tar.bz2": bz2.open,
    ".tar": open,
}
MAX_RATIO = 200  # bytes of an archive's images, in multiples of its own: what unpacks to more may be a bomb
SMALL = 2**26  # bytes that any archive may unpack to
FORMS = (
    "a folder of images, an archive of one (.tar, .tar.gz, .tar.xz, .tar.bz2, .zip), a .parquet file or a folder of "
    "them, WebDataset shards (a folder of .tar, or a pattern: shards/{000..009}.tar), torchvision:NAME, or digits"
)


class Item(NamedTuple):
    """One image of a source.

    Args:
        key: does not change when other images come or go: it decides the order and the split
        name: how messages call it
        where: what its reader reads it by
        size: encoded bytes, 0 if that is not known
        stamp: another one means another file
        split: as the source names it
        label: number of its class, -1: none
    """

    key: str
    name: str
    where: Any
    size: int = 0
    stamp: int = 0
    split: str | None = None
    label: int = -1


Reader = Callable[[Item], tuple[bytes, int]]


@dataclass
class Source:
    """All images of a source.

    Args:
        items: in a fixed order
        read: an image's bytes and label. It can be pickled. Raises ValueError where this image cannot be had but
            others can, OSError or DataError where the source cannot be read
        classes: the names of labels 0, 1, ...; empty where the source has none
        ordered: order and keys are the items' own, and not those of a shuffle
        ignored: how many files were no images, by ending
    """

    items: list[Item]
    read: Reader
    classes: list[str] = field(default_factory=list)
    ordered: bool = False
    ignored: Counter[str] = field(default_factory=Counter)


class Bounds(NamedTuple):
    """What a source may hold at most.

    Args:
        ratio: times its own bytes, that a packed archive's images have
        image: of each image
    """

    ratio: float = MAX_RATIO
    image: Limits = LIMITS

    def check(self, unpacked: int, path: Path, packed: int) -> None:
        """Refuse what unpacks to more.

        Raises:
            DataError: it does.
        """
        if unpacked > max(SMALL, self.ratio * packed):
            raise DataError(
                f"{path} has {packed:,} bytes, and unpacks to more than {max(SMALL, self.ratio * packed):,.0f}: it may "
                f"be made to fill a disk. If it is not, raise data.prepare's --max_ratio {self.ratio:g}"
            )


BOUNDS = Bounds()


class Listed:
    """A source's images by position, in the order it lists them; reads like `Shards`.

    Args:
        source: the images
        name: of the source, for messages
        size: pixels a side that each must have; None takes any
        channels: 1 refuses images in colour; None takes any
    """

    on_error: OnError = "stop"
    limits: Limits = LIMITS
    unpacked: tempfile.TemporaryDirectory[str] | None = None  # where a compressed archive lies as long as it is read

    def __init__(self, source: Source, name: str, size: int | None = None, channels: int | None = None):
        self.source, self.source_name, self.size, self.channels = source, name, size, channels

    def __len__(self) -> int:
        return len(self.source.items)

    @property
    def labels(self) -> np.ndarray:
        """int64 [images], -1: none."""
        return np.array([item.label for item in self.source.items])

    def images(self, positions: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """The encoded images at some positions, and their labels.

        Raises:
            DataError: one cannot be read, or has another size.
        """
        contents, labels = [], []
        for position in positions.tolist():
            try:
                content, label = self.source.read(self.source.items[position])
                if self.size or self.channels:
                    self._check(content)
            except (ValueError, OSError) as error:
                raise DataError(f"{self.name(position)}: {error}") from error
            contents.append(content)
            labels.append(label)
        return contents, np.array(labels, dtype=np.int64)

    def _check(self, content: bytes) -> None:
        size, channels = header(content, self.limits)
        if self.size and size != (self.size, self.size):
            raise ValueError(
                f"it has {size[0]}x{size[1]} pixels, and the first image {self.size} a side: --size brings all to one"
            )
        if self.channels and channels > self.channels:
            raise ValueError("it is in colour, and the first image grey: say how to see them all by --channels 3, or 1")

    def name(self, position: int) -> str:
        return f"{self.source_name}, {escaped(self.source.items[position].name)}"

    def bounds(self, position: int) -> tuple[int, int]:
        return 0, len(self)

    def fingerprint(self) -> str:
        """Changes with the images' names, sizes, times and labels."""
        told = [[item.key, item.size, item.stamp, item.label] for item in self.source.items]
        return hashlib.sha256(json.dumps([told, self.size]).encode()).hexdigest()[:16]


class Found(NamedTuple):
    key: str  # its path without the ending
    path: Path


def find(folder: Path) -> list[Found]:
    """All images under a folder, in order of their paths.

    Raises:
        DataError: there is no image.
    """
    items = open_folder(folder, splits=False).items
    return [Found(item.key, folder / item.where) for item in items]


def open_source(
    name: str, spool: Path, root: Path, download: bool = False, splits: bool = True, bounds: Bounds = BOUNDS
) -> Source:
    """The images that a name on the command line stands for.

    Args:
        name: one of FORMS
        spool: where a file may be laid out that allows no random access
        root, download: torchvision's folder, and whether it may fetch what is missing
        splits: a folder's `train` and `test` sub-folders are splits, and not classes
        bounds: what it may hold

    Raises:
        DataError: there is no such source, it is damaged, or it holds no images.
    """
    if name == "digits":
        return open_digits()
    if name.startswith("torchvision:"):
        return open_torchvision(name.removeprefix("torchvision:"), root, download, bounds)
    if "{" in name and name.endswith(".tar"):
        try:
            return open_shards([Path(path) for path in braceexpand(name)], bounds=bounds)
        except ValueError as error:
            raise DataError(f"{name} has braces that are not closed: expected a pattern as x/{{00..09}}.tar") from error
    path = Path(name)
    if not path.exists():
        raise DataError(f"{name} does not exist on this machine: expected {FORMS}")
    if path.is_dir():
        files = [path / file for file in sorted(_files(path, Counter())) if _is_visible(file)]
        if found := [file for file in files if file.suffix == ".parquet"]:
            return open_parquet(found, path, spool, bounds)
        if found := [file for file in files if file.suffix == ".tar"]:
            return open_shards(found, path, bounds)
        return open_folder(path, splits, bounds)
    if path.suffix.lower() == ".parquet":
        return open_parquet([path], path.parent, spool, bounds)
    if path.suffix.lower() == ".zip":
        return open_zip(path, splits, bounds)
    for ending, opener in OPENERS.items():
        if path.name.lower().endswith(ending):
            return open_tar(path if opener is open else _laid_out(path, opener, spool, bounds), splits, bounds)
    raise DataError(f"{name} is a file of no known kind: expected {FORMS}")


def open_folder(folder: Path, splits: bool = True, bounds: Bounds = BOUNDS) -> Source:
    """An image folder: its sub-folders are the classes, below `train` and `test` sub-folders if it has those."""
    entries, ignored = [], Counter[str]()
    for name in _files(folder, ignored):
        path = folder / name
        try:
            stat = path.stat()
        except OSError:  # a broken link, or one to itself, fails when it is read
            stat = path.lstat()
        entries.append(_Entry(name, name, stat.st_size, stat.st_mtime_ns))
    reader = functools.partial(_read_file, folder, bounds.image.bytes)
    return _image_folder(entries, reader, str(folder), splits, ignored)


def open_zip(path: Path, splits: bool = True, bounds: Bounds = BOUNDS) -> Source:
    """A zip of an image folder."""
    reader = ZipReader(path, bounds.image.bytes)
    files = {one.filename: one for one in reader.open().infolist() if not one.is_dir()}
    entries = [_Entry(name, name, one.file_size, one.CRC) for name, one in files.items()]
    bounds.check(sum(one.size for one in entries if _is_image(one.path)), path, path.stat().st_size)
    return _image_folder(_below_common_folders(entries), reader, str(path), splits)


def open_tar(path: Path, splits: bool = True, bounds: Bounds = BOUNDS) -> Source:
    """A tar of an image folder; one with class files is a shard."""
    files, stamp = (
        {name: place for name, *place in _told(path, members(path))},
        path.stat().st_mtime_ns,
    )  # the last of a name counts
    if any(name.endswith(".cls") for name in files):
        return open_shards([path], bounds=bounds)
    entries = [_Entry(name, (0, offset, size), size, stamp) for name, (offset, size) in files.items()]
    reader = RangeReader([path], bounds.image.bytes)
    return _image_folder(_below_common_folders(entries), reader, str(path), splits)


class Described(msgspec.Struct):
    """What a dataset.json beside shards may say."""

    classes: list[str] = []


def open_shards(paths: list[Path], folder: Path | None = None, bounds: Bounds = BOUNDS) -> Source:
    """WebDataset shards; their names, or their folders', may tell the split, and a dataset.json the classes' names."""
    items = []
    for number, path in enumerate(tqdm(paths, desc="listing", unit=" shards", disable=None, leave=False)):
        if not path.is_file():
            raise DataError(f"shard {path} does not exist, or is no regular file: mend the pattern, or bring the file")
        split, stamp = _split_of(path, folder or path.parent), path.stat().st_mtime_ns
        for one in _told(path, samples(path)):
            where = (number, one.offset, one.size)
            items.append(Item(one.key, f"{path.name}: {one.name}", where, one.size, stamp, split, one.label))
    if not items:
        raise DataError(f"the shards {paths[0]} ... hold no images ({_endings()})")
    places = [folder or paths[0].parent, (folder or paths[0].parent).parent]
    described = [place / "dataset.json" for place in places if (place / "dataset.json").exists()]
    try:
        classes = parse(read(described[0]), Described).classes if described else []
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {described[0]}: {error}. Mend it, or remove it: it names the classes") from error
    return Source(items, RangeReader(paths, bounds.image.bytes), classes)


def open_parquet(paths: list[Path], folder: Path, spool: Path, bounds: Bounds = BOUNDS) -> Source:
    """Parquet files as Hugging Face writes them: a column of images, one of labels, the classes' names in the schema.

    Raises:
        DataError: pyarrow is not installed, a file is damaged, or no column holds images.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{paths[0]} is Parquet, which pyarrow reads, and pyarrow is not installed: pip install pyarrow, or "
            "'.[parquet]' of this project"
        ) from error
    items, labels, classes = list[Item](), list[Any](), list[str]()
    with open(spool, "wb") as file:
        for path in tqdm(paths, desc="laying out", unit=" files", disable=None, leave=False):
            start, packed = file.tell(), path.stat().st_size
            split, stamp, name = _split_of(path, folder), path.stat().st_mtime_ns, path.relative_to(folder)
            for number, (content, label, names) in enumerate(_rows(path)):
                where = (0, file.tell(), file.write(content))
                bounds.check(file.tell() - start, path, packed)
                key = f"{name.with_suffix('')}/{number:08d}"
                items.append(Item(key, f"{name}, row {number}", where, len(content), stamp, split))
                labels.append(label)
                classes = classes or names
    if not items:
        raise DataError(f"{paths[0]} holds no rows: name a file that has images")
    if any(isinstance(one, str) for one in labels):
        labels, classes = _numbered(labels)
    try:
        items = [
            item._replace(label=-1 if one is None else label_of(one)) for item, one in zip(items, labels, strict=True)
        ]
    except ValueError as error:
        raise DataError(f"a label of {paths[0]}: {error}") from error
    return Source(items, RangeReader([spool], bounds.image.bytes), classes)


def open_torchvision(name: str, root: Path, download: bool, bounds: Bounds = BOUNDS) -> Source:
    """A data set of torchvision.datasets, in all its splits of usual names.

    Raises:
        DataError: torchvision has no such data set, or it is not under the root.
    """
    from torchvision import datasets

    if name not in datasets.__all__ or "root" not in (known := inspect.signature(getattr(datasets, name)).parameters):
        names = {one.lower(): f"torchvision:{one}" for one in datasets.__all__}
        close = [names[one] for one in difflib.get_close_matches(name.lower(), names, 3)]
        raise DataError(
            f"torchvision:{name} is no data set of torchvision.datasets that has a root"
            + (f": did you mean {' or '.join(close)}?" if close else "")
        )
    options: list[tuple[str | None, dict[str, Any]]] = [(None, {})]
    if "train" in known:
        options = [("train", {"train": True}), ("test", {"train": False})]
    elif "split" in known:
        options = [(split, {"split": word}) for word, split in [*SPLITS.items(), ("trainval", "train")]]
    reader, fetch = (
        TorchvisionReader(name, root, bounds.image.bytes),
        {"download": True} if download and "download" in known else {},
    )
    items, classes, taken = list[Item](), list[str](), set[str | None]()
    for split, keywords in options:
        if split not in taken and (data := reader.open(keywords | fetch)) is not None:
            taken.add(split)
            items += [Item(f"{i:08d}", f"{split or name} {i}", (keywords, i), split=split) for i in range(len(data))]
            classes = [one if isinstance(one, str) else ", ".join(one) for one in getattr(data, "classes", [])]
    if not items:
        raise DataError(f"torchvision:{name} has no split of a usual name ({', '.join(SPLITS)}), so none can be taken")
    return Source(items, reader, classes)


def open_digits() -> Source:
    """scikit-learn's handwritten digits, every fifth held out.

    1,797 grey 8x8 images in ten classes (Alpaydin & Kaynak 1998, UCI Machine Learning Repository).
    """
    items = [
        Item(f"{i:06d}", f"digit {i}", i, split="test" if i % 5 == 4 else "train", label=int(label))
        for i, label in enumerate(_digits()[1])
    ]
    return Source(items, _read_digit, [str(digit) for digit in range(10)], ordered=True)


class _Opens:
    """What it opens stays open, and does not travel to other processes."""

    def __init__(self) -> None:
        self.opened: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": {}}


class RangeReader(_Opens):
    """Parts of files: (number of the file, offset, size)."""

    def __init__(self, paths: list[Path], most: int):
        super().__init__()
        self.paths, self.most = paths, most

    def __call__(self, item: Item) -> tuple[bytes, int]:
        number, offset, size = item.where
        _check_size(size, self.most)
        if number not in self.opened:
            if len(self.opened) >= 100:
                self.opened.pop(next(iter(self.opened))).close()
            self.opened[number] = open(regular_file(self.paths[number]), "rb")  # noqa: SIM115
        content = os.pread(self.opened[number].fileno(), size, offset)
        if len(content) != size:
            raise DataError(f"{self.paths[number]} ends within {item.name}: it was cut short while in use")
        return content, item.label


class ZipReader(_Opens):
    """Members of a zip, by their names."""

    def __init__(self, path: Path, most: int):
        super().__init__()
        self.path, self.most = path, most

    def open(self) -> zipfile.ZipFile:
        try:
            if not self.opened:
                self.opened[self.path] = zipfile.ZipFile(regular_file(self.path))
            return self.opened[self.path]
        except OSError:
            raise
        except Exception as error:  # zipfile raises nearly anything on damaged headers
            raise DataError(f"{self.path} is no zip, or damaged ({error}): fetch it anew") from error

    def __call__(self, item: Item) -> tuple[bytes, int]:
        _check_size(item.size, self.most)
        archive = self.open()
        method = archive.getinfo(item.where).compress_type
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others are unpacked whole, whatever is asked for
            raise ValueError(f"it is packed by method {method}, expected none or deflate: pack it anew")
        try:
            return archive.read(item.where), item.label
        except Exception as error:  # zipfile raises nearly anything on damaged bytes
            raise ValueError(f"it cannot be unpacked: {error}") from error


class TorchvisionReader(_Opens):
    """Images of a torchvision data set: (its settings, index). Files are taken as they are, arrays become PNGs."""

    def __init__(self, name: str, root: Path, most: int):
        super().__init__()
        self.name, self.root, self.most = name, root, most

    def open(self, keywords: dict[str, Any]) -> Any:
        """The data set; None if it has no such split."""
        from torchvision import datasets

        if repr(keywords) not in self.opened:
            try:
                data = getattr(datasets, self.name)(self.root, **keywords)
            except (RuntimeError, FileNotFoundError, TypeError, ValueError) as error:
                if str(error).startswith("Unknown value"):  # of a split
                    return None
                raise DataError(
                    f"torchvision:{self.name} cannot be opened under --root {self.root}: {error}. Name the folder "
                    "that holds it by --root, or let torchvision fetch it by --download"
                ) from error
            if hasattr(data, "loader"):
                data.loader = Path  # hands over the file instead of decoding it
            self.opened[repr(keywords)] = data
        return self.opened[repr(keywords)]

    def __call__(self, item: Item) -> tuple[bytes, int]:
        keywords, index = item.where
        try:
            image, label = self.open(keywords)[index][:2]
        except UnidentifiedImageError as error:
            raise ValueError(str(error)) from error
        if not isinstance(image, (Path, Image.Image)):
            raise DataError(f"torchvision:{self.name} holds {type(image).__name__}s where images were expected")
        is_class = isinstance(label, (int, np.integer)) or getattr(label, "shape", None) == ()
        content = _bytes(image, self.most) if isinstance(image, Path) else _png(image)
        return content, int(label) if is_class else -1


def _read_file(folder: Path, most: int, item: Item) -> tuple[bytes, int]:
    return _bytes(folder / item.where, most), item.label


def _bytes(path: Path, most: int) -> bytes:
    """An image's file; why it cannot be read is this image's fault, and not that of others.

    Raises:
        ValueError: it cannot be read, or has more than so many bytes.
    """
    try:
        return read(path, most)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from error


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it has {size:,} bytes, more than {most:,} ({limit_settings('bytes')})")


def _read_digit(item: Item) -> tuple[bytes, int]:
    return _png(Image.fromarray(_digits()[0][item.where])), item.label


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8] and labels [1797]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), labels


def _told(path: Path, listed: Iterator[Any]) -> Iterator[Any]:
    """What is listed of a tar; what is wrong with it as a DataError."""
    try:
        yield from listed
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}. It is damaged, cut short or no tar: fetch it anew") from error


class _Entry(NamedTuple):
    path: str
    where: Any
    size: int
    stamp: int


def _image_folder(
    entries: Iterable[_Entry], reader: Reader, name: str, splits: bool = True, ignored: Counter[str] | None = None
) -> Source:
    """A class's label is the place of its name among those of all splits."""
    images, ignored = [], Counter() if ignored is None else ignored
    for entry in entries:
        parts = _parts(entry.path)
        if _is_image(entry.path):
            images.append((parts, entry))
        else:
            ignored[os.path.splitext(entry.path)[1].lower() or "without ending"] += 1
    tops = {parts[0] for parts, _ in images if len(parts) > 1} & SPLITS.keys()
    split_by_folder = splits and "train" in tops and len({SPLITS[top] for top in tops}) > 1
    items, categories = list[Item](), list[str | None]()
    for parts, entry in sorted(images):
        split = None
        if split_by_folder:
            if parts[0] not in tops:
                ignored["outside of " + ", ".join(sorted(tops))] += 1
                continue
            split, parts = SPLITS[parts[0]], parts[1:]
        key = str(PurePosixPath(*parts).with_suffix(""))
        items.append(Item(key, entry.path, entry.where, entry.size, entry.stamp, split))
        categories.append(parts[0] if len(parts) > 1 else None)
    if not items:
        found = ", ".join(f"{count} {ending}" for ending, count in ignored.most_common(5)) or "nothing"
        raise DataError(f"{name} holds no images ({_endings()}), but {found}: name a folder or file that has some")
    labels, classes = _numbered(categories)
    items = [item._replace(label=label) for item, label in zip(items, labels, strict=True)]
    return Source(items, reader, classes, ignored=ignored)


def _numbered(names: list[str | None]) -> tuple[list[int], list[str]]:
    """Labels, -1 where there is no name, and the classes that they number."""
    classes = sorted({name for name in names if name is not None})
    numbers = {None: -1} | {name: number for number, name in enumerate(classes)}
    return [numbers[name] for name in names], classes


def _below_common_folders(entries: list[_Entry]) -> list[_Entry]:
    """An archive's paths without the folders that all its images are in."""
    clean = [entry._replace(path="/".join(_parts(entry.path))) for entry in entries]
    folders = [os.path.dirname(entry.path) for entry in clean if _is_image(entry.path)]
    common = os.path.commonpath(folders) if folders else ""
    return [entry._replace(path=entry.path.removeprefix(f"{common}/")) for entry in clean]


def _files(folder: Path, ignored: Counter[str]) -> Iterator[str]:
    """Paths of all files, and of what else is no folder, relative to the folder; not in hidden sub-folders.

    Each folder is listed once, however many links lead to it: under its own path, where that lies below `folder`.
    """
    seen, folders, links = set[tuple[int, int]](), [""], list[str]()
    while folders or links:
        parent = folders.pop() if folders else links.pop(0)
        try:
            stat = os.stat(folder / parent)
            if (stat.st_dev, stat.st_ino) in seen:
                ignored["links to a folder that is listed already"] += 1
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(folder / parent) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:  # such as lost+found
            if not parent:
                raise
            ignored["folders that this user may not read"] += 1
            continue
        for entry in listed:
            path = os.path.join(parent, entry.name)
            if not _is_folder(entry):
                yield path
            elif _is_visible(entry.name):
                (links if entry.is_symlink() else folders).append(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _split_of(path: Path, folder: Path) -> str | None:
    """train, test or validation, as a word of the path says: data/train-00000-of-00004.parquet, test/0000.tar."""
    for part in path.relative_to(folder).parts:
        for word in part.lower().replace("_", "-").replace(".", "-").split("-"):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _rows(path: Path) -> Iterator[tuple[bytes, int | str | None, list[str]]]:
    """Image, label and the classes' names, of each row of a Parquet file."""
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(regular_file(path))
        image, label, names = _columns(path, file.schema_arrow)
        for batch in file.iter_batches(64, columns=[image, label] if label else [image]):
            for row in batch.to_pylist():
                content = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
                yield content or b"", row[label] if label else None, names
    except DataError:
        raise
    except Exception as error:  # pyarrow raises nearly anything on damaged bytes
        raise DataError(f"cannot read {path} as Parquet: {error}. Fetch it anew") from error


class _Info(msgspec.Struct):
    features: dict[str, Any] = {}


class _HuggingFace(msgspec.Struct):
    """What `datasets` says in a Parquet file's schema."""

    info: _Info = msgspec.field(default_factory=_Info)


def _columns(path: Path, schema: Any) -> tuple[str, str | None, list[str]]:
    """The column of images, the one of labels, the names of their classes."""
    features = parse((schema.metadata or {}).get(b"huggingface", b"{}"), _HuggingFace).info.features
    kinds = {one.name: str(one.type) for one in schema}
    binary = [
        name for name, kind in kinds.items() if kind in ("binary", "large_binary") or kind.startswith("struct<bytes: ")
    ]
    images = [name for name in ("image", "img") if name in binary] or binary
    if not images or (len(images) > 1 and images[0] not in ("image", "img")):
        raise DataError(
            f"{path} has {len(binary)} columns that may hold encoded images, none of them called image. Expected a "
            f"column `image` of bytes, or of struct{{bytes, path}}; its columns: "
            + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        )
    named = [
        name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    ]
    label = "label" if "label" in kinds else next(iter(named), None)
    if label is not None and not (kinds[label].startswith(("int", "uint")) or "string" in kinds[label]):
        label = None
    names = features[label].get("names", []) if label in named else []
    return images[0], label, msgspec.convert(names, list[str])


def _laid_out(path: Path, opener: Callable[..., Any], spool: Path, bounds: Bounds) -> Path:
    """The plain tar in a compressed one, which cannot be read from the middle."""
    size = path.stat().st_size
    try:
        with opener(regular_file(path), "rb") as packed, open(spool, "wb") as file:
            while content := packed.read(2**20):
                file.write(content)
                bounds.check(file.tell(), path, size)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # a full disk is no fault of the file
            raise
        raise DataError(f"cannot unpack {path}: {error}. It is damaged or cut short: fetch it anew") from error
    os.utime(spool, ns=(0, path.stat().st_mtime_ns))
    return spool


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _parts(path: str) -> tuple[str, ...]:
    """Of a path that may mean harm: what lies below the folder, whatever it climbs or starts from."""
    return tuple(part for part in PurePosixPath(path).parts if part not in ("/", "//", ".."))


def _is_image(path: str) -> bool:
    return _is_visible(path) and PurePosixPath(path).suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def _is_visible(path: str) -> bool:
    """Neither hidden, nor what macOS adds to its archives."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in _parts(path))


def _endings() -> str:
    return ", ".join(sorted(IMAGE_EXTENSIONS))
