"""Checkpoints: a folder of named tensors and a manifest, there as a whole or not at all, written beside the run.

checkpoints/step_00001000/manifest.json                  step, configuration, order, sha256 of every file
                          encoder.safetensors            a network's weights
                          ema.encoder.safetensors        and their average
                          optimizer.binary.safetensors   a player's optimizer: WEIGHT.exp_avg, ...
                          scores.json                    once the step has been evaluated
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

Tensors = dict[str, dict[str, Tensor]]
TRIES = 5  # at a checkpoint that cannot be written, before the run gives up
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}


class Saver:
    """Saves checkpoints beside the run, which waits for a copy of the tensors only.

    A save that fails is tried again, each time with a word about it, while the run goes on; when the next one is due
    and it still cannot be written, the run is told.

    Args:
        folder: the run's checkpoints
        keep: newest ones that are kept, besides the best by each FID
        keep_every: checkpoints at multiples of so many steps are kept for good; None: none are
        say: tells the user
        before: writes what a checkpoint goes on from
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None,
        say: Callable[[str], None],
        before: Callable[[], None] = lambda: None,
    ):
        self.folder, self.keep, self.keep_every, self.say, self.before = folder, keep, keep_every, say, before
        self._writer: threading.Thread | None = None
        self._awaited = threading.Event()
        self._error: BaseException | None = None
        self.step, self.seconds = 0, 0.0  # of the last save, and of the longest

    def save(self, step: int, tensors: Tensors, manifest: dict[str, Any]) -> None:
        """Begin to save the tensors as they are now, once the save before is done.

        Raises:
            OSError: the one before could not be written.
        """
        self.finish()
        copied = {
            file: {name: value.detach().to("cpu", copy=True) for name, value in content.items()}
            for file, content in tensors.items()
        }
        self._awaited.clear()
        self.step = step
        self._writer = threading.Thread(target=self._write, args=(step, copied, manifest), daemon=True)
        self._writer.start()

    def score(self, step: int, scores: dict[str, float], evaluation: dict[str, Any]) -> None:
        """Add a step's scores to its checkpoint, and remove those that are no longer wanted.

        Raises:
            OSError: it could not be written.
        """
        self.finish()
        path = self.folder / f"step_{step:08d}" / "scores.json"
        replace(path, json.dumps({"scores": scores, "evaluation": evaluation}, indent=1))
        rotate(self.folder, self.keep, self.keep_every)

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            OSError: it could not be written.
        """
        if self._writer is not None:
            self._awaited.set()
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, tensors: Tensors, manifest: dict[str, Any]) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread: the run goes first
        began = time.monotonic()
        try:
            for tried in itertools.count(1):
                try:
                    self.before()
                    save(self.folder, step, tensors, manifest)
                    rotate(self.folder, self.keep, self.keep_every)
                    self.seconds = max(self.seconds, time.monotonic() - began)
                    return
                except OSError as error:
                    if self._awaited.is_set() and tried >= TRIES:
                        raise
                    self.say(f"step {step}: the checkpoint could not be saved, and is tried again: {error}")
                    time.sleep(min(2 ** (tried - 1), 60))
        except BaseException as error:
            self._error = error


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
        _check_room(unfinished, tensors)
        files = {}
        for name, content in tensors.items():
            files[f"{name}.safetensors"] = _write(unfinished / f"{name}.safetensors", *_serialized(content))
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
        if path.name != f"step_{manifest['step']:08d}":
            raise ValueError(f"its manifest is of step {manifest['step']}")
        tensors = {}
        for name, digest in manifest["files"].items():
            content = (path / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"{name} does not match its checksum")
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(content)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from error
    return tensors, manifest


def scores_of(path: Path) -> tuple[dict[str, float], dict[str, Any]] | None:
    """A checkpoint's scores and how they were measured; None: it has not been evaluated."""
    try:
        found = json.loads((path / "scores.json").read_text())
        return found["scores"], found["evaluation"]
    except (OSError, ValueError, KeyError):
        return None


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


def rotate(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove all but the newest `keep`, every `keep_every`-th step's and the best by each FID measured in one way."""
    paths = newest(folder)
    best: dict[str, tuple[float, Path]] = {}
    for path in paths:
        scores, evaluation = scores_of(path) or ({}, {})
        for name, score in scores.items():
            if name.startswith("eval/fid"):
                way = json.dumps([name, evaluation])
                best[way] = min((score, path), best.get(way, (score, path)))
    kept = {*paths[:keep], *(path for _, path in best.values())}
    if keep_every:
        kept |= {path for path in paths if int(path.name.removeprefix("step_")) % keep_every == 0}
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


def replace(path: Path, content: str) -> None:
    """Write a small file that is there as a whole or not at all, and still after a crash of the machine."""
    unfinished = path.with_name(f".unfinished.{path.name}")
    _write(unfinished, content.encode())
    os.replace(unfinished, path)
    _sync(path.parent)


def _check_room(folder: Path, tensors: Tensors) -> None:
    need = sum(value.nbytes for content in tensors.values() for value in content.values())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it takes {need:,} bytes, {free:,} are free")


def _serialized(content: dict[str, Tensor]) -> list[Any]:
    """The parts of a safetensors file: its length and header, then the memory of the tensors itself.

    The library would copy it, twice, and hold Python's lock meanwhile, for which the run's next step would wait.
    """
    header, offset, parts = {}, 0, []
    for name, value in sorted(content.items(), key=lambda item: -item[1].element_size()):  # so that all are aligned
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
        parts.append(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]


def _write(path: Path, *parts: Any) -> str:
    """Write bytes to the disk itself; returns their sha256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
