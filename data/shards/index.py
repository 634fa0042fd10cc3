"""The index of WebDataset shards: what each holds, and where in it each sample is.

An index is `index.json` in the layout of wids, with an entry per shard: `url` (relative to the index, or absolute),
`nsamples` and `filesize`. Ours has also `mtime_ns`, `problems`, and the digests `table` and `checksum` of the shard's
table, `NAME.tar.npy` beside it. A table has a row per sample: the image's offset in the tar, its bytes, its label (-1:
none), its xxh3_64. If another program's `index.json` lies in a folder, ours is `.index.json`.
"""

import fcntl
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec.structs import asdict, replace

from data.errors import DataError
from data.files import escaped, near, parse, read, regular_file, try_write
from data.processes import run_in_parallel
from data.shards.tars import IMAGE_EXTENSIONS, checksum, samples

BY = "vaegan-trainer"
MAX_PROBLEMS = 10  # of a shard that the index lists
LOCK = ".index.lock"  # beside the index; removed only where no other process can wait for it
PARALLEL = 2**26  # bytes of tars for which starting several processes saves time


class Shard(msgspec.Struct, frozen=True):
    """A shard's entry in an index."""

    url: Annotated[str, msgspec.Meta(min_length=1)]  # path or URL, relative to the index or absolute
    nsamples: Annotated[int, msgspec.Meta(ge=0)]  # number of samples
    filesize: Annotated[int, msgspec.Meta(ge=0, lt=2**50)]  # bytes
    mtime_ns: int = 0  # time of the file's last change
    table: str = ""  # digest of the places and labels of its samples
    checksum: str = ""  # digest of their images' checksums
    problems: tuple[str, ...] = ()  # what is wrong with it

    def __post_init__(self) -> None:
        if self.nsamples > self.filesize // tarfile.BLOCKSIZE:  # each has at least a header
            raise ValueError(f"{self.nsamples:,} samples do not fit into a tar of {self.filesize:,} bytes")


class Index(msgspec.Struct):
    """The content of an index; `by` is the program that wrote it."""

    shardlist: list[Shard]
    by: str = ""


Scan = tuple[Shard, np.ndarray]  # a shard's entry and table


def index_folder(folder: Path, writes: bool = True) -> tuple[list[Shard], dict[str, np.ndarray]]:
    """Return a folder's shards in order of name, and the tables that could not be written there, by name.

    New and changed shards are scanned, and the index is written again. A folder that cannot be written is scanned at
    each start.

    Args:
        folder: of shards
        writes: whether index and tables may be written into the folder

    Raises:
        DataError: The folder is missing, or holds no shards.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else f"does not exist{near(folder)}"
        raise DataError(
            f"the data folder {folder} {problem}. Expected a folder of WebDataset shards (*.tar), a "
            "URL of one, or an index.json: make shards with `python -m data.prepare SOURCE OUT`, or those of digits by "
            "`make data`"
        )
    (path, known), found = own_index(folder), _tars(folder)
    if not found and not known:
        inside = " or ".join(sorted({str(one.parent) for one in folder.glob("*/*.tar")})[:3])
        hint = "make them with `python -m data.prepare SOURCE OUT`, or name the folder that has them"
        if inside or path.name.startswith("."):
            hint = f"but {inside or 'an index.json of shards elsewhere'}: name that"
        raise DataError(f"the data folder {folder} holds no shards (*.tar), {hint}")
    tables: dict[str, np.ndarray] = {}
    if _stale(found, known):
        with _lock(folder) if writes else nullcontext():
            (path, known), found = own_index(folder), _tars(folder)  # another process may have indexed it meanwhile
            stale = _scan_all(folder, _stale(found, known))
            for name, (shard, table) in stale.items():
                known[name] = replace(shard, url=name)
                if not (writes and save_table(folder / name, table)):
                    tables[name] = table
            if stale and writes:
                try_write(path, index_json(known[name] for name in sorted(known)))
    missing = f"it is in {path.name}, but not in the folder"
    shards = [
        shard if name in found else replace(shard, nsamples=0, problems=(missing,))
        for name, shard in sorted(known.items())
    ]
    return shards, tables


def parse_index(content: bytes, source: str) -> list[Shard]:
    """Return the shards of an index's text; raise DataError if it is none, or lacks sizes."""
    try:
        return parse(content, Index).shardlist
    except ValueError as error:
        raise DataError(
            f"{source} is no index of shards ({error}): expected wids' layout, a shardlist with url, nsamples and "
            "filesize; `python -m data.index SHARDS OUT.json` makes one"
        ) from error


def index_json(shards: Iterable[Shard]) -> bytes:
    """Return the text of an index."""
    lines = (json.dumps({key: value for key, value in asdict(shard).items() if value != ()}) for shard in shards)
    return (f'{{"wids_version": 1, "by": "{BY}", "shardlist": [\n' + ",\n".join(lines) + "\n]}\n").encode()


def digest(table: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(table, dtype=np.int64).tobytes()).hexdigest()[:16]


def table_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.npy")


def save_table(shard: Path, table: np.ndarray) -> bool:
    """Write a table beside its shard; return False if it cannot be written."""
    buffer = io.BytesIO()
    np.save(buffer, table)
    return try_write(table_path(shard), buffer.getvalue())


def load_table(shard: Path, expected: Shard) -> np.ndarray | None:
    """Return the table beside a shard, mapped, int64 [samples, 4]; None if there is none, or it is another shard's."""
    try:
        table = np.asarray(np.load(regular_file(table_path(shard)), mmap_mode="r", allow_pickle=False))
    except Exception:  # numpy raises nearly anything on damaged bytes
        return None
    fits = table.shape == (expected.nsamples, 4) and table.dtype == np.int64
    is_its = fits and expected.table in ("", digest(table[:, :3])) and expected.checksum in ("", digest(table[:, 3]))
    return table if is_its else None


def scan(path: Path, checksums: bool = True) -> Scan:
    """Return a tar's entry and table. The entry lists problems; samples before a cut count.

    Args:
        path: of the tar
        checksums: whether to read the images for their checksums; without, these are 0 and only headers are read
    """
    rows, problems, keys = list[tuple[int, int, int, int]](), list[str](), set[str]()
    try:
        with open(regular_file(path), "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            for sample in samples(path):
                key = escaped(sample.key)
                if sample.key in keys:
                    problems.append(f"the key {key} appears twice")
                keys.add(sample.key)
                if (count := sample.images or sample.latents) > 1:
                    problems.append(f"sample {key} has {count} {'images' if sample.images else 'latents'}")
                if count:
                    sum_ = checksum(file.fileno(), sample.offset, sample.size) if checksums else 0
                    rows.append((sample.offset, sample.size, sample.label, sum_))
                else:
                    problems.append(f"sample {key} has no image ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        if not keys:
            problems.append("it holds no samples")
    except OSError as error:
        return Shard(path.name, 0, 0, problems=(f"it cannot be read: {error.strerror}",)), np.empty((0, 4), np.int64)
    except (tarfile.TarError, ValueError) as error:
        problems.insert(0, f"it is damaged, cut short, compressed or no tar: {error}")
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS:,} more"]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    digests = digest(table[:, :3]), digest(table[:, 3]) if checksums else ""
    return Shard(path.name, len(table), stat.st_size, stat.st_mtime_ns, *digests, tuple(problems)), table


def _scan_all(folder: Path, names: list[str]) -> dict[str, Scan]:
    """Scan some shards of a folder, on all cores if there is much to read."""
    workers = len(os.sched_getaffinity(0)) if sum(_state(folder / name)[0] for name in names) >= PARALLEL else 1
    found: dict[str, Scan] = {}
    paths = [folder / name for name in names]
    run_in_parallel(_scan_task, paths, workers, found.update, "indexing", len(names), unit="shards")
    return found


def _scan_task(path: Path, advance: Callable[[int], Any]) -> dict[str, Scan]:
    found = scan(path)
    advance(1)
    return {path.name: found}


Tars = dict[str, tuple[tuple[int, int], bool]]  # by name: size and time of each, and whether it has a table


def _tars(folder: Path) -> Tars:
    with os.scandir(folder) as entries:
        files = {entry.name: entry for entry in entries if entry.name.endswith((".tar", ".tar.npy"))}
    tars = sorted(name for name in files if name.endswith(".tar"))
    return {name: (_state(files[name]), f"{name}.npy" in files) for name in tars}


def _stale(tars: Tars, known: dict[str, Shard]) -> list[str]:
    """Return the tars without a table, or without an entry of ours for their present size and time."""

    def is_known(name: str, state: tuple[int, int]) -> bool:
        shard = known.get(name)
        return shard is not None and bool(shard.checksum) and (shard.filesize, shard.mtime_ns) == state

    return [name for name, (state, has_table) in tars.items() if not (has_table and is_known(name, state))]


def _state(file: Path | os.DirEntry[str]) -> tuple[int, int]:
    """Return size and time of a file; (0, 0) if it is a broken link, which fails when it is read."""
    try:
        stat = file.stat()
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return 0, 0


def own_index(folder: Path) -> tuple[Path, dict[str, Shard]]:
    """Return the path of our index of a folder, which may not exist yet, and its shards by name, as indexed."""
    for path in (folder / "index.json", folder / ".index.json"):
        try:
            index = parse(read(path), Index)
            if index.by == BY:
                return path, {shard.url: shard for shard in index.shardlist}
        except FileNotFoundError:
            return path, {}
        except (OSError, ValueError):
            continue  # another program's, or damaged: it is left alone
    return path, {}


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time index a folder; where no lock can be made, each process indexes it."""
    with ExitStack() as stack:
        with suppress(OSError):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # O_NONBLOCK: a FIFO does not block either
            lock = os.open(folder / LOCK, flags, 0o666)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
