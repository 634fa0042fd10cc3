"""WebDataset shards: write them, index them, read any sample by its position.

A shard is an ordinary tar whose members share a key: `000042.png` and `000042.cls` are one sample. The index is read
from the tars' headers and kept beside them: `index.json` (the layout of wids) and, for each shard, `NAME.tar.npy` with
one row a sample: offset and length of the image in bytes, label (-1: none).
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from webdataset.tariterators import base_plus_ext

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif"})


class DataError(RuntimeError):
    """The data is missing or damaged; the message says where, what was found and what to do."""


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
    Shards(folder)
    return written


class Shards:
    """The samples of all `*.tar` in a folder, by position: the shards in order of name, laid end to end.

    Args:
        folder: holds the shards; their index is made where missing or of another file, and kept where it can be

    Raises:
        DataError: the folder is missing or empty, or a shard cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(
                f"the data folder {self.folder} does not exist. Expected a folder of WebDataset shards (*.tar): make "
                "them with `python -m data.prepare SOURCE OUT`, or `make data` for the embedded digits"
            )
        self.paths = sorted(self.folder.glob("*.tar"))
        if not self.paths:
            raise DataError(
                f"the data folder {self.folder} holds no shards (*.tar): make them with `python -m data.prepare SOURCE "
                "OUT`, or name the folder that has them"
            )
        indexed = self._indexed()
        tables = [_table(path, indexed.get(path.name) == _state(path)) for path in self.paths]
        self.counts = [len(table) for table in tables]
        self.rows = np.concatenate(tables)
        if not len(self.rows):
            raise DataError(f"the shards in {self.folder} hold no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        self.ends = np.cumsum(self.counts)
        self._descriptors: dict[int, int] = {}
        self._write_index()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """int64 [samples]; -1 where a sample has none."""
        return self.rows[:, 2]

    def fingerprint(self) -> str:
        """Changes with the shards' names, sizes, sample positions or labels."""
        digest = hashlib.sha256(self.rows.tobytes())
        digest.update(json.dumps(self._shard_list()).encode())
        return digest.hexdigest()[:16]

    def image(self, position: int) -> bytes:
        """The encoded image at a position.

        Raises:
            DataError: the shard is gone, or shorter than its index says.
        """
        shard = int(np.searchsorted(self.ends, position, side="right"))
        offset, length, _ = self.rows[position]
        try:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY)
            content = os.pread(self._descriptors[shard], length, offset)
        except OSError as error:
            raise DataError(f"cannot read shard {self.paths[shard]}: {error.strerror}") from error
        if len(content) != length:
            raise DataError(
                f"shard {self.paths[shard]} ends at byte {offset + len(content)}, but its index has an image up to "
                f"byte {offset + length}: it was cut short or replaced while in use"
            )
        return content

    def name(self, position: int) -> str:
        """Where a sample lies, for messages: its shard and member."""
        shard = int(np.searchsorted(self.ends, position, side="right"))
        with open(self.paths[shard], "rb") as file:
            file.seek(int(self.rows[position, 0]) - tarfile.BLOCKSIZE)
            member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        return f"{self.paths[shard]}, member {member.name}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}  # another process's descriptors point at other files

    def _shard_list(self) -> list[dict[str, Any]]:
        return [
            {"url": path.name, "nsamples": count, "filesize": path.stat().st_size}
            for path, count in zip(self.paths, self.counts, strict=True)
        ]

    def _indexed(self) -> dict[str, tuple[int, int]]:
        """The state of each shard when it was indexed."""
        try:
            content = json.loads((self.folder / "index.json").read_text())
            return {shard["url"]: (shard["filesize"], shard["mtime_ns"]) for shard in content["shardlist"]}
        except (OSError, ValueError, KeyError, TypeError):  # missing, or not ours: every shard is indexed anew
            return {}

    def _write_index(self) -> None:
        shards = [
            shard | {"mtime_ns": _state(path)[1]} for shard, path in zip(self._shard_list(), self.paths, strict=True)
        ]
        content = json.dumps({"wids_version": 1, "shardlist": shards}, indent=1).encode()
        path = self.folder / "index.json"
        if not path.exists() or path.read_bytes() != content:
            _keep(path, content)


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file: another one means another file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _table(path: Path, indexed: bool) -> np.ndarray:
    """int64 [samples, 3] of a shard, from its kept table if it is still the file that was indexed."""
    kept = path.with_suffix(".tar.npy")
    if indexed and kept.exists():
        try:
            return np.load(kept, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            pass  # damaged: made anew below
    table = np.array(list(_scan(path)), dtype=np.int64).reshape(-1, 3)
    buffer = io.BytesIO()
    np.save(buffer, table)
    _keep(kept, buffer.getvalue())
    return table


def _scan(path: Path) -> Iterator[tuple[int, int, int]]:
    """One row for each sample that has an image, in the tar's order."""
    key, image, label = None, None, -1
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                base, extension = base_plus_ext(member.name)
                if base != key:
                    if image:
                        yield *image, label
                    key, image, label = base, None, -1
                if extension.lower() in IMAGE_EXTENSIONS:
                    image = (member.offset_data, member.size)
                elif extension.lower() == "cls":
                    file = tar.extractfile(member)
                    assert file is not None
                    label = int(file.read())
            if tar.offset > path.stat().st_size:
                raise tarfile.ReadError("its last member is cut short")
        if image:
            yield *image, label
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(
            f"cannot index shard {path}: {error}. It is damaged, compressed or no tar: make it anew"
        ) from error


def _keep(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a read-only folder keeps no index, which costs time at the next start only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
