"""Processes beside this one: they start fast and clean, and end with it."""

import atexit
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker, util
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from data.errors import DataError
from data.redact import redacted

Task = TypeVar("Task")
Result = TypeVar("Result")

# What asks a run to leave. Ctrl-C and SLURM send it to every process of a job, and it is this process's to answer.
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
PROCESSES = multiprocessing.get_context("forkserver")  # to fork a process that uses CUDA or threads is not safe
WARNING = "ignore:resource_tracker:UserWarning"  # as the interpreter's option -W


def prepare_workers() -> None:
    """Begin the imports of the process that others are forked from, which take seconds, while others are done here.

    It, and they, are born with SIGNALS blocked.
    """
    atexit.unregister(end_workers)
    atexit.register(end_workers)
    PROCESSES.set_forkserver_preload(["data.loader"])
    # It removes what a process leaves behind that ends at once, which is meant here and not to be warned of.
    if WARNING not in sys.warnoptions:
        sys.warnoptions.append(WARNING)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    resource_tracker.ensure_running()  # it would be started by the other, but unblocks two of them
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers() -> None:
    """End the workers of this process.

    At an exit, multiprocessing itself would send them SIGTERM, which they block, and then wait for them without end.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(5)


def end_when_interrupted() -> None:
    """Until `run_command`, while imports take seconds and nothing is done yet, have Ctrl-C end this process at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(*_: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def run_command(work: Callable[[], int | None]) -> NoReturn:
    """Do a command's work and exit with the code that it returns; Ctrl-C ends it with one line and code 130."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(work())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def run_program(work: Callable[[], int | None]) -> NoReturn:
    """Like `run_command`, but this process and its workers end at once, whatever came of the work.

    Nothing that could wait for another thread or process is done on the way out: a process group's threads would now
    and then abort the process, or wait for a process that is gone.
    """
    code = 1
    try:
        run_command(work)
    except SystemExit as stopped:  # what went wrong has been told
        code = int(stopped.code or 0)
    except BaseException:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
    with suppress(OSError):  # a pipe that nobody reads any more, a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    end_workers()
    with suppress(OSError):
        shutil.rmtree(util.get_temp_dir(), ignore_errors=True)  # multiprocessing would, in a slower exit
    os._exit(code)


def allow_open_files() -> None:
    """Raise the number of files that this process may open to what the system lets it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def end_with_parent() -> None:
    """Have this process, started by another one, end when that is gone, however it went.

    The kernel's own signal for this would not do: the parent it knows is the fork server, which outlives the other.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def run_in_parallel(
    work: Callable[[Task, Callable[[int], Any]], Result],
    tasks: Sequence[Task],
    workers: int,
    collect: Callable[[Result], None],
    title: str,
    total: int | None,
    done: int = 0,
    unit: str = "images",
) -> None:
    """Do all tasks, in any order, with a progress bar where stderr is a terminal.

    Args:
        work: takes a task, and what to tell how many more of `unit` are done; can be pickled, for more than one worker
        workers: processes; 1: this one
        collect: gets every result, in this process; where it raises, the workers are ended

    Raises:
        DataError: a worker process died.
    """
    with tqdm(total=total, initial=done, desc=title, unit=f" {unit}", disable=None) as bar:
        if min(workers, len(tasks)) <= 1:
            for task in tasks:
                collect(work(task, bar.update))
            return
        prepare_workers()
        progress = PROCESSES.Value("q", 0)
        others = multiprocessing.active_children()
        with ProcessPoolExecutor(min(workers, len(tasks)), PROCESSES, _enter, (work, progress)) as pool:
            waiting = {pool.submit(_do, task) for task in tasks}
            try:
                while waiting:
                    ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                    bar.update(progress.value + done - bar.n)
                    for future in ready:
                        collect(future.result())
            except BrokenProcessPool as error:
                raise DataError(
                    "a worker process died, perhaps for want of memory: run the command again, with fewer --workers"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in set(multiprocessing.active_children()) - set(others):
                    child.terminate()
                raise


def unblock_signals() -> None:
    """In a worker of a pool, which could not end it otherwise; Ctrl-C stays the parent's to handle."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS - {signal.SIGINT})


def _enter(work: Callable[..., Any], progress: Any) -> None:
    """Make a worker ready."""
    global _worker

    def advance(more: int) -> None:
        with progress.get_lock():
            progress.value += more

    unblock_signals()
    end_with_parent()
    _worker = work, advance


_worker: tuple[Callable[..., Any], Callable[[int], None]]


def _do(task: Any) -> Any:
    work, advance = _worker
    return work(task, advance)
