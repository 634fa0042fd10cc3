"""The door for files that others wrote: regular ones only, JSON of a known shape, names a terminal may be shown."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import TypeVar

import msgspec

Content = TypeVar("Content")

KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}  # all others are devices
MAX_JSON = 2**28  # bytes: an index of a million shards has fewer


def regular(path: str | os.PathLike[str]) -> Path:
    """The path itself, of a regular file or a link to one. To open any other file may wait for ever.

    Raises:
        OSError: it is another kind of file, or there is none.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is a {KINDS.get(kind, 'device')}, and no regular file", os.fspath(path))
    return Path(path)


def read(path: str | os.PathLike[str], limit: int = MAX_JSON) -> bytes:
    """A regular file's bytes.

    Raises:
        OSError: it cannot be read, or is larger than the limit.
    """
    with open(regular(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", os.fspath(path))
    return content


def parse(content: bytes, kind: type[Content]) -> Content:
    """JSON as an object of a msgspec type. Texts may hold what is no Unicode, as names of files do.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has another shape; says where.
    """
    try:
        return msgspec.convert(json.loads(content), kind)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def shown(text: str, keep: str = "") -> str:
    """A text that came from a file, with all that a terminal would obey or not show written as Python's escapes.

    Args:
        keep: characters that stay, such as the ends of a message's lines
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
