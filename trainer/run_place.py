"""Where a run is that a command reads: in a folder of this machine, or at a URL, of which it gets a copy."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OF_SHARDS = re.compile(r"[*{]|\.(tar|json)$")  # in the URL of shards or of their index
CHECKPOINT = re.compile(r"(?P<run>.+)/checkpoints/step_(?P<step>\d{8,18})")


def run_place(text: str) -> Path | str:
    """Return a run as a command line names it: a folder, or a URL as it is."""
    return text if "://" in text else Path(text)


def is_run(url: str) -> bool:
    """Return whether a run or a checkpoint of one is at a URL, which may be of images, too.

    Raises:
        ValueError: there is no package for this kind of URL.
        OSError: the URL cannot be read.
    """
    if CHECKPOINT.fullmatch(url.rstrip("/")):
        return True
    if OF_SHARDS.search(url):
        return False
    from trainer.remote_run import RemoteRun  # which imports the trainer

    return RemoteRun(url, Path(), 1, None, setting="WHAT").has_checkpoints()


@contextmanager
def local_run(place: Path | str, log: bool = False) -> Iterator[Path]:
    """A context that yields the folder of a run or of a checkpoint; of one at a URL a copy, removed at its end.

    Args:
        place: a folder, or the URL of a run or of a checkpoint
        log: copy what a report shows instead of the newest checkpoint

    Raises:
        ValueError: there is no run at the URL, or no package for this kind of URL.
        OSError: the URL cannot be read.
    """
    if isinstance(place, Path):
        yield place
        return
    from trainer.remote_run import RemoteRun  # which imports the trainer

    named = CHECKPOINT.fullmatch(place.rstrip("/"))
    url, step = (named["run"], int(named["step"])) if named else (place.rstrip("/"), None)
    with tempfile.TemporaryDirectory(prefix="vaegan-run-") as scratch:
        remote = RemoteRun(url, Path(scratch) / (url.rpartition("/")[2] or "run"), 1, None, setting="RUN")
        copied = remote.copy_log() if log else remote.copy_checkpoint(step)
        yield copied if step is not None else remote.folder
