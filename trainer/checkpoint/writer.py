"""Writing checkpoints: folders of named tensors and a manifest, which appear whole or not at all.

checkpoints/step_00001000/manifest.json                  format, step, configuration, sha256 of every file
                          encoder.safetensors            a network's weights
                          ema.encoder.safetensors        their average
                          optimizer.binary.safetensors   a player's optimizer: WEIGHT.exp_avg, ...
                          scores.json                    once the step has been evaluated

The writer is our own because the run goes on meanwhile: it pauses between pieces, and it writes the tensors' memory
itself, which safetensors would copy twice while it holds Python's lock.
"""

import errno
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import UNFINISHED, atomically
from models import manifest as manifests
from trainer.checkpoint.files import Scores, Tensors, list_checkpoints, read_scores
from trainer.files import Pause, write_atomically, write_pieces

PAUSE = 4.0  # times the seconds that a piece took
TRIES = 5  # to write a checkpoint while the run waits for it
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}


class Saver:
    """Saves checkpoints in a thread, while the run waits for a copy of the tensors only.

    A save that fails is tried again and logged while the run goes on. The run gets the error when its next save is due
    and at least `TRIES` tries have failed.

    Args:
        folder: the run's checkpoints
        keep: number of newest checkpoints that are kept, besides the best, as `kept_steps` has it
        keep_every: checkpoints at multiples of this step are kept for good; None: none are
        log: prints a message for the user
        before_save: is called before each save, to write what the checkpoint depends on
        after_save: is called after each save, in the thread

    Attributes:
        step: of the last save
        seconds: that the longest save took
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None,
        log: Callable[[str], None],
        before_save: Callable[[], None] = lambda: None,
        after_save: Callable[[], None] = lambda: None,
    ):
        self.folder, self.keep, self.keep_every, self.log = folder, keep, keep_every, log
        self.before_save, self.after_save = before_save, after_save
        self.step, self.seconds = 0, 0.0
        self._thread: threading.Thread | None = None
        self._run_waits = threading.Event()
        self._error: BaseException | None = None
        self._copies: Tensors = {}

    def save(self, step: int, tensors: Tensors, manifest: dict[str, Any]) -> None:
        """Begin to save the tensors as they are now, after `finish`."""
        self.finish()
        self._copy(tensors)
        self._run_waits.clear()
        self.step = step
        self._thread = threading.Thread(target=self._write, args=(step, self._copies, manifest), daemon=True)
        self._thread.start()

    def score(self, step: int, scores: dict[str, float], evaluation: dict[str, Any]) -> None:
        """Add a step's scores to its checkpoint, after `finish`, and remove checkpoints that are no longer kept."""
        self.finish()
        self.before_save()
        path = self.folder / f"step_{step:08d}" / "scores.json"
        write_atomically(path, json.dumps({"scores": scores, "evaluation": evaluation}, indent=1))
        self._rotate()

    def finish(self) -> None:
        """Wait for the current save; raise OSError if the checkpoint could not be written."""
        if self._thread is not None:
            self._run_waits.set()
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _copy(self, tensors: Tensors) -> None:
        """Copy into memory that is kept: allocating it for each save slows later steps down."""
        before, self._copies = self._copies, {}
        for file, content in tensors.items():
            self._copies[file] = {}
            for name, value in content.items():
                kept = before.get(file, {}).get(name)
                if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
                    kept = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                self._copies[file][name] = kept.copy_(value.detach(), non_blocking=True)
        if torch.cuda.is_initialized():  # a run on the CPU must not make a context on a GPU
            torch.cuda.synchronize()

    def _write(self, step: int, tensors: Tensors, manifest: dict[str, Any]) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread: the run goes first
        began = time.monotonic()
        try:
            for tries in itertools.count(1):
                try:
                    self.before_save()
                    save(self.folder, step, tensors, manifest, self._pause)
                    self._rotate()
                    self.after_save()
                    self.seconds = max(self.seconds, time.monotonic() - began)
                    return
                except OSError as error:
                    if self._run_waits.is_set() and tries >= TRIES:
                        raise
                    self.log(f"step {step}: the checkpoint could not be saved and is tried again: {error}")
                    time.sleep(min(2 ** (tries - 1), 60))
        except BaseException as error:
            self._error = error

    def _pause(self, seconds: float) -> None:
        """Leave the core and the memory to the run for most of the time, unless it waits."""
        self._run_waits.wait(PAUSE * seconds)

    def _rotate(self) -> None:
        try:
            rotate(self.folder, self.keep, self.keep_every)
        except OSError as error:  # it may be in use: the next save tries again
            self.log(f"an old checkpoint could not be removed yet: {error}")


def save(folder: Path, step: int, tensors: Tensors, manifest: dict[str, Any], pause: Pause | None = None) -> Path:
    """Write the checkpoint `folder/step_<8 digits>` and return its path; a failure leaves nothing behind.

    Args:
        folder: the run's checkpoints
        step: optimizer steps of the run
        tensors: by file and name
        manifest: the rest, as plain data
        pause: as `write_pieces` has it
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomically(folder / f"step_{step:08d}") as unfinished:
        unfinished.mkdir()
        write_files(unfinished, step, tensors, manifest, pause)
    return folder / f"step_{step:08d}"


def write_files(
    folder: Path, step: int, tensors: Tensors, manifest: dict[str, Any], pause: Pause | None = None
) -> None:
    """Write a checkpoint's files into an empty folder; the arguments are those of `save`."""
    _check_room(folder, tensors)
    digests = {
        name: write_pieces(folder / f"{name}.safetensors", *_serialized(content), pause=pause)
        for name, content in tensors.items()
    }
    write_pieces(folder / "manifest.json", _manifest(step, manifest, digests))


def checkpoint_bytes(tensors: Tensors, manifest: dict[str, Any]) -> int:
    """Return the bytes that a checkpoint takes on the disk, from the shapes of its tensors."""
    headers = sum(len(_header(_aligned(content))) for content in tensors.values())
    return len(_manifest(0, manifest, dict.fromkeys(tensors, "0" * 64))) + headers + _nbytes(tensors)


def rotate(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove all checkpoints but the newest `keep`, multiples of `keep_every`, and the best.

    The best have the lowest FID of samples, or of reconstructions if the run is judged by that, as each evaluation
    says. Only scores that were measured in the same way are compared.
    """
    paths = {step_of(path): path for path in list_checkpoints(folder)}
    kept = kept_steps({step: read_scores(path) for step, path in paths.items()}, keep, keep_every)
    for step in paths.keys() - kept:
        removed = paths[step].with_name(f"{UNFINISHED}{paths[step].name}")
        paths[step].rename(removed)
        shutil.rmtree(removed, ignore_errors=True)  # the next start removes the rest


def kept_steps(scores: Mapping[int, Scores], keep: int, keep_every: int | None) -> set[int]:
    """Return which of some checkpoints are kept, by their steps, as `rotate` says.

    Args:
        scores: of each checkpoint, by its step
    """
    best: dict[str, tuple[float, int]] = {}
    for step, found in scores.items():
        values, evaluation = found or ({}, {})
        for name, score in values.items():
            if name.startswith(f"eval/{evaluation.get('judged_by', 'fid')}"):
                measured = json.dumps([name, evaluation])
                best[measured] = min((score, step), best.get(measured, (score, step)))
    multiples = {step for step in scores if keep_every and step % keep_every == 0}
    return {*sorted(scores)[-keep:], *multiples, *(step for _, step in best.values())}


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def _manifest(step: int, manifest: dict[str, Any], digests: dict[str, str]) -> bytes:
    files = {f"{name}.safetensors": digest for name, digest in digests.items()}
    return manifests.sealed({"format": manifests.FORMAT, "step": step, **manifest, "files": files})


def _check_room(folder: Path, tensors: Tensors) -> None:
    need, free = _nbytes(tensors), shutil.disk_usage(folder).free
    if free < need:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it takes {need:,} bytes, {free:,} are free")


def _nbytes(tensors: Tensors) -> int:
    return sum(value.nbytes for content in tensors.values() for value in content.values())


def _serialized(content: dict[str, Tensor]) -> list[Any]:
    """Return the parts of a safetensors file: its header, then the memory of the tensors itself."""
    ordered = _aligned(content)
    memory = [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for value in ordered.values()]
    return [_header(ordered), *memory]


def _aligned(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in an order of names in which each starts at a multiple of its element size."""
    return dict(sorted(content.items(), key=lambda item: (-item[1].element_size(), item[0])))


def _header(content: dict[str, Tensor]) -> bytes:
    header, offset = {}, 0
    for name, value in content.items():
        end = offset + value.nbytes
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
