"""WebDataset shards: write them, and read any sample by its position, from this machine or from elsewhere.

A shard is an ordinary tar whose members share a key: `000042.png` and `000042.cls` are one sample.
"""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import webdataset

from data import index
from data.cache import Cache
from data.index import IMAGE_EXTENSIONS, DataError, Shard
from data.remote import is_remote, read

__all__ = ["IMAGE_EXTENSIONS", "DataError", "Shards", "write"]

OPEN = 256  # local shards held open by a process
OnError = Literal["stop", "skip"]


class Row(NamedTuple):
    """Where a sample's image lies in its shard, in bytes, and its label (-1: none)."""

    offset: int
    length: int
    label: int


def write(folder: Path, samples: Iterable[dict[str, Any]], per_shard: int = 10_000) -> int:
    """Write WebDataset samples (`__key__`, an image's bytes by extension, `cls`) as shards into `folder`; index them.

    Returns the number of samples. Same samples, same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=per_shard, mtime=0, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
            written += 1
    index.of_folder(folder)
    return written


class Shards:
    """The samples of some shards by position: the shards in order of name or of their index, end to end.

    Args:
        source: a folder of shards (*.tar), which is indexed where it has no index or an older one; an `index.json`,
            here or at a URL; or the URL of a folder that has one
        on_error: whether shards that are damaged, missing or empty, and samples without an image, are errors, or are
            left out and told in `problems`; whether images that cannot be decoded are, or others stand in for them
        cache: for remote shards

    Raises:
        DataError: there are no samples, or there is a problem that stops.
    """

    def __init__(self, source: str | os.PathLike[str], on_error: OnError = "stop", cache: Cache | None = None):
        self.source, self.on_error, self.cache = os.fspath(source), on_error, cache
        self._tables: dict[str, np.ndarray] = {}  # of a folder that cannot be written
        base, found = self._find()
        self.problems = [f"shard {_join(base, shard.url)}: {told}" for shard in found for told in shard.problems]
        if self.problems and on_error == "stop":
            more = f" (and {len(self.problems) - 1} more problems)" if len(self.problems) > 1 else ""
            raise DataError(
                f"{self.problems[0]}{more}. Mend or remove what is wrong (for good: its line in index.json, too), or "
                "leave such shards and samples out with --data.on_error skip"
            )
        self.shards = [shard for shard in found if shard.nsamples]
        if not self.shards:
            raise DataError(f"the shards of {self.source} hold no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        self.paths = [_join(base, shard.url) for shard in self.shards]
        self.remote = np.array([is_remote(path) for path in self.paths])
        assert cache is not None or not self.remote.any(), "remote shards need a cache"
        self.counts = np.array([shard.nsamples for shard in self.shards])
        self.ends = np.cumsum(self.counts)
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()  # of this machine

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def labels(self) -> np.ndarray:
        """int64 [samples]; -1 where a sample has none. Reads every shard's table."""
        return self._column("label")

    def fingerprint(self) -> str:
        """Changes with the shards' names, sizes, sample places or labels; not with where they are."""
        return index.fingerprint(self.shards)

    def images(self, positions: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """The encoded images at some positions, and their labels, int64 [positions].

        One shard after the other, so that a remote one is held for a moment only.

        Raises:
            DataError: a shard is gone, cannot be fetched, or is not as its index says.
        """
        contents, labels = [b""] * len(positions), np.full(len(positions), -1)
        order = np.argsort(positions)
        shards = np.searchsorted(self.ends, positions[order], side="right")
        for places in np.split(order, np.flatnonzero(np.diff(shards)) + 1) if len(order) else []:
            shard, _ = self._place(int(positions[places[0]]))
            with self._opened(shard) as (file, table):
                rows = table[positions[places] - (self.ends[shard] - self.counts[shard])]
                labels[places] = rows[:, 2]
                try:
                    for place, offset, length in zip(places.tolist(), *rows[:, :2].T.tolist(), strict=True):
                        contents[place] = content = os.pread(file, length, offset)
                        if len(content) != length:
                            raise self._cut(shard, offset, length, len(content))
                except OSError as error:
                    raise DataError(f"cannot read shard {self.paths[shard]}: {error.strerror}") from error
        return contents, labels

    def image(self, position: int) -> bytes:
        """The encoded image at a position.

        Raises:
            DataError: as `images`.
        """
        return self.images(np.array([position]))[0][0]

    def row(self, position: int) -> Row:
        """Where a sample is in its shard."""
        shard, row = self._place(position)
        with self._opened(shard) as (_, table):
            return Row(*table[row].tolist())

    def name(self, position: int) -> str:
        """Where a sample lies, for messages: its shard and, where that can still be read, its member."""
        shard, row = self._place(position)
        try:
            with self._opened(shard) as (file, table):
                header = os.pread(file, tarfile.BLOCKSIZE, int(table[row, 0]) - tarfile.BLOCKSIZE)
            return f"{self.paths[shard]}, member {tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape').name}"
        except (DataError, OSError, tarfile.HeaderError):
            return f"{self.paths[shard]}, sample {row}"

    def shards_of(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the shards, each once, that some positions lie in."""
        return np.unique(np.searchsorted(self.ends, positions, side="right"))

    def bounds(self, position: int) -> tuple[int, int]:
        """First position, and one past the last, of a sample's shard."""
        shard, row = self._place(position)
        return position - row, int(self.ends[shard])

    def fetch(self, shard: int) -> None:
        """Have a remote shard in the cache.

        Raises:
            DataError: it cannot be fetched.
        """
        assert self.cache is not None
        self.cache.fetch(self.paths[shard], self.shards[shard])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # another process's descriptors point at other files

    def _find(self) -> tuple[str, list[Shard]]:
        """Where the shards' names are relative to, and their entries."""
        source = self.source
        if source.endswith(".tar") or (not is_remote(source) and "{" in source and not os.path.exists(source)):
            raise DataError(
                f"{source} names shards, which need an index: python -m data.index '{source}' OUT.json, then give "
                "OUT.json, or the folder of shards where it is on this machine"
            )
        if source.endswith(".json"):
            text = read(source).decode() if is_remote(source) else Path(source).read_text()
            return source.rpartition("/")[0], index.of_file(text, source)
        if is_remote(source):
            source = source.rstrip("/")
            return source, index.of_file(read(f"{source}/index.json").decode(), f"{source}/index.json")
        found, self._tables = index.of_folder(Path(source))
        return source, found

    def _place(self, position: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, position, side="right"))
        return shard, int(position - (self.ends[shard] - self.counts[shard]))

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate(
            [self._whole_table(shard)[:, Row._fields.index(name)] for shard in range(len(self.shards))]
        )

    def _whole_table(self, shard: int) -> np.ndarray:
        if not is_remote(self.paths[shard]):
            return self._local_table(self.paths[shard], self.shards[shard])
        with self._opened(shard) as (_, table):
            return table

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[int, np.ndarray]]:
        """A shard's file descriptor and table."""
        path, entry = self.paths[shard], self.shards[shard]
        if is_remote(path):
            assert self.cache is not None
            with self.cache.opened(path, entry) as opened:
                yield opened
            return
        if shard not in self._open:
            self._open[shard] = self._open_local(path, entry), self._local_table(path, entry)
            if len(self._open) > OPEN:
                os.close(self._open.popitem(last=False)[1][0])
        self._open.move_to_end(shard)
        yield self._open[shard]

    def _open_local(self, path: str, entry: Shard) -> int:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"cannot open shard {path}: {error.strerror}") from error
        stat = os.fstat(file)
        if stat.st_size != entry.filesize or (entry.mtime_ns and stat.st_mtime_ns != entry.mtime_ns):
            os.close(file)
            raise DataError(
                f"shard {path} has {stat.st_size:,} bytes, {entry.filesize:,} when it was indexed, or is of another "
                "time: it was replaced while in use. Start again, and it is indexed anew"
            )
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    def _local_table(self, path: str, entry: Shard) -> np.ndarray:
        if entry.url in self._tables:
            return self._tables[entry.url]
        table = index.load_table(Path(path), entry.table)
        return index.scan(Path(path))[1] if table is None else table

    def _cut(self, shard: int, offset: int, length: int, found: int) -> DataError:
        return DataError(
            f"shard {self.paths[shard]} ends at byte {offset + found}, but its index has an image up to byte "
            f"{offset + length}: it was cut short or replaced while in use"
        )


def _join(base: str, url: str) -> str:
    return url if is_remote(url) or os.path.isabs(url) else f"{base}/{url}" if base else url
