"""Reading checkpoints: the newest whole one, its scores, its checksums."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors
from torch import Tensor

from data.files import UNFINISHED, sha256
from models import manifest as manifests
from models.manifest import checkpoints as list_checkpoints
from trainer import schemas

Tensors = dict[str, dict[str, Tensor]]  # by file and name
Scores = tuple[dict[str, float], dict[str, Any]] | None  # of a checkpoint, and how they were measured
Found = TypeVar("Found")
# Other errors of reading are not damage: the disk may be there again a minute later.
DAMAGE = (FileNotFoundError, ValueError, KeyError, TypeError, safetensors.SafetensorError)


class DamagedError(ValueError):
    """A checkpoint is damaged."""

    def __init__(self, path: Path, reason: object):
        super().__init__(f"checkpoint {path} is damaged: {reason}")
        self.path = path


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return a checkpoint's tensors and manifest.

    Raises:
        DamagedError: a file is missing or damaged.
        ValueError: the checkpoint has another format.
    """
    with _naming(path):
        manifest = _manifest(path)
        files = manifest["files"]
        return {name.removesuffix(".safetensors"): manifests.tensors(path, manifest, name) for name in files}, manifest


def read_scores(path: Path) -> Scores:
    """Return a checkpoint's scores and how they were measured; None without a valid scores.json."""
    try:
        manifests.check_regular(path / "scores.json")
        return parse_scores((path / "scores.json").read_bytes())
    except (OSError, ValueError):
        return None


def parse_scores(content: bytes) -> Scores:
    """Return the scores in the text of a scores.json, and how they were measured; None if it is not valid."""
    try:
        found = schemas.checked(json.loads(content), schemas.ScoresFile, "scores.json")
        return found.scores, found.evaluation
    except (ValueError, RecursionError):
        return None


def load_newest(folder: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """Return the newest whole checkpoint, or None; newer damaged ones are renamed to `damaged.step_*`.

    Raises:
        ValueError: all checkpoints are damaged, which leaves them as they are, or one has another format.
        OSError: a checkpoint cannot be read.
    """
    for unfinished in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    found, damaged = _newest(folder, load)
    for error in damaged:
        aside = error.path.with_name(f"damaged.{error.path.name}")
        print(f"{error}. It is put aside as {aside.name}", file=sys.stderr, flush=True)
        shutil.rmtree(aside, ignore_errors=True)
        error.path.rename(aside)
    return found


def verify_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the manifest of the checkpoint that `load_newest` loads, and what is wrong with newer ones.

    Nothing is changed, and only a part of a file is in memory at once.

    Raises:
        ValueError: all checkpoints are damaged, or one has another format.
    """
    manifest, damaged = _newest(folder, _verify)
    return manifest, list(map(str, damaged))


def _newest(folder: Path, read: Callable[[Path], Found]) -> tuple[Found | None, list[DamagedError]]:
    damaged: list[DamagedError] = []
    for path in list_checkpoints(folder):
        try:
            return read(path), damaged
        except DamagedError as error:
            damaged.append(error)
    if damaged:
        raise ValueError(f"all checkpoints in {folder} are damaged: repair one, or choose another --trainer.run_dir")
    return None, []


def _verify(path: Path) -> dict[str, Any]:
    with _naming(path):
        manifest = _manifest(path)
        for name, digest in manifest["files"].items():
            manifests.check_regular(path / name)
            manifests.check_digest(name, sha256(path / name), digest)
        return manifest


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the checkpoint in errors of reading it."""
    try:
        yield
    except manifests.FormatError as error:
        raise manifests.FormatError(f"checkpoint {path}: {error}. Choose another --trainer.run_dir") from error
    except DAMAGE as error:
        raise DamagedError(path, error) from error


def _manifest(path: Path) -> dict[str, Any]:
    manifest = manifests.read(path)
    if path.name != f"step_{manifest['step']:08d}":
        raise ValueError(f"its manifest is of step {manifest['step']}")
    return manifest
