"""Saving and resuming checkpoints by all processes of a run together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from trainer.checkpoint import files
from trainer.checkpoint.state import TrainState
from trainer.checkpoint.writer import Saver
from trainer.distributed.ranks import run_on_main
from trainer.errors import RunError


class Resumed(NamedTuple):
    """Where a run resumes.

    Args:
        step: steps that the run has made
        replaced: damaged images that other images replaced
        evaluation_pending: whether the step has not been scored yet but must be
        windows: what each process had not logged yet, see `LogWindow`
    """

    step: int = 0
    replaced: int = 0
    evaluation_pending: bool = False
    windows: list[dict[str, Any]] = []  # noqa: RUF012 - never written to


def resume(folder: Path, state: TrainState, accelerator: Accelerator) -> Resumed:
    """Load the newest intact checkpoint, the same one on every process; without one the run starts at step 0.

    Raises:
        ValueError, OSError: all checkpoints are damaged, one cannot be read, or the newest is of another run.
    """
    found: tuple[files.Tensors, dict[str, Any]] | None = None

    def newest() -> tuple[int, bool] | None:
        nonlocal found
        if (found := files.load_newest(folder)) is None:
            return None
        step = found[1]["step"]
        return step, files.read_scores(_path(folder, step)) is not None

    chosen = run_on_main(accelerator, newest)
    if chosen is None:
        return Resumed()
    step, scored = chosen
    tensors, manifest = found or files.load(_path(folder, step))
    state.check(manifest, verbose=accelerator.is_main_process)
    state.load(tensors, manifest)
    pending = manifest["evaluation_pending"] and not scored and state.config.evaluate.every > 0
    return Resumed(step, manifest["replaced"], pending, manifest["windows"])


def save_on_main(accelerator: Accelerator, saver: Saver, work: Callable[[], None]) -> None:
    """Call a method of the saver on the main process; if it fails there, stop every process.

    Raises:
        RunError: a checkpoint could not be written.
    """
    trouble = None
    if accelerator.is_main_process:
        try:
            work()
        except OSError as error:
            where = error.filename or saver.folder
            trouble = f"step {saver.step}: the checkpoint could not be saved: {error.strerror} ({where})"
    (trouble,) = broadcast_object_list([trouble])
    if trouble:
        raise RunError(
            f"{trouble}. Earlier checkpoints are intact: free some space or repair the folder, then run the same "
            "command to resume from the newest"
        )


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"
