"""The index of WebDataset shards: what each holds, and the table of its samples.

An index is `index.json` in the layout of wids, one entry a shard: `url` (relative to the index, or absolute),
`nsamples`, `filesize`; and of ours `mtime_ns`, `problems`, `table` and `checksum`, the digests of `NAME.tar.npy` beside
the shard, which has one row a sample: where the image begins in the tar, its bytes, its label (-1: none), its xxh3_64.
Where another program's `index.json` lies in a folder, ours is `.index.json`.
"""

import fcntl
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Annotated, Any, BinaryIO, NamedTuple, cast

import msgspec
import numpy as np
from msgspec.structs import asdict, replace
from webdataset.tariterators import base_plus_ext
from xxhash import xxh3_64, xxh3_64_intdigest

from data.errors import DataError
from data.files import escaped, parse, read, regular_file, try_write

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif"})
BY = "vaegan-trainer"
TOLD = 10  # problems of a shard that the index names
PARALLEL = 2**26  # bytes of tars from which several processes are worth their start
MAX_HEADER = 2**20  # bytes that a tar's extended header may have
MAX_LABEL = 2**20  # classes: whoever counts labels has room for so many
PIECE = 2**24  # bytes of an image that are read at once


class Shard(msgspec.Struct, frozen=True):
    """A shard's entry in an index.

    Args:
        table: digest of the places and labels of its samples
        checksum: digest of their images' checksums
    """

    url: Annotated[str, msgspec.Meta(min_length=1)]
    nsamples: Annotated[int, msgspec.Meta(ge=0)]
    filesize: Annotated[int, msgspec.Meta(ge=0, lt=2**50)]
    mtime_ns: int = 0
    table: str = ""
    checksum: str = ""
    problems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.nsamples > self.filesize // tarfile.BLOCKSIZE:  # each has a header at the least
            raise ValueError(f"{self.nsamples:,} samples do not fit into a tar of {self.filesize:,} bytes")


class Index(msgspec.Struct):
    """What a file that is an index holds; `by`: the program that wrote it."""

    shardlist: list[Shard]
    by: str = ""


def of_folder(folder: Path, writes: bool = True) -> tuple[list[Shard], dict[str, np.ndarray]]:
    """The shards of a folder, in order of name, and the tables that could not be kept there.

    Shards that are new or changed are scanned, and the index is written anew; a folder that cannot be written keeps
    none, which costs time at the next start only.

    Args:
        writes: whether the index and tables may be kept in the folder

    Raises:
        DataError: the folder is missing, or holds no shards.
    """
    if not folder.is_dir():
        raise DataError(
            f"the data folder {folder} does not exist. Expected a folder of WebDataset shards (*.tar), a URL of one, "
            "or an index.json: make shards with `python -m data.prepare SOURCE OUT`, or `make data` for the digits"
        )
    (path, known), found = _own(folder), _files(folder)
    if not found and not known:
        inside = " or ".join(sorted({str(one.parent) for one in folder.glob("*/*.tar")})[:3])
        hint = "make them with `python -m data.prepare SOURCE OUT`, or name the folder that has them"
        if inside or path.name.startswith("."):
            hint = f"but {inside or 'an index.json of shards elsewhere'}: name that"
        raise DataError(f"the data folder {folder} holds no shards (*.tar), {hint}")
    tables: dict[str, np.ndarray] = {}
    if _stale(found, known):
        with _in_turn(folder) if writes else nullcontext():
            (path, known), found = _own(folder), _files(folder)
            stale = _stale(found, known)
            for name, (shard, table) in zip(stale, _scans([folder / name for name in stale]), strict=True):
                known[name] = replace(shard, url=name)
                if not (writes and save_table(folder / name, table)):
                    tables[name] = table
            if stale and writes:
                try_write(path, _json([known[name] for name in sorted(known)]))
    missing = f"it is in {path.name}, but not in the folder"
    return [
        shard if name in found else replace(shard, nsamples=0, problems=(missing,))
        for name, shard in sorted(known.items())
    ], tables


def _stale(found: dict[str, tuple[tuple[int, int], bool]], known: dict[str, Shard]) -> list[str]:
    """The tars that have no table, or no entry of their present state."""
    return [name for name, (state, kept) in found.items() if not (kept and _is_of(known.get(name), state))]


def of_file(content: bytes, source: str) -> list[Shard]:
    """The shards of an index's text.

    Raises:
        DataError: it is no index, or lacks sizes.
    """
    try:
        return parse(content, Index).shardlist
    except ValueError as error:
        raise DataError(
            f"{source} is no index of shards ({error}): expected wids' layout, a shardlist with url, nsamples and "
            "filesize; `python -m data.index SHARDS OUT.json` makes one"
        ) from error


def known(folder: Path) -> dict[str, Shard]:
    """The shards of a folder by name, as they were last indexed; nothing is scanned or written."""
    return _own(folder)[1]


def table_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.npy")


def digest(table: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(table, dtype=np.int64).tobytes()).hexdigest()[:16]


def fingerprint(shards: Sequence[Shard]) -> str:
    """Changes with the shards' names, sizes, sample places, labels or images."""
    names = [[Path(shard.url).name, shard.nsamples, shard.filesize, shard.table, shard.checksum] for shard in shards]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def save_table(shard: Path, table: np.ndarray) -> bool:
    """Keep a table beside its shard; False where that cannot be written."""
    buffer = io.BytesIO()
    np.save(buffer, table)
    return try_write(table_path(shard), buffer.getvalue())


def load_table(shard: Path, expected: Shard) -> np.ndarray | None:
    """int64 [samples, 4] as kept beside a shard, mapped; None where it is not there, or is another one's."""
    try:
        table = np.asarray(np.load(regular_file(table_path(shard)), mmap_mode="r", allow_pickle=False))
    except Exception:  # on damaged bytes numpy raises nearly anything, of Python's own parser, too
        return None
    fits = table.shape == (expected.nsamples, 4) and table.dtype == np.int64
    known = fits and expected.table in ("", digest(table[:, :3])) and expected.checksum in ("", digest(table[:, 3]))
    return table if known else None


def scan(path: Path, checksums: bool = True) -> tuple[Shard, np.ndarray]:
    """A tar's entry and table. What is wrong with it is told in the entry, not raised; the samples before a cut count.

    Args:
        checksums: of the images, which are read for them; else they are 0, and the tar's headers alone are read
    """
    rows: list[tuple[int, int, int, int]] = []
    problems: list[str] = []
    keys: set[str] = set()
    try:
        with open(regular_file(path), "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            for sample in samples(path):
                if sample.key in keys:
                    problems.append(f"the key {escaped(sample.key)} appears twice")
                keys.add(sample.key)
                if sample.images > 1:
                    problems.append(f"sample {escaped(sample.key)} has {sample.images} images")
                if sample.images:
                    summed = checksum(file.fileno(), sample.offset, sample.size) if checksums else 0
                    rows.append((sample.offset, sample.size, sample.label, summed))
                else:
                    problems.append(
                        f"sample {escaped(sample.key)} has no image ({', '.join(sorted(IMAGE_EXTENSIONS))})"
                    )
        if not keys:
            problems.append("it holds no samples")
    except OSError as error:
        return Shard(path.name, 0, 0, problems=(f"it cannot be read: {error.strerror}",)), np.empty((0, 4), np.int64)
    except (tarfile.TarError, ValueError) as error:
        problems.insert(0, f"it is damaged, cut short, compressed or no tar: {error}")
    if len(problems) > TOLD:
        problems[TOLD:] = [f"and {len(problems) - TOLD:,} more"]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    digests = digest(table[:, :3]), digest(table[:, 3]) if checksums else ""
    return Shard(path.name, len(table), stat.st_size, stat.st_mtime_ns, *digests, tuple(problems)), table


def checksum(file: int, offset: int, size: int) -> int:
    """xxh3_64, as a signed number of 64 bits, of a part of an open file; of what is there, if the file ends before."""
    if size <= PIECE:
        return checksum_of(os.pread(file, size, offset))
    summed = xxh3_64()
    for start in range(offset, offset + size, PIECE):
        summed.update(os.pread(file, min(PIECE, offset + size - start), start))
    return _signed(summed.intdigest())


def checksum_of(content: bytes) -> int:
    """xxh3_64 of an image's bytes, as a signed number of 64 bits."""
    return _signed(xxh3_64_intdigest(content))


def _signed(number: int) -> int:
    return number - (number >> 63 << 64)


class Sample(NamedTuple):
    """A sample of a shard: its key, its last image's name and place, how many it has, and its label (-1: none)."""

    key: str
    name: str = ""
    offset: int = 0
    size: int = 0
    images: int = 0
    label: int = -1


def samples(path: Path) -> Iterator[Sample]:
    """The samples of a shard, in its order.

    Raises:
        tarfile.TarError, OSError, ValueError: as `members`; or a class is no number.
    """
    sample = None
    with open(regular_file(path), "rb") as file:
        for name, offset, size in members(path):
            key, extension = base_plus_ext(name)
            if key is None:
                continue
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = Sample(key)
            if extension.lower() in IMAGE_EXTENSIONS:
                sample = sample._replace(name=name, offset=offset, size=size, images=sample.images + 1)
            elif extension.lower() == "cls":
                content = os.pread(file.fileno(), min(size, 100), offset)
                try:
                    sample = sample._replace(label=label_of(content))
                except ValueError as error:
                    raise ValueError(f"member {name}: {error}") from error
    if sample is not None:
        yield sample


def label_of(told: bytes | int) -> int:
    """The number of a class; -1 is none.

    Raises:
        ValueError: it is no number, or one that no class has.
    """
    try:
        label = int(told)
    except ValueError as error:
        raise ValueError(f"{told!r} is no number of a class") from error
    if not -1 <= label < MAX_LABEL:
        raise ValueError(f"{told!r} is no number of a class: expected 0 to {MAX_LABEL - 1:,}")
    return label


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file of a plain tar; a hard link has those of the file that it stands for.

    Raises:
        tarfile.TarError: it is no plain tar, damaged, or cut short, be it between two members.
        OSError: it cannot be read, or is no regular file.
    """
    files: dict[str, tuple[int, int]] = {}
    with open(regular_file(path), "rb") as file:
        end, place = os.fstat(file.fileno()).st_size, -1
        try:
            with tarfile.open(fileobj=cast(IO[bytes], _Headers(file)), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
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
    """What tarfile may read of a tar: its headers, which have a size."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header has {size:,} bytes")
        return self.file.read(size)


def _scans(paths: Sequence[Path]) -> Iterable[tuple[Shard, np.ndarray]]:
    """Of each of some shards, in their order; by all cores where there is much to read."""
    if sum(_state(path)[0] for path in paths) < PARALLEL:
        return map(scan, paths)
    from data.processes import run_in_parallel  # which needs this module

    found: dict[int, tuple[Shard, np.ndarray]] = {}
    run_in_parallel(
        _numbered,
        list(enumerate(paths)),
        len(os.sched_getaffinity(0)),
        found.update,
        "indexing",
        len(paths),
        unit="shards",
    )
    return [found[i] for i in range(len(paths))]


def _numbered(task: tuple[int, Path], advance: Callable[[int], Any]) -> dict[int, tuple[Shard, np.ndarray]]:
    number, path = task
    found = {number: scan(path)}
    advance(1)
    return found


def _files(folder: Path) -> dict[str, tuple[tuple[int, int], bool]]:
    """Size and time of each tar, and whether its table is there."""
    with os.scandir(folder) as entries:
        files = {entry.name: entry for entry in entries if entry.name.endswith((".tar", ".tar.npy"))}
    tars = sorted(name for name in files if name.endswith(".tar"))
    return {name: (_state(files[name]), f"{name}.npy" in files) for name in tars}


def _state(file: Path | os.DirEntry[str]) -> tuple[int, int]:
    """Size and time of a file; (0, 0) where it leads nowhere, as whoever reads it will tell."""
    try:
        stat = file.stat()
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return 0, 0


def _own(folder: Path) -> tuple[Path, dict[str, Shard]]:
    """Where a folder's index of ours is or will be, and its shards by name as last indexed."""
    for path in (folder / "index.json", folder / ".index.json"):
        try:
            index = parse(read(path), Index)
            if index.by == BY:
                return path, {shard.url: shard for shard in index.shardlist}
        except FileNotFoundError:
            return path, {}
        except (OSError, ValueError):
            continue  # another program's, or spoilt: not ours to touch
    return path, {}


def _is_of(shard: Shard | None, state: tuple[int, int]) -> bool:
    """Whether an entry is of a file in this state, and whole: others' indices have no checksum."""
    return shard is not None and bool(shard.checksum) and (shard.filesize, shard.mtime_ns) == state


def _json(shards: Iterable[Shard]) -> bytes:
    lines = (json.dumps({key: value for key, value in asdict(shard).items() if value != ()}) for shard in shards)
    return (f'{{"wids_version": 1, "by": "{BY}", "shardlist": [\n' + ",\n".join(lines) + "\n]}\n").encode()


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """One process at a time indexes a folder, the others wait; where no lock can be made, each does on its own."""
    with ExitStack() as stack:
        with suppress(OSError):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # of a FIFO, too, it does not wait
            lock = os.open(folder / ".index.lock", flags, 0o666)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
