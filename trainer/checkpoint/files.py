"""Reading checkpoints: the newest whole one, its scores, its checksums."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from models import manifest as manifests
from trainer import schemas

Tensors = dict[str, dict[str, Tensor]]
# A disk that cannot be read is not damage: it may be there again a minute later.
DAMAGE = (FileNotFoundError, ValueError, KeyError, TypeError, safetensors.SafetensorError)


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors by file and name, and the manifest.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        manifest = _manifest(path)
        tensors = {
            name.removesuffix(".safetensors"): manifests.tensors(path, manifest, name) for name in manifest["files"]
        }
    except DAMAGE as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from error
    return tensors, manifest


def read_scores(path: Path) -> tuple[dict[str, float], dict[str, Any]] | None:
    """A checkpoint's scores and how they were measured; None: it has not been evaluated, or the file is no such one."""
    try:
        manifests.check_regular(path / "scores.json")
        found = schemas.checked(json.loads((path / "scores.json").read_text()), schemas.Scores, "scores.json")
        return found.scores, found.evaluation
    except (OSError, ValueError, RecursionError):
        return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return manifests.checkpoints(folder)


def load_newest(folder: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The newest whole checkpoint, or None; damaged ones that are newer are put aside as `damaged.step_*`.

    Raises:
        ValueError: there are checkpoints, and all are damaged; they stay where they are.
        OSError: one cannot be read.
    """
    for unfinished in folder.glob(".unfinished.*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    damaged: list[tuple[Path, ValueError]] = []
    for path in list_checkpoints(folder):
        try:
            found = load(path)
        except ValueError as error:
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            aside = bad.with_name(f"damaged.{bad.name}")
            print(f"{reason}. It is put aside as {aside.name}", file=sys.stderr, flush=True)
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
        return found
    if damaged:
        raise _all_damaged(folder)
    return None


def verify_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest of the checkpoint that `load_newest` would load, and what is wrong with newer ones; nothing is
    changed, and no more than a part of a file is in memory.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for path in list_checkpoints(folder):
        try:
            manifest = _manifest(path)
            for name, digest in manifest["files"].items():
                manifests.check_regular(path / name)
                with (path / name).open("rb") as file:
                    manifests.check_digest(name, hashlib.file_digest(file, "sha256").hexdigest(), digest)
            return manifest, damaged
        except DAMAGE as error:
            damaged.append(f"checkpoint {path} is damaged: {error}")
    if damaged:
        raise _all_damaged(folder)
    return None, damaged


def _manifest(path: Path) -> dict[str, Any]:
    manifest = manifests.read(path)
    if path.name != f"step_{manifest['step']:08d}":
        raise ValueError(f"its manifest is of step {manifest['step']}")
    return manifest


def _all_damaged(folder: Path) -> ValueError:
    return ValueError(f"all checkpoints in {folder} are damaged: mend one, or take another --trainer.run_dir")
