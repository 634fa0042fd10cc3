"""Files: those of strangers are read within bounds, and ours are written whole or not at all."""

import difflib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

Content = TypeVar("Content")

KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}  # all others are devices
UNFINISHED = ".unfinished."  # prefix of temporary names
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a full disk, or of a user's full share of it
MAX_JSON = 2**28  # bytes: an index of a million shards has fewer
MAX_YAML = 2**20  # characters
MAX_DEPTH = 100  # of nested lists and mappings: libyaml's recursion ends the process far beyond that
MAX_NODES = 100_000  # counting an alias as often as it occurs


def regular_file(path: str | os.PathLike[str]) -> Path:
    """Return the path if it leads to a regular file: opening any other kind of file may block forever.

    Raises:
        OSError: There is no file, or it is of another kind.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is a {KINDS.get(kind, 'device')}, and no regular file", os.fspath(path))
    return Path(path)


def near(path: Path) -> str:
    """Return, in brackets, which file or folder beside one that does not exist was perhaps meant; "" if none."""
    there = list[str]()
    with suppress(OSError):  # the folder may be missing, or not ours to read
        there = [one.name for one in path.parent.iterdir() if one.name != path.name]
    close = difflib.get_close_matches(path.name, there, 1)
    return f" (did you mean {path.with_name(close[0])}?)" if close else ""


def read(path: str | os.PathLike[str], limit: int = MAX_JSON) -> bytes:
    """Return the bytes of a regular file; raise OSError if it cannot be read, or has more bytes than the limit."""
    with open(regular_file(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", os.fspath(path))
    return content


def sha256(path: Path) -> str:
    """Return the sha256 of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse(content: bytes, kind: type[Content]) -> Content:
    """Return JSON as an object of a msgspec type; its texts may hold surrogates, as names of files do.

    Raises:
        ValueError: It is no JSON, nested too deeply, or has another shape; the message says where.
    """
    try:
        return msgspec.convert(json.loads(content), kind)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_yaml(text: str) -> None:
    """Raise yaml.YAMLError if a text is no YAML, too long, nested too deeply, or its aliases expand to too much."""
    if len(text) > MAX_YAML:
        raise yaml.YAMLError(f"it has {len(text):,} characters, expected at most {MAX_YAML:,}")
    if len(text) <= MAX_DEPTH and "&" not in text:  # most texts are a number or a word
        return
    sizes, open_nodes = dict[str, int](), [0]  # nodes of each anchor; of each collection that is not complete
    anchors = list[str | None]()
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(
                    f"the alias *{escaped(str(event.anchor))} stands for nothing, or for what it is in"
                )
            open_nodes[-1] += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            open_nodes[-1] += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append(1)
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = open_nodes.pop(), anchors.pop()
            open_nodes[-1] += size
            if anchor:
                sizes[anchor] = size
        if len(open_nodes) > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH}")
        if open_nodes[-1] > MAX_NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {MAX_NODES:,} values")


def escaped(text: str, keep: str = "") -> str:
    """Return a text with its control and unprintable characters, but for those in `keep`, as Python's escapes."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def atomically(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A context that yields a temporary path for a file or folder, which gets the name `path` at its end.

    The file is whole even after a crash of the machine. After an error nothing is left behind. Processes may write the
    same file at once: the last one wins. A link at `path` is replaced, not followed.

    Args:
        path: of the file or folder
        temporary: on the same disk; by default a hidden name beside `path`

    Raises:
        OSError: It cannot be written, or a device, a pipe or a socket is there, such as /dev/null.
    """
    if path.exists() and not (path.is_dir() or path.is_symlink()):
        regular_file(path)
    mine = f"{os.uname().nodename}.{os.getpid()}"  # containers of several machines have equal numbers
    unfinished = temporary or path.with_name(f"{UNFINISHED}{path.name}.{mine}")
    _remove(unfinished)
    try:
        yield unfinished
        _sync(unfinished)
        unfinished.rename(path)
    except BaseException:
        _remove(unfinished)
        raise
    _sync(path.parent)


def try_write(path: Path, content: bytes) -> bool:
    """Write a small file atomically; return False if it cannot be written."""
    try:
        with atomically(path) as temporary, open(temporary, "xb") as file:
            file.write(content)
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
