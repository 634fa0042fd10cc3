"""Files elsewhere: what fsspec opens (http, https, s3, gs, hf, ...), and `pipe:COMMAND`, a command's output."""

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem

from data.errors import DataError
from data.files import MAX_JSON, escaped

CHUNK = 2**24  # bytes asked for at once: what a failure costs
STALL = 60.0  # seconds in which a chunk has to come
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each new try of a chunk

PLAIN = frozenset({"file", "http", "https", "s3", "gs", "hf"})  # what a file may name: none of them runs anything

Result = TypeVar("Result")


def is_remote(source: str) -> bool:
    return "://" in source or source.startswith("pipe:")


def check_named_by_file(sources: Iterable[str], where: str) -> None:
    """Refuse sources that run something: a file that may be a stranger's names them, and not the user.

    Args:
        where: the file, for the message

    Raises:
        DataError: one is `pipe:COMMAND`, or a URL of a kind that is not known to be plain.
    """
    for source in sources:
        if is_remote(source) and ("::" in source or source.partition(":")[0] not in PLAIN):
            raise DataError(
                f"{where} names {escaped(source)}: a command, or a URL of another kind than {', '.join(sorted(PLAIN))}"
                ", is taken from a command line, or from an index on this machine that it names, alone"
            )


def check_same_origin(urls: Iterable[str], where: str) -> None:
    """Refuse shards that an index elsewhere names in other places than its own.

    Args:
        where: URL of the index

    Raises:
        DataError: one is neither relative to the index nor at its host.
    """
    for url in urls:
        if "::" in url or os.path.isabs(url) or (is_remote(url) and _origin(url) != _origin(where)):
            raise DataError(
                f"the index {where} names the shard {escaped(url)}: an index that is elsewhere may name shards "
                "relative to itself, or on its own host, alone. Make your own: python -m data.index SHARDS OUT.json"
            )


def _origin(url: str) -> tuple[str, str | None, int | None] | None:
    try:
        parts = urlsplit(url)
        return (parts.scheme, parts.hostname, parts.port) if parts.hostname else None
    except ValueError:  # a port or a host that is none
        return None


def size_of(url: str) -> int | None:
    """Bytes of a remote file; None where that is not known beforehand (pipe:).

    Raises:
        DataError: it cannot be reached; says why.
    """
    if url.startswith("pipe:"):
        return None
    if (size := _retried(url, lambda: _ask(url, "info")["size"])) is None:
        raise DataError(f"cannot fetch {url}: its server does not say how many bytes it has")
    return int(size)


def read(url: str) -> bytes:
    """A small remote file.

    Raises:
        DataError: it cannot be reached, or is larger than MAX_JSON; says why.
    """
    if (_retried(url, lambda: _ask(url, "info")["size"]) or 0) > MAX_JSON:  # not every server says
        raise DataError(f"{url} has more than {MAX_JSON:,} bytes, which no index does")
    return _retried(url, lambda: _ask(url, "cat_file"))


def download(url: str, file: BinaryIO, size: int | None) -> None:
    """Append to `file` what it lacks of a remote one of `size` bytes; where that fails, it keeps what has come.

    Raises:
        DataError: every try failed, or the remote file has another size; says why.
        OSError: `file` cannot be written.
    """
    if url.startswith("pipe:"):
        _retried(url, lambda: _run(url.removeprefix("pipe:"), file, size))
        return
    assert size is not None
    while (start := file.seek(0, os.SEEK_END)) < size:
        file.write(_retried(url, lambda: _part(url, start, min(start + CHUNK, size), size)))
    file.flush()


def _part(url: str, start: int, stop: int, size: int) -> bytes:
    content = _ask(url, "cat_file", start=start, end=stop)
    if len(content) == size > stop - start:  # from a server that knows no ranges
        content = content[start:stop]
    if len(content) != stop - start:
        raise OSError(f"{len(content):,} bytes came instead of {stop - start:,} from byte {start:,} on")
    return content


def _ask(url: str, method: str, **arguments: Any) -> Any:
    system, path = fsspec.core.url_to_fs(url)
    if isinstance(system, AsyncFileSystem):
        arguments["timeout"] = STALL
    return getattr(system, method)(path, **arguments)


def _run(command: str, file: BinaryIO, size: int | None) -> None:
    """Write a command's output, from its beginning: it cannot be asked for a part."""
    file.seek(0)
    file.truncate()
    with tempfile.TemporaryFile() as told:
        pipes = {"stdout": subprocess.PIPE, "stderr": told, "bufsize": 0}
        process = subprocess.Popen(command, shell=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        code = _copy(process, file)
        told.seek(0)
        words = told.read(2000).decode(errors="replace").strip()
    if code or (size is not None and file.tell() != size):
        found = f"after {file.tell():,} bytes" + (f" of {size:,}" if size else "")
        raise OSError(f"the command ended with code {code} {found}{': ' if words else ''}{words}")
    file.flush()


def _copy(process: subprocess.Popen[bytes], file: BinaryIO) -> int:
    """Write what a process says, and give its exit code; one that stalls is killed."""
    assert process.stdout is not None
    try:
        while True:
            if not select.select([process.stdout], [], [], STALL)[0]:
                raise OSError(f"nothing came from the command for {STALL:g} seconds")
            if not (content := process.stdout.read(2**20)):
                break
            file.write(content)
        return process.wait(STALL)
    finally:
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _retried(url: str, attempt: Callable[[], Result]) -> Result:
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except (ImportError, ValueError) as error:  # fsspec knows no such URLs, or names the package that opens them
            raise DataError(f"cannot open {url}: {error}") from error
        except Exception as error:  # each kind of remote has errors of its own
            if pause is None:
                reason = str(error) or type(error).__name__
                raise DataError(
                    f"cannot fetch {url}: {reason}; tried {len(PAUSES) + 1} times. Is it there, and may this machine "
                    "read it?"
                ) from error
            time.sleep(pause)
    raise AssertionError
