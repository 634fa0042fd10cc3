"""A run folder elsewhere, such as s3://BUCKET/RUN: the run works in a local folder, which is copied there behind it.

Object storage has neither renames nor locks. A checkpoint's manifest is therefore copied after its other files and
removed before them: what has a manifest is whole, whenever a machine is lost.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

import fsspec
from accelerate import Accelerator

from data.files import atomically
from data.redact import redacted
from data.shards.remote import is_remote
from models.manifest import checkpoints as list_checkpoints
from trainer.checkpoint.files import parse_scores
from trainer.checkpoint.writer import Scores, kept_steps, step_of
from trainer.config.parser import Config
from trainer.distributed.ranks import run_on_main
from trainer.errors import RunError
from trainer.run_folder import RunFolder, some_grids

MANIFEST = "manifest.json"
OF_STEP = re.compile(r"checkpoints/step_(\d{8,18})/([^/]+)")
# What is not copied: hidden files, damaged checkpoints, and the settings, which a run writes there without credentials.
UNSENT = re.compile(r"config\.yaml|(.*/)?(damaged)?\..*")
# What commands read beside a checkpoint, and what a report reads.
MODEL = re.compile(r"config\.yaml|demo-cnn-v1\.safetensors")
LOG, GRID = re.compile(r"config\.yaml|metrics\.jsonl|state"), re.compile(r"samples/step_\d+\.png")

Result = TypeVar("Result")


class RemoteRun:
    """A run's folder at a URL that fsspec can write to, and its copy on this machine.

    Two runs on different machines cannot keep each other out of a URL. The one that is behind stops as soon as it
    finds a newer checkpoint than its own.

    Args:
        url: of the run folder
        folder: the local copy, which holds the checkpoints that a local run folder would hold
        keep, keep_every: which checkpoints are kept at the URL, as `Saver` has it
        setting: what names the URL, for messages

    Raises:
        ValueError: there is no package for this kind of URL.
    """

    def __init__(self, url: str, folder: Path, keep: int, keep_every: int | None, setting: str = "trainer.run_dir"):
        self.name, self.folder, self.keep, self.keep_every = redacted(url), folder, keep, keep_every
        self.setting = setting
        options = {"auto_mkdir": True} if url.startswith("file:") else {}
        try:
            self.files, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{setting} {self.name} cannot be opened: {error}") from error
        self.root = root.rstrip("/")
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the files that this process has copied
        self._scores: dict[int, Scores] = {}  # of checkpoints that are at the URL alone

    def fetch(self, alone: bool = False) -> None:
        """Copy the run with its newest checkpoint to this machine, unless it has one that is as new.

        Args:
            alone: have this checkpoint here and no other, as a machine needs it whose processes write none

        Raises:
            OSError: the URL cannot be read.
        """
        names = self._tried("read", self._names)
        newest, local = max(_whole(names), default=-1), self._local_steps()
        if newest < 0 and local:
            goes_on = f"the run goes on from step {max(local)} of {self.folder}. Remove that folder to start anew"
            print(f"{self.name} holds no checkpoint: {goes_on}", file=sys.stderr, flush=True)
        if newest < 0 or (newest in local if alone else newest <= max(local, default=-1)):
            return
        print(f"Fetching step {newest} of {self.name} into {self.folder}", file=sys.stderr, flush=True)
        step = f"checkpoints/step_{newest:08d}"
        older = list_checkpoints(self.folder / "checkpoints")
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        # The checkpoint comes last: with it here, a start fetches nothing, and copies this folder's log to the URL.
        for name in names:
            if not name.startswith(("checkpoints/", "profile/")) and not UNSENT.fullmatch(name):
                self._fetch_file(name, self.folder / name)
        with atomically(self.folder / step) as unfinished:
            for name in (name for name in names if name.startswith(f"{step}/")):
                self._fetch_file(name, unfinished / Path(name).name)
        for path in older if alone else ():
            shutil.rmtree(path, ignore_errors=True)

    def has_checkpoints(self) -> bool:
        """Return whether there is a folder of checkpoints at the URL; raise OSError if it cannot be read."""
        return self._tried("read", lambda: self.files.isdir(f"{self.root}/checkpoints"))

    def copy_checkpoint(self, step: int | None) -> Path:
        """Copy a checkpoint, the newest unless a step is given, with what commands read beside it; return its folder.

        Raises:
            ValueError: there is no such checkpoint.
            OSError: the URL cannot be read.
        """
        names = self._tried("read", self._names)
        whole = _whole(names)
        if not whole or (step is not None and step not in whole):
            which = "checkpoint" if step is None else f"whole checkpoint of step {step}"
            raise ValueError(
                f"{self.setting} {self.name} holds no {which}: expected the URL of a run (trainer.run_dir)"
            )
        chosen = max(whole) if step is None else step
        print(f"Fetching step {chosen} of {self.name}", file=sys.stderr, flush=True)
        self._copy(name for name in names if MODEL.fullmatch(name) or _steps({name}) == {chosen})
        return self.folder / "checkpoints" / f"step_{chosen:08d}"

    def copy_log(self) -> Path:
        """Copy the log, the settings and some pictures, and return the folder; a checkpoint's folder is left empty.

        Raises:
            ValueError: there is no run.
            OSError: the URL cannot be read.
        """
        names = self._tried("read", self._names)
        if not any(map(LOG.fullmatch, names)):
            raise ValueError(f"{self.setting} {self.name} holds no log: expected the URL of a run (trainer.run_dir)")
        self.folder.mkdir()
        grids = some_grids(sorted(filter(GRID.fullmatch, names)))
        self._copy([*grids, *filter(LOG.fullmatch, names)])
        for step in sorted(_whole(names))[-1:]:
            (self.folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        return self.folder

    def _copy(self, names: Iterable[str]) -> None:
        for name in names:
            if name == "config.yaml" or not UNSENT.fullmatch(name):  # hidden names may lead elsewhere
                self._fetch_file(name, self.folder / name)

    def push(self) -> None:
        """Copy what is new or has changed, each checkpoint's manifest last, and remove checkpoints no longer kept.

        Raises:
            OSError: the URL cannot be written; what was copied stays there.
            RunError: another run has written a newer checkpoint there.
        """
        self._tried("written", self._push)

    def write(self, name: str, text: str) -> None:
        """Write a small file at the URL alone; raise OSError if it cannot be written."""
        self._tried("written", lambda: self.files.pipe_file(f"{self.root}/{name}", text.encode()))

    def push_behind(self, log: Callable[[str], None]) -> None:
        """Do as `push`, and log it if the URL cannot be written: the next save tries again."""
        try:
            self.push()
        except OSError as error:
            log(f"{error}. The run goes on, and its next save tries again")

    def _push(self) -> None:
        names, local = self._names(), self._local_steps()
        whole, ours = _whole(names), max(local, default=-1)
        if (theirs := max(whole, default=-1)) > ours:
            raise RunError(
                f"trainer.run_dir {self.name} has a checkpoint of step {theirs}, and this run has none after step "
                f"{ours}: another run writes there. Stop one of them, or use another --trainer.run_dir"
            )
        scores = {step: self._scores_of(step, names) for step in whole | local}
        kept = kept_steps(scores, self.keep, self.keep_every)
        # The log goes first: a checkpoint resumes from log lines up to its step.
        for name in sorted(self._local_names(), key=lambda name: (name.startswith("checkpoints/"), MANIFEST in name)):
            step = OF_STEP.fullmatch(name)
            if step and (int(step[1]) not in kept or (step[2] != "scores.json" and int(step[1]) in whole)):
                continue  # it need not be there, or is
            with nullcontext() if step else suppress(FileNotFoundError):  # another program's file may vanish
                self._send(name)
        for number in _steps(names) - kept:
            folder = f"{self.root}/checkpoints/step_{number:08d}"
            if number in whole:
                self.files.rm_file(f"{folder}/{MANIFEST}")
            self.files.rm(folder, recursive=True)

    def _send(self, name: str) -> None:
        """Copy a file, unless it is there as it is now."""
        stat = (self.folder / name).stat()
        if self._sent.get(name) != (state := (stat.st_size, stat.st_mtime_ns)):
            self.files.put_file(str(self.folder / name), f"{self.root}/{name}")
            self._sent[name] = state

    def _scores_of(self, step: int, names: set[str]) -> Scores:
        name = f"checkpoints/step_{step:08d}/scores.json"
        if (self.folder / name).exists():
            return parse_scores((self.folder / name).read_bytes())
        if step not in self._scores:
            content = self.files.cat_file(f"{self.root}/{name}") if name in names else b""
            self._scores[step] = parse_scores(content)
        return self._scores[step]

    def _names(self) -> set[str]:
        """Return the names of the files at the URL, relative to it."""
        try:
            return {name.removeprefix(f"{self.root}/") for name in self.files.find(self.root)}
        except FileNotFoundError:
            return set()

    def _local_names(self) -> set[str]:
        names = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
        return {name for name in names if not UNSENT.fullmatch(name)}

    def _local_steps(self) -> set[int]:
        return {*map(step_of, list_checkpoints(self.folder / "checkpoints"))}

    def _fetch_file(self, name: str, path: Path) -> None:
        if name.startswith("/"):  # names with `..` are hidden ones
            raise OSError(f"{self.setting} {self.name} holds {name}, which no run has written")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as unfinished:
            self._tried("read", lambda: self.files.get_file(f"{self.root}/{name}", str(unfinished)))

    def _tried(self, verb: str, attempt: Callable[[], Result]) -> Result:
        try:
            return attempt()
        except RunError:
            raise
        except Exception as error:  # each kind of storage has its own errors
            reason = str(error) or type(error).__name__
            kind = OSError if isinstance(error, FileNotFoundError | PermissionError) else ConnectionError
            raise kind(f"{self.setting} {self.name} cannot be {verb}: {reason}") from error


def follow(config: Config, folder: RunFolder, accelerator: Accelerator) -> RemoteRun | None:
    """Bring the newest checkpoint of a run whose folder is a URL to every machine; None: the folder is here.

    All processes call this. The main process locks its local folder first.

    Raises:
        ValueError, OSError: the URL cannot be opened, read or written.
    """
    settings = config.trainer
    if not is_remote(str(settings.run_dir)):
        return None
    if accelerator.num_processes > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        extractor, weights = config.evaluate.extractor, config.evaluate.weights
        if config.evaluate.every and extractor == "demo-cnn" and not weights:
            raise ValueError(
                "evaluate.extractor is demo-cnn, which one machine trains and keeps in its own run folder while "
                "trainer.run_dir is a URL: for several machines choose another, or name its file by --evaluate.weights"
            )
    remote = RemoteRun(str(settings.run_dir), config.run_dir, settings.keep, settings.keep_every)

    def begin() -> None:
        folder.lock()
        remote.fetch()
        remote.push()  # a run that was killed may have saved a checkpoint that it did not copy

    run_on_main(accelerator, begin)
    if accelerator.is_local_main_process and not accelerator.is_main_process:
        remote.fetch(alone=True)
    accelerator.wait_for_everyone()
    return remote


@contextmanager
def failing_at_url(remote: RemoteRun | None, is_main: bool) -> Iterator[None]:
    """A context that sets the status at a run's URL to "failed" if an error leaves it, as `RunFolder` does here."""
    try:
        yield
    except BaseException:
        if remote is not None and is_main:
            with suppress(OSError):
                remote.write("state", "failed\n")
        raise


def _whole(names: set[str]) -> set[int]:
    """Return the steps of whole checkpoints among the names of a run's files."""
    return _steps({name for name in names if name.endswith(f"/{MANIFEST}")})


def _steps(names: set[str]) -> set[int]:
    return {int(step[1]) for name in names if (step := OF_STEP.fullmatch(name))}
