"""The door for files that others wrote: regular ones only, JSON of a known shape, YAML within bounds, names escaped."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

Content = TypeVar("Content")

KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}  # all others are devices
MAX_JSON = 2**28  # bytes: an index of a million shards has fewer
MAX_YAML = 2**20  # characters
DEPTH = 100  # lists and mappings in one another: libyaml's recursion ends the process far beyond that
NODES = 100_000  # with every alias replaced by what it stands for


def regular_file(path: str | os.PathLike[str]) -> Path:
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
    with open(regular_file(path), "rb") as file:
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


def check_yaml(text: str) -> None:
    """Refuse YAML that would take a reader's memory, time or stack; what is no YAML, its reader will tell.

    Raises:
        yaml.YAMLError: it is no YAML, too long, nested too deeply, or its aliases stand for too much.
    """
    if len(text) > MAX_YAML:
        raise yaml.YAMLError(f"it has {len(text):,} characters, expected at most {MAX_YAML:,}")
    if len(text) <= DEPTH and "&" not in text:  # most texts are a number or a word
        return
    sizes, open_nodes = dict[str, int](), [0]  # nodes of each anchor; of the lists and mappings that have begun
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
        if len(open_nodes) > DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {DEPTH}")
        if open_nodes[-1] > NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {NODES:,} values")


def escaped(text: str, keep: str = "") -> str:
    """A text that came from a file, with all that a terminal would obey or not show written as Python's escapes.

    Args:
        keep: characters that stay, such as the ends of a message's lines
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
