"""Checkpoints: a folder of named tensors and a manifest, there as a whole or not at all.

checkpoints/step_00001000/manifest.json                  step, scores, configuration, order, sha256 of every file
                          encoder.safetensors            a network's weights
                          ema.encoder.safetensors        and their average
                          optimizer.binary.safetensors   a player's optimizer: WEIGHT.exp_avg, ...
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

Tensors = dict[str, dict[str, Tensor]]


def save(folder: Path, step: int, tensors: Tensors, manifest: dict[str, Any]) -> Path:
    """Write `folder/step_<8 digits>` from files of tensors by name; a failure leaves nothing behind.

    Raises:
        OSError: the disk is full, or not to be written.
    """
    final = folder / f"step_{step:08d}"
    unfinished = folder / f".unfinished.{final.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        files = {}
        for name, content in tensors.items():
            # Rust would map the file, and a full disk then kills the process: bytes first.
            files[f"{name}.safetensors"] = _write(unfinished / f"{name}.safetensors", safetensors.torch.save(content))
        _write(unfinished / "manifest.json", json.dumps({"step": step, **manifest, "files": files}, indent=1).encode())
        _sync(unfinished)
        unfinished.rename(final)
        _sync(folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors by file and name, and the manifest.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        tensors = {}
        for name, digest in manifest["files"].items():
            content = (path / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"{name} does not match its checksum")
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(content)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from error
    return tensors, manifest


def newest(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def load_newest(folder: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The newest whole checkpoint, or None; damaged ones that are newer are put aside as `damaged.step_*`.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    for unfinished in folder.glob(".unfinished.*"):
        shutil.rmtree(unfinished)
    paths = newest(folder)
    for path in paths:
        try:
            return load(path)
        except ValueError as error:
            aside = path.with_name(f"damaged.{path.name}")
            print(f"{error}. It is put aside as {aside.name}", file=sys.stderr, flush=True)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    if paths:
        raise ValueError(f"all checkpoints in {folder} are damaged: mend one, or take another --trainer.run_dir")
    return None


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` and the best by each FID that was measured in one way."""
    paths = newest(folder)
    best: dict[str, tuple[float, Path]] = {}
    for path in paths:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, score in manifest["scores"].items():
            if name.startswith("eval/fid"):
                way = json.dumps([name, manifest["evaluation"]])
                best[way] = min((score, path), best.get(way, (score, path)))
    kept = {*paths[:keep], *(path for _, path in best.values())}
    for path in paths:
        if path not in kept:
            gone = path.with_name(f".unfinished.{path.name}")
            path.rename(gone)
            shutil.rmtree(gone)


def optimizer_tensors(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state, by the names of its weights."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took."""
    for name, value in tensors.items():
        weight, _, key = name.rpartition(".")
        parameter = parameters[weight]
        optimizer.state[parameter][key] = value.to(parameter.device)


def _write(path: Path, content: bytes) -> str:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
