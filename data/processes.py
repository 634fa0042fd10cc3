"""Worker processes: they start from a clean server process, and end with their parent."""

import atexit
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
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

# Signals that stop a run. Ctrl-C and SLURM send them to every process of a job, but only the main process handles them.
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
PROCESSES = multiprocessing.get_context("forkserver")  # forking a process with CUDA or threads is unsafe
WARNING = "ignore:resource_tracker:UserWarning"  # as the interpreter's option -W


def prepare_workers() -> None:
    """Start the server process that workers are forked from; its imports take seconds, beside this process's work.

    It and its workers start with SIGNALS blocked.
    """
    atexit.unregister(end_workers)
    atexit.register(end_workers)
    PROCESSES.set_forkserver_preload(["data.loader"])
    # The resource tracker warns when it cleans up after a process that exited at once, as ours do on purpose.
    if WARNING not in sys.warnoptions:
        sys.warnoptions.append(WARNING)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # else the server starts it, and it unblocks two of them
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        forkserver.ensure_running()
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(  # the path of a socket may have 107 bytes
            f"the workers of data.workers cannot be started in TMPDIR {tempfile.gettempdir()} ({error}): set TMPDIR to "
            "a folder with a short path, such as TMPDIR=/tmp"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers() -> None:
    """Kill the workers of this process: at an exit, multiprocessing would send SIGTERM, which they block, and wait."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(5)


def end_when_interrupted() -> None:
    """Have Ctrl-C end this process at once until `run_command`: there is nothing to save while imports take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(*_: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def run_command(work: Callable[[], int | None]) -> NoReturn:
    """Do a command's work and exit with the code that it returns, after Ctrl-C with one line and code 130."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(work())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def run_program(work: Callable[[], int | None]) -> NoReturn:
    """Do a program's work as `run_command` does, then end this process and its workers at once.

    Python's usual exit may wait for another thread or process: a process group's threads sometimes abort the process,
    or wait for a process that is gone.
    """
    code = 1
    try:
        run_command(work)
    except SystemExit as stopped:  # its message is printed already
        code = int(stopped.code or 0)
    except BaseException:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
    with suppress(OSError):  # a closed pipe, a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    end_workers()
    with suppress(OSError):
        shutil.rmtree(util.get_temp_dir(), ignore_errors=True)  # as multiprocessing does at a usual exit
    os._exit(code)


def allow_open_files() -> None:
    """Raise the number of files that this process may open to the system's limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def end_with_parent() -> None:
    """Have this worker end when its parent ends, even by a kill.

    The kernel's signal for this (PR_SET_PDEATHSIG) follows the fork server, which outlives the parent.
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
    """Do all tasks, in any order, with a progress bar if stderr is a terminal.

    Args:
        work: takes a task, and a function to call with the number of units just done; it can be pickled
        tasks: the tasks
        workers: number of processes; 1 works in this process
        collect: takes every result, in this process; an error in it ends the workers
        title, unit: of the progress bar
        total: units of all tasks, if known
        done: units that an earlier call has done

    Raises:
        DataError: A worker process died.
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
                    "a worker process died, perhaps because memory is full: run the command again with fewer --workers"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in set(multiprocessing.active_children()) - set(others):
                    child.terminate()
                raise


def unblock_signals() -> None:
    """Unblock a worker's signals, so that its pool can end it; the parent handles Ctrl-C."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS - {signal.SIGINT})


def _enter(work: Callable[..., Any], progress: Any) -> None:
    """Initialise a worker."""
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
