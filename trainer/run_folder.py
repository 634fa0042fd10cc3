"""A run's folder: a lock that keeps other runs out, and the run's status."""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Literal, Self, TypeVar

from data.files import FULL, UNFINISHED
from trainer.errors import RunError
from trainer.files import write_atomically

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
WAIT = 30  # seconds to wait for another run that is about to stop

FRAMES = 12  # sample grids of a run on a page

RunStatus = Literal["running", "finished", "stopped", "diverged", "failed"]

Grid = TypeVar("Grid")  # a path or a name


def refuse_links(folder: Path) -> None:
    """Check that a folder to write into holds nothing but folders and regular files.

    Through a link in somebody else's folder, a run would overwrite files elsewhere. The folder itself may be a link.

    Raises:
        ValueError: the folder holds a link or another special file, which the message names.
    """
    for path in _special_files(folder):
        raise ValueError(
            f"{path} is a link, or another special file, and a run writes into its folder: remove it. The run folder "
            "itself may be a link to another disk"
        )


def _special_files(folder: Path | str) -> Iterator[str]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:  # another run may be removing files
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _special_files(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                yield entry.path


class RunFolder:
    """A context that holds a run's folder. On leaving it, or when the process ends, the lock is released.

    An error that leaves the context sets the status of a running run to "failed".

    Args:
        path: the folder, which `lock` makes if it is missing
    """

    def __init__(self, path: Path):
        self.path = path
        self.status: RunStatus | None = None  # None on processes that do not hold the lock
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.status == "running" and any(error):
            with suppress(OSError):
                self.set_status("failed")
        if self._lock is not None:
            self._lock.close()

    def lock(self) -> None:
        """Lock the folder for this process, unless it is, and set its status to "running".

        Raises:
            RunError: another run holds the lock for longer than WAIT seconds.
            ValueError: the folder holds a link, or its file system has no locks.
            OSError: the folder cannot be made or written.
        """
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links(self.path)
        self._lock = lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (closed by __exit__)
        self._wait(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        began = datetime.now().isoformat(" ", "seconds")
        job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        with suppress(OSError):  # a full disk
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}{job}, since {began}".encode())
        for leftover in (*self.path.glob(f"{UNFINISHED}*"), *self.checkpoints.glob(f"*/{UNFINISHED}*")):
            if not leftover.is_dir():  # a folder is that of an export, which may still be running
                leftover.unlink(missing_ok=True)  # of a process that was killed
        self._write_status("running")

    def check_free(self) -> None:
        """Check that `lock` would succeed, without writing anything.

        Raises:
            RunError, ValueError: as `lock`, or this user may not write there.
        """
        refuse_links(self.path)
        existing = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(
                f"trainer.run_dir {self.path} cannot be written: {existing} is no folder that this user may write to"
            )
        with suppress(FileNotFoundError), open(self.path / ".lock") as lock:
            self._wait(lock, fcntl.LOCK_SH)

    def _wait(self, lock: IO[str], kind: int) -> None:
        """Take a lock as soon as another run has released it."""
        for waited in range(WAIT + 1):
            try:
                return fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    print(f"waiting for {_holder(lock)} to release {self.path}", file=sys.stderr, flush=True)
                time.sleep(1)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                raise ValueError(
                    f"trainer.run_dir {self.path} cannot be locked ({error.strerror}), and without a lock two runs "
                    "could write into it: mount its file system with flock (Lustre: -o flock, NFS: without nolock), or "
                    "use another --trainer.run_dir"
                ) from error
        raise RunError(
            f"trainer.run_dir {self.path} is being written by {_holder(lock)}: stop that run, or use another "
            "--trainer.run_dir"
        )

    def set_status(self, status: RunStatus) -> None:
        """Write the run's status to the file `state`, for job scripts; only the process that holds the lock writes.

        Raises:
            OSError: it cannot be written.
        """
        if self.status is not None:
            self._write_status(status)

    def _write_status(self, status: RunStatus) -> None:
        self.status, path = status, self.path / "state"
        try:
            write_atomically(path, f"{status}\n")
        except OSError as error:
            if error.errno not in FULL or not path.exists():
                raise
            with open(path, "r+b") as file:  # a full disk still has the block of the old status
                file.write(f"{status}\n".encode())
                file.truncate()


def some_grids(grids: Sequence[Grid]) -> list[Grid]:
    """Return at most FRAMES of a run's sample grids, evenly over its steps, with the first and the last."""
    last = len(grids) - 1
    return [*dict.fromkeys(grids[round(i * last / (FRAMES - 1))] for i in range(FRAMES))] if grids else []


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read() or "another process"
