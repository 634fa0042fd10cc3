"""WebDataset shards: write them, and read any sample by its position, from this machine or from elsewhere.

A shard is a plain tar; members of one key are one sample, such as `000042.png` and `000042.cls`. webdataset reads a
shard from its beginning; reading by position lets a run resume at any step on any number of processes.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import webdataset
from msgspec.structs import replace

from data import files
from data.dataset import class_names
from data.errors import DataError
from data.images import LIMITS, Limits
from data.shards import index
from data.shards.cache import Cache
from data.shards.index import Shard
from data.shards.local import LocalShards
from data.shards.names import load_names
from data.shards.remote import check_named_by_file, check_same_origin, is_remote, read
from data.shards.tars import IMAGE_EXTENSIONS, groups

MAX_OTHERS = 2**30  # bytes of a shard's members that are no images, which are read at once
OnError = Literal["stop", "skip"]


def write(folder: Path, samples: Iterable[dict[str, Any]], per_shard: int = 10_000) -> int:
    """Write samples (`__key__`, an image's bytes by extension, `cls`) as shards, index them, and return their number.

    Equal samples give equal bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=per_shard, mtime=0, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
            written += 1
    index.index_folder(folder)
    return written


class Shards:
    """The samples of some shards by position: shards in order of name or of their index, end to end.

    Args:
        source: a folder of shards (*.tar), which is indexed if its index is missing or outdated; an `index.json`, here
            or at a URL; or the URL of a folder that has one
        on_error: `stop` raises an error for damaged, missing or empty shards and samples without an image; `skip`
            leaves them out and lists them in `problems`. Readers do alike with images that cannot be decoded
        cache: where remote shards are kept
        by_user: whether the user has named the source. If a file names it, no command runs, no index with commands is
            read, and nothing is written beside the shards
        limits: of an image, for its decoder; of an image with more bytes, one byte more than the limit is read

    Raises:
        DataError: There are no samples, there is a problem and `on_error` is `stop`, or the source is not allowed.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        on_error: OnError = "stop",
        cache: Cache | None = None,
        by_user: bool = True,
        limits: Limits = LIMITS,
    ):
        self.source, self.on_error, self.cache, self.limits = os.fspath(source), on_error, cache, limits
        base, found, tables = _find(self.source, by_user)
        self.problems = [f"shard {_join(base, shard.url)}: {text}" for shard in found for text in shard.problems]
        if self.problems and on_error == "stop":
            more = f" (and {len(self.problems) - 1} more problems)" if len(self.problems) > 1 else ""
            raise DataError(
                f"{self.problems[0]}{more}. Repair it, or remove it (and its line in index.json), or train without "
                "such shards and samples by --data.on_error skip; held-out images are never skipped"
            )
        self.shards = [shard for shard in found if shard.nsamples]
        if not self.shards:
            endings = ", ".join(sorted(IMAGE_EXTENSIONS))
            what = f"hold no images ({endings})" if found else "are none: its index is empty"
            raise DataError(f"the shards of {self.source} {what}")
        self.paths = [_join(base, shard.url) for shard in self.shards]
        self.remote = np.array([is_remote(path) for path in self.paths])
        if cache is None and self.remote.any():
            raise DataError(
                f"{self.paths[int(self.remote.argmax())]} is not on this machine: name a folder on a disk of its own, "
                "where such shards are kept, with --data.cache and --data.cache_gb (or --cache and --cache_gb of "
                "trainer.evaluate)"
            )
        self.counts = np.array([shard.nsamples for shard in self.shards])
        self.ends = np.cumsum(self.counts)
        self._local = LocalShards({_join(base, name): table for name, table in tables.items()}, writes=by_user)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def labels(self) -> np.ndarray:
        """int64 [samples], -1 where a sample has none; reads every shard's table."""
        parts = []
        for shard, (path, entry) in enumerate(zip(self.paths, self.shards, strict=True)):
            if self.remote[shard]:
                with self._opened(shard) as (_, table):
                    parts.append(table[:, 2])
            else:
                parts.append(self._local.table(path, entry)[:, 2])
        return np.concatenate(parts)

    @property
    def classes(self) -> list[str]:
        """Names of the labels 0, 1, ..., by the dataset.json beside shards on this machine; empty without one."""
        return [] if is_remote(self.source) else class_names(Path(self.source))

    def fingerprint(self) -> str:
        """Return a checksum of the shards' names, sizes, sample places, labels and images, wherever they are."""
        parts = [[Path(one.url).name, one.nsamples, one.filesize, one.table, one.checksum] for one in self.shards]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def images(self, positions: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Return the encoded images at some positions, and their labels, int64 [positions].

        Shards are read one after the other, so that a remote one is held only for a moment.

        Raises:
            DataError: A shard is gone, cannot be fetched, or differs from its index.
        """
        contents, labels = [b""] * len(positions), np.full(len(positions), -1)
        order = np.argsort(positions)
        shards = np.searchsorted(self.ends, positions[order], side="right")
        for shard in self.shards_of(positions).tolist():
            places = order[shards == shard]
            with self._opened(shard) as (file, table):
                rows = table[positions[places] - (self.ends[shard] - self.counts[shard])]
                labels[places] = rows[:, 2]
                lengths = rows[:, 1].clip(max=self.limits.bytes + 1)
                try:
                    parts = zip(places.tolist(), rows[:, 0].tolist(), lengths.tolist(), strict=True)
                    for place, offset, length in parts:
                        contents[place] = content = os.pread(file, length, offset)
                        if len(content) != length:
                            raise DataError(
                                f"shard {self.paths[shard]} ends at byte {offset + len(content)}, but its index has an "
                                f"image up to byte {offset + length}: it was cut short or replaced while in use"
                            )
                except OSError as error:
                    raise DataError(f"cannot read shard {self.paths[shard]}: {error.strerror}") from error
        return contents, labels

    def image(self, position: int) -> bytes:
        """Return the encoded image at a position; raise DataError as `images` does."""
        return self.images(np.array([position]))[0][0]

    def name(self, position: int) -> str:
        """Return a sample's shard, member and original name, for messages.

        If the member's name cannot be read, the row stands for it; the original name is left out if it is unknown.
        """
        shard, row = self._place(position)
        original = self.original(position)
        of = f" ({files.escaped(original)})" if original else ""
        try:
            with self._opened(shard) as (file, table):
                header = os.pread(file, tarfile.BLOCKSIZE, int(table[row, 0]) - tarfile.BLOCKSIZE)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
            return f"{self.paths[shard]}, member {member}{of}"
        except (DataError, OSError, tarfile.HeaderError):
            return f"{self.paths[shard]}, sample {row}{of}"

    def names(self, positions: np.ndarray) -> list[str]:
        """Return the name of each of some samples; by shard, as each shard's list of names is read."""
        named = {position: self.name(position) for position in np.unique(positions).tolist()}
        return [named[position] for position in positions.tolist()]

    def original(self, position: int) -> str:
        """Return the name that an image had before data.prepare wrote it; empty if unknown, as in remote shards."""
        shard, row = self._place(position)
        entry = self.shards[shard]
        names = [] if self.remote[shard] else load_names(Path(self.paths[shard]), entry.filesize)
        return names[row] if len(names) == entry.nsamples else ""

    def others(self, shard: int) -> list[tuple[str, dict[str, bytes]]]:
        """Return the key of each sample of a shard, and its members that are no images, by extension.

        Raises:
            DataError: The shard is gone, differs from its index, or these members are too large for the memory.
        """
        found, room = list[tuple[str, dict[str, bytes]]](), MAX_OTHERS
        with self._opened(shard) as (file, _):
            for key, members in groups(Path(f"/proc/self/fd/{file}")):
                images = [member for member in members if member[1] in IMAGE_EXTENSIONS]
                images = images or [member for member in members if member[1] == "npy"]
                others = [member for member in members if member not in images]
                if not images:  # another program's index leaves this sample out, as ours does
                    continue
                room -= sum(size for *_, size in others)
                if room < 0:
                    raise DataError(
                        f"shard {self.paths[shard]} has more than {MAX_OTHERS:,} bytes beside its images: make smaller "
                        "shards, or leave such members out"
                    )
                found.append((key, {name: os.pread(file, size, offset) for _, name, offset, size in others}))
        return found

    def shards_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the numbers of the shards that some positions lie in, each once, in the order of the positions.

        So machines that need the same shards do not all begin with the first one.
        """
        shards, first = np.unique(np.searchsorted(self.ends, positions, side="right"), return_index=True)
        return shards[first.argsort()]

    def bounds(self, position: int) -> tuple[int, int]:
        """Return the first position, and one past the last, of a sample's shard."""
        shard, row = self._place(position)
        return position - row, int(self.ends[shard])

    def fetch(self, shard: int) -> None:
        """Download a remote shard into the cache; raise DataError if that fails."""
        assert self.cache is not None
        self.cache.fetch(self.paths[shard], self.shards[shard])

    def release(self, shard: int) -> None:
        """Mark a remote shard as the first to be dropped from the cache."""
        assert self.cache is not None
        self.cache.release(self.paths[shard], self.shards[shard])

    def _place(self, position: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and its row in the shard's table."""
        shard = int(np.searchsorted(self.ends, position, side="right"))
        return shard, int(position - (self.ends[shard] - self.counts[shard]))

    def _opened(self, shard: int) -> AbstractContextManager[tuple[int, np.ndarray]]:
        """Return a context with a shard's file descriptor and table."""
        path, entry = self.paths[shard], self.shards[shard]
        if self.remote[shard]:
            assert self.cache is not None
            return self.cache.opened(path, entry)
        return self._local.opened(path, entry)


def _find(source: str, by_user: bool) -> tuple[str, list[Shard], dict[str, np.ndarray]]:
    """Return what the shards' names are relative to, their entries, and tables that could not be written."""
    if not by_user:
        check_named_by_file([source], "the run's configuration")
    if source.endswith(".tar") or (not is_remote(source) and "{" in source and not os.path.exists(source)):
        raise DataError(
            f"{source} names shards, which need an index: python -m data.index '{source}' OUT.json, then give "
            "OUT.json, or the folder of shards if it is on this machine"
        )
    if is_remote(source):
        path = source if source.endswith(".json") else f"{source.rstrip('/')}/index.json"
        shards = index.parse_index(read(path), path)
        if not path.startswith("file://"):
            check_same_origin((shard.url for shard in shards), path)
        elif not by_user:
            check_named_by_file((shard.url for shard in shards), f"the index {path}")
        return path.rpartition("/")[0], shards, {}
    if source.endswith(".json") and not os.path.isdir(source):
        try:
            shards = index.parse_index(files.read(source), source)
        except OSError as error:
            raise DataError(f"the index of shards {source} cannot be read: {error.strerror}") from error
        if not by_user:
            check_named_by_file((shard.url for shard in shards), f"the index {source}")
        base = os.path.dirname(source)
        return base, [_checked(shard, _join(base, shard.url)) for shard in shards], {}
    return source, *index.index_folder(Path(source), writes=by_user)


def _checked(shard: Shard, path: str) -> Shard:
    """Return an entry with what is wrong with its file, if that should be on this machine."""
    if is_remote(path):
        return shard
    try:
        size = os.stat(path).st_size
    except OSError as error:
        return replace(shard, nsamples=0, problems=(f"it cannot be found: {error.strerror}",))
    if size != shard.filesize:
        problem = f"it has {size:,} bytes, {shard.filesize:,} in its index: index it again"
        return replace(shard, nsamples=0, problems=(problem,))
    return shard


def _join(base: str, url: str) -> str:
    return url if is_remote(url) or os.path.isabs(url) else f"{base}/{url}" if base else url
