"""Files elsewhere: what fsspec opens (http, https, s3, gs, hf, ...), and `pipe:COMMAND`, a command's output."""

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from data.errors import DataError

CHUNK = 2**24  # bytes asked for at once: what a failure costs
STALL = 60.0  # seconds in which a chunk has to come
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each new try of a chunk

Result = TypeVar("Result")


def is_remote(source: str) -> bool:
    return "://" in source or source.startswith("pipe:")


def size_of(url: str) -> int | None:
    """Bytes of a remote file; None where that is not known beforehand (pipe:).

    Raises:
        DataError: it cannot be reached; says why.
    """
    return None if url.startswith("pipe:") else int(_retried(url, lambda: _ask(url, "info")["size"]))


def read(url: str) -> bytes:
    """A small remote file.

    Raises:
        DataError: it cannot be reached; says why.
    """
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
