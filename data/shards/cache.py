"""Remote shards, whole, in a folder of this machine that its processes share."""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import DataError
from data.files import FULL
from data.shards.index import Shard, load_table, save_table, scan, table_path
from data.shards.remote import download

WAIT = 0.05  # seconds between looks for room
MAX_TABLES = 256  # tables that stay in memory
OURS = re.compile(r"[0-9a-f]+(\.tar|\.tar\.npy|\.\d+\.part)|\.unfinished\.[0-9a-f]+\.tar\.npy\..+")  # its files


class Cache:
    """Remote shards on this machine: each is downloaded once for all processes, the least recently used are dropped.

    A file is a whole shard (`KEY.tar`, with its table) or a part of one (`KEY.BYTES.part`), which counts with all its
    bytes from the beginning. A process that downloads a shard holds an exclusive lock on it, one that reads it a shared
    lock, and only shards without locks are dropped; files are made, renamed and dropped under the folder's lock. The
    kernel releases a killed process's locks, and another process continues its download. A shard's key depends on its
    index entry, so a set that was made again at the same URL is another one.

    Args:
        folder: on a file system of this machine, because of the locks; made if it is missing
        limit: bytes that all files together never exceed
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int):
        self.folder, self.limit = Path(folder), limit
        self._tables: dict[Path, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}  # another process reads them itself

    @contextmanager
    def opened(self, url: str, shard: Shard) -> Iterator[tuple[int, np.ndarray]]:
        """A context with a shard's file descriptor and table, in which the shard is not dropped.

        A process must not open a second shard in it: two processes could then wait for each other's room.

        Raises:
            DataError: The shard cannot be downloaded or written, differs from its index, or exceeds the limit.
        """
        path = self._path(url, shard)
        while (file := self._locked(path, shard)) is None:
            self.fetch(url, shard)
        with file:
            yield file.fileno(), self._table(path, shard)

    def fetch(self, url: str, shard: Shard) -> None:
        """Download a shard that is not in the folder; another process may drop it at once.

        Raises:
            DataError: As `opened`.
        """
        path, need = self._path(url, shard), shard.filesize + 32 * shard.nsamples + 256
        if need > self.limit:
            raise DataError(
                f"data.cache_gb (--cache_gb of trainer.evaluate) is {self.limit / 1e9:g}, and the shard {url} alone "
                f"has {need / 1e9:g} GB: raise it to what the shards of some steps need together"
            )
        part = path.with_suffix(f".{need}.part")
        try:
            while not path.exists():
                if not self._reserve(path, part, need):
                    time.sleep(WAIT)  # all is in use: reading a batch's part of a shard takes milliseconds
                    continue
                try:
                    with suppress(FileNotFoundError), open(part, "r+b") as file:  # not found: it is whole, or dropped
                        fcntl.flock(file, fcntl.LOCK_EX)
                        if _is_at(file, part):
                            download(url, file, shard.filesize)
                            os.fsync(file.fileno())
                            self._finish(part, path, url, shard)
                except OSError as error:
                    if error.errno not in FULL or not self._lower_limit(part, need):
                        raise
        except OSError as error:
            raise DataError(
                f"data.cache (--cache of trainer.evaluate) {self.folder}: {error.strerror or error}, and remote shards "
                "are kept there: make room, or name another folder"
            ) from error

    def _finish(self, part: Path, path: Path, url: str, shard: Shard) -> None:
        found, table = scan(part, bool(shard.checksum))
        if found.nsamples != shard.nsamples or (shard.table and found.table != shard.table):
            part.unlink()
            raise DataError(
                f"the shard {url} is another one than its index says ({found.nsamples:,} samples, {shard.nsamples:,} "
                f"in the index{', ' + found.problems[0] if found.problems else ''}): index it again"
            )
        if found.checksum != shard.checksum:
            part.unlink()
            raise DataError(
                f"images of the shard {url} have other checksums than its index says: it was damaged, or made again. "
                "Fetch it again, and index it again if that does not help"
            )
        with self._lock():
            if not save_table(path, table):
                raise OSError(errno.ENOSPC, "its table cannot be written")
            part.rename(path)

    def release(self, url: str, shard: Shard) -> None:
        """Mark a shard as the first to be dropped."""
        with suppress(OSError):
            os.utime(self._path(url, shard), (0, 0))

    def _locked(self, path: Path, shard: Shard) -> IO[bytes] | None:
        """Return a whole shard, locked while it is open, or None if it is not here."""
        try:
            file = open(path, "rb")  # noqa: SIM115 - the caller closes it
        except (FileNotFoundError, NotADirectoryError):
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        is_here, is_whole = _is_at(file, path), os.fstat(file.fileno()).st_size == shard.filesize
        if is_here and is_whole:
            with suppress(OSError):  # the file may be another user's
                os.utime(file.fileno())
            return file
        file.close()
        if is_here:  # a failing disk may leave a part
            with self._lock():
                _drop(path)
        return None

    def _table(self, path: Path, shard: Shard) -> np.ndarray:
        if path not in self._tables:
            if len(self._tables) >= MAX_TABLES:
                del self._tables[next(iter(self._tables))]
            table = load_table(path, shard)
            self._tables[path] = scan(path, checksums=False)[1] if table is None else table
        return self._tables[path]

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(0o700, parents=True, exist_ok=True)  # who may write there may change images
        with open(self.folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, path: Path, part: Path, need: int) -> bool:
        """Make room for a shard, and its part; return False if too much of the cache is in use."""
        with self._lock():
            if part.exists() or path.exists():
                return True
            files = sorted(self._files())
            room = self.limit - sum(size for _, size, _ in files)
            for _, size, other in files:
                if room >= need:
                    break
                room += size if _drop(other) else 0
            if room >= need:
                part.touch()
            return room >= need

    def _lower_limit(self, part: Path, need: int) -> bool:
        """Drop the part of a shard for which the disk had no room, and lower the limit to what is there.

        Return False if nothing else of the cache is there, so that no room could be made.
        """
        with self._lock():
            paths = [path for _, _, path in self._files()]
            if paths == [part]:
                return False
            self.limit = max(need, min(self.limit, sum(map(_size, paths))))
            _drop(part)
            return True

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield last use, bytes and path of each shard; remove tables whose shard is gone, as after a kill."""
        ours = [path for path in sorted(self.folder.iterdir()) if OURS.fullmatch(path.name)]
        for path in ours:
            if path.suffix == ".part":
                yield path.stat().st_mtime, int(path.suffixes[-2][1:]), path
            elif path.suffix == ".tar":
                yield path.stat().st_mtime, _size(path) + _size(table_path(path)), path
            elif path.suffix != ".npy" or not path.with_suffix("").exists():
                path.unlink(missing_ok=True)

    def _path(self, url: str, shard: Shard) -> Path:
        what = f"{url}\n{shard.filesize}\n{shard.mtime_ns}\n{shard.nsamples}\n{shard.table}{shard.checksum}"
        return self.folder / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.tar"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file still has that name: it may have been dropped or finished before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _drop(path: Path) -> bool:
    """Drop a shard and return True, unless a process has locked it."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        table_path(path).unlink(missing_ok=True)
    return True
