"""A run's folder: one writer at a time, and a word of how the run is."""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Literal, Self

from trainer.files import write_atomically

FULL = (errno.ENOSPC, errno.EDQUOT)
WAIT = 30  # seconds for a run that is about to leave

RunStatus = Literal["running", "finished", "preempted", "diverged", "failed"]


def refuse_links(folder: Path) -> None:
    """Refuse a folder to write into that has anything but folders and regular files in it: a stranger's may have links
    by which what is written lands in files elsewhere. The folder itself may be a link.

    Raises:
        ValueError: names what is neither.
    """
    for path in _neither_folders_nor_files(folder):
        raise ValueError(
            f"{path} is a link, or another special file, and a run writes into its folder: remove it. The run folder "
            "itself may be a link to another disk"
        )


def _neither_folders_nor_files(folder: Path | str) -> Iterator[str]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:  # another run may be removing things
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _neither_folders_nor_files(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                yield entry.path


class RunFolder:
    """A context: when it is left, or its process ends, however that goes, other runs may write. An error that leaves it
    makes the word of a running run "failed".

    Args:
        path: it is made where it is missing
    """

    def __init__(self, path: Path):
        self.path = path
        self.status: RunStatus | None = None  # once it is this run's
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.status == "running" and any(error):
            with suppress(OSError):
                self.set_status("failed")
        if self._lock is not None:
            self._lock.close()

    def lock(self) -> None:
        """Keep other runs out.

        Raises:
            ValueError: another run holds it, and goes on holding it; or there is a link in it.
            OSError: the folder cannot be made or written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links(self.path)
        self._lock = lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (closed by __exit__)
        for waited in range(WAIT + 1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    print(f"waiting for {_holder(lock)} to leave {self.path}", file=sys.stderr, flush=True)
                time.sleep(1)
            else:
                break
        else:
            raise self._taken(lock)
        lock.truncate(0)
        began = datetime.now().isoformat(" ", "seconds")
        job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        with suppress(OSError):  # a full disk
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}{job}, since {began}".encode())
        self.set_status("running")

    def check_free(self) -> None:
        """Refuse a folder that another run holds at this moment, or that has links in it; nothing is written.

        Raises:
            ValueError: it is so.
        """
        refuse_links(self.path)
        with suppress(FileNotFoundError), open(self.path / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._taken(lock) from None

    def _taken(self, lock: IO[str]) -> ValueError:
        return ValueError(
            f"trainer.run_dir {self.path} is being written by {_holder(lock)}: stop that run, or take another "
            "--trainer.run_dir"
        )

    def set_status(self, status: RunStatus) -> None:
        """Write how the run is into the file `state`, for job scripts.

        Raises:
            OSError: it cannot be written.
        """
        self.status, path = status, self.path / "state"
        try:
            write_atomically(path, f"{status}\n")
        except OSError as error:
            if error.errno not in FULL or not path.exists():
                raise
            with open(path, "r+b") as file:  # a full disk still has the block that the word before is in
                file.write(f"{status}\n".encode())
                file.truncate()


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read() or "another process"
