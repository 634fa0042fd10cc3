"""WebDataset shards, of any program."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from braceexpand import braceexpand
from tqdm import tqdm

from data.dataset import class_names
from data.errors import DataError
from data.shards.names import load_names
from data.shards.tars import samples
from data.sources.paths import ENDINGS, split_of
from data.sources.source import Bounds, Item, RangeReader, Request, Source


def open_shards(request: Request) -> Source | None:
    """Open a folder of WebDataset shards, or the shards that a pattern with braces names."""
    if "{" in request.name and request.name.endswith(".tar"):
        try:
            paths = [Path(path) for path in braceexpand(request.name)]
        except ValueError as error:
            raise DataError(
                f"{request.name} has braces that are not closed: expected a pattern such as x/{{00..09}}.tar"
            ) from error
        return shards_source(paths, paths[0].parent, request.bounds)
    if request.path.is_dir() and (paths := request.files(".tar")):
        request.check_alone(paths)
        return shards_source(paths, request.path, request.bounds)
    return None


def shards_source(paths: list[Path], folder: Path, bounds: Bounds) -> Source:
    """Return the source of some shards; words of their paths name the splits, a dataset.json the classes."""
    items = []
    for number, path in enumerate(tqdm(paths, desc="listing", unit=" shards", disable=None, leave=False)):
        if not path.is_file():
            raise DataError(
                f"shard {path} does not exist, or is no regular file: correct the pattern, or bring the file"
            )
        split, stamp = split_of(path, folder) if path.is_relative_to(folder) else None, path.stat().st_mtime_ns
        with tar_errors(path):
            originals = load_names(path, path.stat().st_size)
            for row, one in enumerate(samples(path)):
                name = originals[row] if row < len(originals) else f"{path.name}: {one.name}"
                where = (number, one.offset, one.size)
                items.append(Item(one.key, name, where, one.size, stamp, split, one.label))
    if not items:
        raise DataError(f"the shards {paths[0]} ... hold no images ({ENDINGS})")
    return Source(items, RangeReader(paths, bounds.image.bytes), class_names(folder))


@contextmanager
def tar_errors(path: Path) -> Iterator[None]:
    """Raise as DataError what is wrong with a tar."""
    try:
        yield
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}. It is damaged, cut short or no tar: fetch it again") from error
