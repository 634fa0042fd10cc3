"""Shards on this machine: their open files and tables."""

import os
import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import DataError
from data.files import regular_file
from data.shards.index import Shard, load_table, save_table, scan, table_path

MAX_OPEN = 4096  # files that stay open, and at most a quarter of what the process may open
MAX_TABLES = 4096  # tables that stay mapped


class LocalShards:
    """Open files and tables of shards on this machine, with the interface of `Cache`.

    Args:
        unsaved: tables that could not be written beside their shards, by path
        writes: whether tables may be written beside the shards
    """

    def __init__(self, unsaved: dict[str, np.ndarray], writes: bool):
        self.unsaved, self.writes = unsaved, writes
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()
        self._announced: set[str] = set()
        self._tables = dict(unsaved)

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens and maps files itself.
        return self.__dict__ | {"_open": OrderedDict(), "_announced": set(), "_tables": dict(self.unsaved)}

    @contextmanager
    def opened(self, path: str, shard: Shard) -> Iterator[tuple[int, np.ndarray]]:
        """A context with a shard's file descriptor and table.

        Raises:
            DataError: The file is gone, or differs from its index.
        """
        if path not in self._open:
            self._open[path] = self._open_file(path, shard)
            if len(self._open) > min(MAX_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4):
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        yield self._open[path].fileno(), self.table(path, shard)

    def table(self, path: str, shard: Shard) -> np.ndarray:
        """Return a shard's table; raise DataError if the shard differs from its index."""
        if path not in self._tables:
            if len(self._tables) >= MAX_TABLES:
                del self._tables[next(iter(self._tables))]
            table = load_table(Path(path), shard) if shard.table or _is_newer(path) else None
            self._tables[path] = self._scan(Path(path), shard) if table is None else table
        return self._tables[path]

    def _open_file(self, path: str, shard: Shard) -> IO[bytes]:
        try:
            file = open(regular_file(path), "rb", buffering=0)  # noqa: SIM115 - `opened` closes it
        except OSError as error:
            raise DataError(f"cannot open shard {path}: {error.strerror}") from error
        stat = os.fstat(file.fileno())
        if stat.st_size != shard.filesize or (shard.mtime_ns and stat.st_mtime_ns != shard.mtime_ns):
            file.close()
            raise DataError(
                f"shard {path} was replaced since it was indexed ({shard.filesize:,} bytes then, {stat.st_size:,} "
                "now): start again, which indexes a folder again, or make its index.json again"
            )
        if path not in self._announced:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            self._announced.add(path)
        return file

    def _scan(self, path: Path, shard: Shard) -> np.ndarray:
        found, table = scan(path, checksums=False)
        if len(table) != shard.nsamples or shard.table not in ("", found.table):
            problem = f", {found.problems[0]}" if found.problems else ""
            raise DataError(
                f"shard {path} has {len(table):,} images, and its index says {shard.nsamples:,} samples{problem}: "
                "index it again (python -m data.index), or name its folder"
            )
        if self.writes and not shard.checksum:  # of another program's index; ours has checksums, which this table lacks
            save_table(path, table)
        return table


def _is_newer(path: str) -> bool:
    """Return whether a shard's table was written after the shard, which another program's index does not tell."""
    try:
        return table_path(Path(path)).stat().st_mtime_ns > os.stat(path).st_ctime_ns
    except OSError:
        return False
