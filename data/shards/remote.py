"""Files elsewhere: what fsspec opens (http, https, s3, gs, hf, ...), and `pipe:COMMAND`, a command's output."""

import os
import random
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

from data.errors import DataError, UnreachableError
from data.files import FULL, MAX_JSON, escaped

CHUNK = 2**24  # bytes of one request: what a failure loses
STALL = 60.0  # seconds without a byte after which a request or command has failed
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each new try of a request
PLAIN = frozenset({"file", "http", "https", "s3", "gs", "hf"})  # kinds that a file may name, as none runs anything

Result = TypeVar("Result")


def is_remote(source: str) -> bool:
    return "://" in source or source.startswith("pipe:")


def check_named_by_file(sources: Iterable[str], where: str) -> None:
    """Raise DataError if the file `where`, maybe a stranger's, names a command, or a URL that may run something."""
    for source in sources:
        if is_remote(source) and ("::" in source or source.partition(":")[0] not in PLAIN):
            raise DataError(
                f"{where} names {escaped(source)}: a command, or a URL of another kind than {', '.join(sorted(PLAIN))}"
                ", is taken from a command line, or from an index on this machine that it names, alone"
            )


def check_same_origin(urls: Iterable[str], where: str) -> None:
    """Raise DataError if an index at the URL `where` names shards neither relative to itself nor on its own host."""
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
    except ValueError:  # the host or port is invalid
        return None


def size_of(url: str) -> int | None:
    """Return the bytes of a remote file, or None for a `pipe:`; raise DataError if it cannot be reached."""
    if url.startswith("pipe:"):
        return None
    if (size := _retry(url, lambda: _call(url, "info")["size"])) is None:
        raise DataError(f"cannot fetch {url}: its server does not say how many bytes it has")
    return int(size)


def read(url: str) -> bytes:
    """Return a small remote file; raise DataError if it cannot be reached or has more than MAX_JSON bytes."""
    if (_retry(url, lambda: _call(url, "info")["size"]) or 0) > MAX_JSON:  # some servers do not say
        raise DataError(f"{url} has more than {MAX_JSON:,} bytes, which no index does")
    return _retry(url, lambda: _call(url, "cat_file"))


def download(url: str, file: BinaryIO, size: int | None) -> None:
    """Append to `file` what it lacks of a remote file of `size` bytes; after an error it keeps what has come.

    Raises:
        DataError: All tries failed, or the remote file has another size.
        OSError: `file` cannot be written.
    """
    if url.startswith("pipe:"):
        _retry(url, lambda: _run(url.removeprefix("pipe:"), file, size))
        return
    assert size is not None
    while (start := file.seek(0, os.SEEK_END)) < size:
        file.write(_retry(url, lambda: _part(url, start, min(start + CHUNK, size), size)))
    file.flush()


def _part(url: str, start: int, stop: int, size: int) -> bytes:
    content = _call(url, "cat_file", start=start, end=stop)
    if len(content) == size > stop - start:  # the server ignores ranges
        content = content[start:stop]
    if len(content) != stop - start:
        raise OSError(f"{len(content):,} bytes came instead of {stop - start:,} from byte {start:,} on")
    return content


def _call(url: str, method: str, **arguments: Any) -> Any:
    system, path = fsspec.core.url_to_fs(url)
    if isinstance(system, AsyncFileSystem):
        arguments["timeout"] = STALL
    return getattr(system, method)(path, **arguments)


def _run(command: str, file: BinaryIO, size: int | None) -> None:
    """Write a command's whole output: no part of it can be requested.

    The command gets a pipe, not the file, whose lock it would hold on to if this process were killed.
    """
    file.seek(0)
    file.truncate()
    with tempfile.TemporaryFile() as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "bufsize": 0}
        process = subprocess.Popen(command, shell=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        code = _copy_output(process, file)
        errors.seek(0)
        words = errors.read(2000).decode(errors="replace").strip()
    if code or (size is not None and file.tell() != size):
        found = f"after {file.tell():,} bytes" + (f" of {size:,}" if size else "")
        raise OSError(f"the command ended with code {code} {found}{': ' if words else ''}{words}")
    file.flush()


def _copy_output(process: subprocess.Popen[bytes], file: BinaryIO) -> int:
    """Write a command's output and return its exit code; kill a command that stalls."""
    assert process.stdout is not None
    try:
        while select.select([process.stdout], [], [], STALL)[0]:
            if not (content := process.stdout.read(2**20)):
                return process.wait(STALL)
            file.write(content)
        raise OSError(f"nothing came from the command for {STALL:g} seconds")
    finally:
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_temporary(error: BaseException) -> bool:
    """Return whether a request that failed may succeed later; fsspec's HTTP calls every failure a missing file."""
    missing, cause = isinstance(error, FileNotFoundError | PermissionError), error.__cause__
    while cause is not None:
        if type(cause).__module__.startswith("aiohttp"):
            return getattr(cause, "status", None) not in (401, 403, 404, 410)
        if isinstance(cause, ConnectionError | TimeoutError):
            return True
        cause = cause.__cause__
    return not missing


def _retry(url: str, attempt: Callable[[], Result]) -> Result:
    """Return an attempt's result, after several tries if need be."""
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except (ImportError, ValueError) as error:  # fsspec does not know the kind of URL, or lacks its package
            raise DataError(f"cannot open {url}: {error}") from error
        except Exception as error:  # each kind of remote has its own errors
            if isinstance(error, OSError) and error.errno in FULL:  # this machine's disk
                raise
            if pause is None:
                cause = error.__cause__ or error
                reason = str(cause) or type(cause).__name__
                raise (UnreachableError if _is_temporary(error) else DataError)(
                    f"cannot fetch {url}: {reason}; tried {len(PAUSES) + 1} times. Is it there, and may this machine "
                    "read it?"
                ) from error
            time.sleep(pause * random.uniform(0.75, 1.25))  # many processes must not come back at once
    raise AssertionError
