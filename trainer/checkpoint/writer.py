"""Checkpoints: a folder of named tensors and a manifest, there as a whole or not at all, written beside the run.

checkpoints/step_00001000/manifest.json                  step, configuration, order, sha256 of every file
                          encoder.safetensors            a network's weights
                          ema.encoder.safetensors        and their average
                          optimizer.binary.safetensors   a player's optimizer: WEIGHT.exp_avg, ...
                          scores.json                    once the step has been evaluated
"""

import errno
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import manifest as manifests
from trainer.checkpoint.files import Tensors, list_checkpoints, read_scores
from trainer.files import Pause, no_pause, sync_folder, write_atomically, write_pieces

REST = 4.0  # times as long as it writes, a writer beside the run rests
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
        self._copies: Tensors = {}
        self.step, self.seconds = 0, 0.0  # of the last save, and of the longest

    def save(self, step: int, tensors: Tensors, manifest: dict[str, Any]) -> None:
        """Begin to save the tensors as they are now, once the save before is done.

        Raises:
            OSError: the one before could not be written.
        """
        self.finish()
        self._copy(tensors)
        self._awaited.clear()
        self.step = step
        self._writer = threading.Thread(target=self.write_pieces, args=(step, self._copies, manifest), daemon=True)
        self._writer.start()

    def score(self, step: int, scores: dict[str, float], evaluation: dict[str, Any]) -> None:
        """Add a step's scores to its checkpoint, and remove those that are no longer wanted.

        Raises:
            OSError: it could not be written.
        """
        self.finish()
        self.before()
        path = self.folder / f"step_{step:08d}" / "scores.json"
        write_atomically(path, json.dumps({"scores": scores, "evaluation": evaluation}, indent=1))
        self._rotate()

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

    def _copy(self, tensors: Tensors) -> None:
        """Into memory that is kept: what is taken and given back each time was seen to slow later steps down."""
        before, self._copies = self._copies, {}
        for file, content in tensors.items():
            self._copies[file] = {}
            for name, value in content.items():
                kept = before.get(file, {}).get(name)
                if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
                    kept = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                self._copies[file][name] = kept.copy_(value.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write_pieces(self, step: int, tensors: Tensors, manifest: dict[str, Any]) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread: the run goes first
        began = time.monotonic()
        try:
            for tried in itertools.count(1):
                try:
                    self.before()
                    save(self.folder, step, tensors, manifest, self._rest)
                    self._rotate()
                    self.seconds = max(self.seconds, time.monotonic() - began)
                    return
                except OSError as error:
                    if self._awaited.is_set() and tried >= TRIES:
                        raise
                    self.say(f"step {step}: the checkpoint could not be saved, and is tried again: {error}")
                    time.sleep(min(2 ** (tried - 1), 60))
        except BaseException as error:
            self._error = error

    def _rest(self, seconds: float) -> None:
        """Leave the core and the memory to the run for most of the time, unless it waits."""
        self._awaited.wait(REST * seconds)

    def _rotate(self) -> None:
        try:
            rotate(self.folder, self.keep, self.keep_every)
        except OSError as error:  # one is being read, say; the next time will do
            self.say(f"an old checkpoint could not be removed yet: {error}")


def save(folder: Path, step: int, tensors: Tensors, manifest: dict[str, Any], rest: Pause = no_pause) -> Path:
    """Write `folder/step_<8 digits>` from files of tensors by name; a failure leaves nothing behind.

    Args:
        folder, step, tensors, manifest: what is written where
        rest: is told how many seconds each piece took

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
            files[f"{name}.safetensors"] = write_pieces(
                unfinished / f"{name}.safetensors", *_serialized(content), rest=rest
            )
        write_pieces(unfinished / "manifest.json", manifests.sealed({"step": step, **manifest, "files": files}))
        sync_folder(unfinished)
        unfinished.rename(final)
        sync_folder(folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def checkpoint_bytes(tensors: Tensors, manifest: dict[str, Any]) -> int:
    """Bytes that a checkpoint takes on the disk, from the shapes of its tensors."""
    files = {f"{name}.safetensors": "0" * 64 for name in tensors}
    size = len(manifests.sealed({"step": 0, **manifest, "files": files}))
    for content in tensors.values():
        size += len(_header(_aligned(content))) + sum(value.nbytes for value in content.values())
    return size


def rotate(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove all but the newest `keep`, every `keep_every`-th step's and the best by each FID measured in one way."""
    paths = list_checkpoints(folder)
    best: dict[str, tuple[float, Path]] = {}
    for path in paths:
        scores, evaluation = read_scores(path) or ({}, {})
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
            shutil.rmtree(gone, ignore_errors=True)  # the next start removes what is left


def _check_room(folder: Path, tensors: Tensors) -> None:
    need = sum(value.nbytes for content in tensors.values() for value in content.values())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it takes {need:,} bytes, {free:,} are free")


def _serialized(content: dict[str, Tensor]) -> list[Any]:
    """The parts of a safetensors file: its length and header, then the memory of the tensors itself.

    The library would copy it, twice, and hold Python's lock meanwhile, for which the run's next step would wait.
    """
    ordered = _aligned(content)
    memory = [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for value in ordered.values()]
    return [_header(ordered), *memory]


def _aligned(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the order in which each lies at a multiple of its numbers' size."""
    return dict(sorted(content.items(), key=lambda item: -item[1].element_size()))


def _header(content: dict[str, Tensor]) -> bytes:
    """What stands before the memory of some tensors in a safetensors file."""
    header, offset = {}, 0
    for name, value in content.items():
        end = offset + value.nbytes
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
