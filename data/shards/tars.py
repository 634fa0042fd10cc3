"""Tars of samples: their members, read within bounds, as a stranger may have made them."""

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, cast

from webdataset.tariterators import base_plus_ext
from xxhash import xxh3_64

from data.files import escaped, regular_file

ENCODED = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif"})
IMAGE_EXTENSIONS = ENCODED | {"image.npy"}  # of members
IMAGE_FILES = ENCODED | {"npy"}  # of files, which are never latents
LATENT_EXTENSIONS = frozenset({"safetensors", "npy"})
MAX_HEADER = 2**20  # bytes of a tar's extended header
MAX_LABEL = 2**20  # classes, so that an array of one entry per class fits into memory
PIECE = 2**24  # bytes of an image that are read at once


class Sample(NamedTuple):
    """A sample of a shard."""

    key: str  # name without the extension
    name: str = ""  # of its last image, or of its last latents if it has no image, as are offset and size
    offset: int = 0
    size: int = 0
    images: int = 0  # how many it has
    latents: int = 0
    label: int = -1  # of its class, -1 if it has none


def samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard in its order.

    Raises:
        tarfile.TarError, OSError, ValueError: As `members`, or a class is no number.
    """
    with open(regular_file(path), "rb") as file:
        for key, found in groups(path):
            sample = Sample(key)
            for name, extension, offset, size in found:
                if extension in IMAGE_EXTENSIONS:
                    sample = sample._replace(name=name, offset=offset, size=size, images=sample.images + 1)
                elif extension in LATENT_EXTENSIONS and not sample.images:
                    sample = sample._replace(name=name, offset=offset, size=size, latents=sample.latents + 1)
                elif extension == "cls":
                    try:
                        sample = sample._replace(label=label_of(os.pread(file.fileno(), min(size, 100), offset)))
                    except ValueError as error:
                        raise ValueError(f"member {name}: {error}") from error
            yield sample


def groups(path: Path) -> Iterator[tuple[str, list[tuple[str, str, int, int]]]]:
    """Yield the key of each sample of a shard, and name, extension in small letters, offset and size of its members.

    Raises:
        tarfile.TarError, OSError: As `members`.
    """
    keyed = ((*base_plus_ext(name), name, offset, size) for name, offset, size in members(path))
    for key, found in itertools.groupby((one for one in keyed if one[0] is not None), key=lambda one: one[0]):
        yield key, [(name, extension.lower(), offset, size) for _, extension, name, offset, size in found]


def label_of(text: bytes | int) -> int:
    """Return the number of a class, -1 for none; raise ValueError if it is no number or out of range."""
    try:
        label = int(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no number of a class") from error
    if not -1 <= label < MAX_LABEL:
        raise ValueError(f"{text!r} is no number of a class: expected 0 to {MAX_LABEL - 1:,}")
    return label


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of every file of a plain tar; a hard link has those of its file.

    Raises:
        tarfile.TarError: It is no plain tar, damaged, or cut short, even if between two members.
        OSError: It cannot be read, or is no regular file.
    """
    files: dict[str, tuple[int, int]] = {}
    with open(regular_file(path), "rb") as file:
        end, place = os.fstat(file.fileno()).st_size, -1
        try:
            with tarfile.open(fileobj=cast(IO[bytes], _Headers(file)), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them in memory
                    if not place < tar.offset or member.size < 0 or member.offset_data > end:
                        raise tarfile.ReadError(f"the header of member {escaped(member.name)} leads nowhere")
                    place = tar.offset
                    if member.islnk() and member.linkname in files:
                        yield member.name, *files[member.linkname]
                    elif member.isfile():
                        if member.issparse() or member.size > end - member.offset_data:
                            raise tarfile.ReadError(f"member {escaped(member.name)} is cut short, or sparse")
                        files[member.name] = member.offset_data, member.size
                        yield member.name, *files[member.name]
                if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"there is neither a member nor the end's mark at byte {tar.offset:,}")
        except (tarfile.TarError, OSError):
            raise
        except Exception as error:  # tarfile raises nearly anything on damaged headers
            raise tarfile.ReadError(f"a header is damaged: {error or type(error).__name__}") from error


class _Headers:
    """The part of a tar that tarfile may read: headers of bounded size."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header has {size:,} bytes")
        return self.file.read(size)


def checksum(file: int, offset: int, size: int) -> int:
    """Return xxh3_64, as a signed number of 64 bits, of a part of an open file, or of what the file has of it."""
    hash_ = xxh3_64()
    for start in range(offset, offset + size, PIECE):
        hash_.update(os.pread(file, min(PIECE, offset + size - start), start))
    number = hash_.intdigest()
    return number - (number >> 63 << 64)
