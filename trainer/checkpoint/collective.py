"""Saving and resuming checkpoints by all processes of a run together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

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
        evaluation_pending: whether the step must still be scored
        windows: what each process had not logged yet, see `LogWindow`
        shortened: whether the run was stopped at this step, and trainer.steps makes it the last one now
    """

    step: int = 0
    replaced: int = 0
    evaluation_pending: bool = False
    windows: list[dict[str, Any]] = []  # noqa: RUF012 - never written to
    shortened: bool = False


def resume(folder: Path, state: TrainState, accelerator: Accelerator) -> Resumed:
    """Load the newest whole checkpoint, the same one on every process; without one the run starts at step 0.

    Raises:
        ValueError, OSError: no checkpoint is whole, one cannot be read, or the newest does not fit the run.
    """
    found: tuple[files.Tensors, dict[str, Any]] | None = None

    def newest() -> tuple[Path, bool] | None:
        nonlocal found
        if (found := files.load_newest(folder)) is None:
            return None
        path = folder / f"step_{found[1]['step']:08d}"
        return path, files.read_scores(path) is not None

    chosen = run_on_main(accelerator, newest)
    if chosen is None:
        return Resumed()
    path, scored = chosen
    tensors, manifest = found or files.load(path)
    state.check(manifest, verbose=accelerator.is_main_process)
    state.load(tensors, manifest)
    pending, owes = manifest["evaluation_pending"], not scored and state.config.evaluate.every > 0
    shortened = owes and not pending and manifest["step"] == state.config.trainer.steps
    evaluates = owes and (pending or shortened)
    return Resumed(manifest["step"], manifest["replaced"], evaluates, manifest["windows"], shortened)


def save_on_main(accelerator: Accelerator, saver: Saver, work: Callable[[], None]) -> None:
    """Call a method of the saver on the main process; if it fails there, stop every process.

    Raises:
        RunError: a checkpoint could not be written, or another run writes to the run's URL.
    """

    def report_failure() -> str | None:
        try:
            work()
            return None
        except RunError as error:
            return str(error)
        except OSError as error:
            what = f"{error.strerror} ({error.filename or saver.folder})" if error.strerror else error
            return (
                f"step {saver.step}: the checkpoint could not be saved: {what}. Earlier checkpoints are intact: free "
                "some space or repair the folder, then run the same command to resume from the newest"
            )

    if failure := run_on_main(accelerator, report_failure):
        raise RunError(failure)
