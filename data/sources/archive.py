"""Archives of image folders. Members are read in place, so that nothing is written under a name from the archive."""

import bz2
import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import regular_file
from data.shards.tars import members
from data.sources.folder import File, image_folder
from data.sources.paths import is_image, safe_parts
from data.sources.shards import shards_source, tar_errors
from data.sources.source import Item, OpenFiles, RangeReader, Request, Source, check_size

OPENERS: dict[str, Callable[..., Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
    ".tar.bz2": bz2.open,
}
READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks other methods without any bound


def open_zip(request: Request) -> Source | None:
    """Open a zip of an image folder."""
    path, bounds = request.path, request.bounds
    if path.suffix.lower() != ".zip" or not path.is_file():
        return None
    read = ZipReader(path, bounds.image.bytes)
    infos = {info.filename: info for info in read.open().infolist() if not info.is_dir()}
    files = [File(name, name, info.file_size, info.CRC) for name, info in infos.items()]
    bounds.check(sum(file.size for file in files if is_image(file.path)), path, path.stat().st_size)
    return image_folder(_without_common_folders(files), read, str(path), request.splits)


def open_tar(request: Request) -> Source | None:
    """Open a tar of an image folder, plain or compressed; a tar with class files is a WebDataset shard."""
    path, name = request.path, request.path.name.lower()
    if not path.is_file():
        return None
    if opener := next((opener for ending, opener in OPENERS.items() if name.endswith(ending)), None):
        path = _unpack(request, opener)
    elif not name.endswith(".tar"):
        return None
    with tar_errors(path):
        places = {name: place for name, *place in members(path)}  # the last member of a name counts
    if any(name.endswith(".cls") for name in places):
        return shards_source([path], path.parent, request.bounds)
    stamp = path.stat().st_mtime_ns
    files = [File(name, (0, offset, size), size, stamp) for name, (offset, size) in places.items()]
    read = RangeReader([path], request.bounds.image.bytes)
    return image_folder(_without_common_folders(files), read, str(path), request.splits)


class ZipReader(OpenFiles):
    """A reader of a zip's members; an item's `where` is the member's name."""

    def __init__(self, path: Path, max_bytes: int):
        super().__init__()
        self.path, self.max_bytes = path, max_bytes

    def open(self) -> zipfile.ZipFile:
        try:
            if not self.opened:
                self.opened[self.path] = zipfile.ZipFile(regular_file(self.path))
            return self.opened[self.path]
        except OSError:
            raise
        except Exception as error:  # zipfile raises nearly anything on damaged headers
            raise DataError(f"{self.path} is no zip, or damaged ({error}): fetch it again") from error

    def __call__(self, item: Item) -> tuple[bytes, int]:
        check_size(item.size, self.max_bytes)
        archive = self.open()
        method = archive.getinfo(item.where).compress_type
        if method not in READABLE:
            raise ValueError(f"it is packed by method {method}, expected none or deflate: pack it again")
        try:
            return archive.read(item.where), item.label
        except Exception as error:  # zipfile raises nearly anything on damaged bytes
            raise ValueError(f"it cannot be unpacked: {error}") from error


def _unpack(request: Request, opener: Callable[..., Any]) -> Path:
    """Write the plain tar in a compressed one to the spool: a compressed tar cannot be read from the middle."""
    path, stat = request.path, request.path.stat()
    try:
        with opener(regular_file(path), "rb") as packed, open(request.spool, "wb") as file:
            while content := packed.read(2**20):
                file.write(content)
                request.bounds.check(file.tell(), path, stat.st_size)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # a full disk is no fault of the file
            raise
        raise DataError(f"cannot unpack {path}: {error}. It is damaged or cut short: fetch it again") from error
    os.utime(request.spool, ns=(0, stat.st_mtime_ns))
    return request.spool


def _without_common_folders(files: list[File]) -> list[File]:
    """Remove from an archive's paths the folders that all of its images are in."""
    clean = [file._replace(path="/".join(safe_parts(file.path))) for file in files]
    folders = [os.path.dirname(file.path) for file in clean if is_image(file.path)]
    common = os.path.commonpath(folders) if folders else ""
    return [file._replace(path=file.path.removeprefix(f"{common}/")) for file in clean]
