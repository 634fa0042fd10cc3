"""Training of a comparison's runs, each in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from trainer import schemas
from trainer.compare.settings import ComparisonSettings, PlannedRun
from trainer.config.resume import RESUMABLE_SETTINGS, differences, saved_settings
from trainer.distributed.exit import user_errors

MAIN = Path(__file__).resolve().parents[1] / "main.py"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # would make a run part of the launch that started the comparison
# Settings in which a run that is there may differ from the comparison's. What changes its scores may not.
MAY_DIFFER = RESUMABLE_SETTINGS - {"evaluate.num", "evaluate.extractor", "system.perceptual_weights"} | {
    "trainer.precision"
}


def train_missing(runs: list[PlannedRun], settings: ComparisonSettings) -> dict[str, str]:
    """Train the runs that are not complete.

    Returns:
        what went wrong, by the name of each run that failed
    """
    shards = _shards(settings)
    failed = {str(run): message for run in runs if (message := _conflict(run, shards))}
    for name, message in failed.items():
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    missing = [run for run in runs if str(run) not in failed and not run.is_complete()]
    threads = max(1, len(os.sched_getaffinity(0)) // settings.compare.jobs)
    print(f"{len(runs)} runs in {settings.out}: {len(missing)} to train", flush=True)
    if missing:
        fit_extractor(settings)
    for count, (run, code, seconds) in enumerate(_train(missing, settings.compare.jobs, threads), 1):
        head = f"[{count}/{len(missing)}] {run}:"
        if code == 0 and run.is_complete():
            print(f"{head} trained in {seconds:.0f} s", flush=True)
        else:
            failed[str(run)] = _error_in(run.folder / "log.txt")
            print(f"{head} failed with exit code {code}: {failed[str(run)]}", file=sys.stderr, flush=True)
    return failed


def fit_extractor(settings: ComparisonSettings) -> None:
    """Train the demo-cnn for all runs, unless evaluate.weights names one; one that fits the data is kept."""
    data, evaluate = settings.data, settings.evaluate
    if evaluate.extractor != "demo-cnn" or evaluate.weights:
        return
    from accelerate import Accelerator  # these imports take seconds

    from trainer.evaluate.extractors.build import build_extractor

    print("preparing the demo-cnn for all runs", flush=True)
    with user_errors():
        train, test = data.open(data.trains, data.on_error), data.open(data.tests)
        build_extractor(evaluate, data, settings.out, train, test, Accelerator(cpu=True))


def start(run: PlannedRun, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the process of a run, which writes its output to log.txt in the run folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    recipe = run.folder / "recipe.yaml"
    run.config.write(recipe)
    with open(run.folder / "log.txt", "wb") as log:
        command = [sys.executable, str(MAIN), "--config", str(recipe)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _train(runs: list[PlannedRun], jobs: int, threads: int) -> Iterator[tuple[PlannedRun, int, float]]:
    """Yield each run with its exit code and seconds as it ends. Closing the iterator stops those still running."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment["OMP_NUM_THREADS"] = str(threads)
    waiting, running = list(runs), list[tuple[PlannedRun, subprocess.Popen[bytes], float]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running.append((run, start(run, environment), time.monotonic()))
            ended = [entry for entry in running if entry[1].poll() is not None]
            running = [entry for entry in running if entry not in ended]
            yield from ((run, process.returncode, time.monotonic() - began) for run, process, began in ended)
            time.sleep(0.1)
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()


def _shards(settings: ComparisonSettings) -> list[str] | None:
    """Return the fingerprint of each training set; None if one cannot be read, which a run that is to train reports."""
    try:
        return [one.fingerprint() for one in settings.data.open(settings.data.trains, settings.data.on_error)]
    except (DataError, OSError, ValueError):
        return None


def _conflict(run: PlannedRun, shards: list[str] | None) -> str | None:
    """Describe why its folder holds another run, if it does. Training checks that too, but skips complete runs.

    Args:
        run: of the comparison
        shards: fingerprint of each training set, None if one cannot be read
    """
    try:
        settings = saved_settings(run.folder)
    except ValueError as error:
        return f"{error}. Set another --compare.out, or remove the folder"
    if not settings:
        return None
    changed = differences(settings, run.config.resolved(), resumable=MAY_DIFFER)
    saved = schemas.newest_start(run.folder / "checkpoints")
    if saved and shards and (then := [one.fingerprint for one in saved.data]) != shards:
        changed.append(
            f"data.train: shards of fingerprint {', '.join(then)} in the checkpoint, {', '.join(shards)} now"
        )
    if (step := run.evaluated_step()) > run.config.trainer.steps:
        changed.append(f"trainer.steps: {step} in the checkpoint, {run.config.trainer.steps} now")
    if not changed:
        return None
    return (
        f"{run.folder} holds a run with other settings: {'; '.join(changed)}. Restore these settings, set another "
        "--compare.out, or remove the folder"
    )


def _error_in(log: Path) -> str:
    """Return the error message that a run printed, or else its last lines."""
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    _, found, message = text.rpartition("error: ")
    return message if found else "\n".join(text.splitlines()[-3:]) + f"\nSee {log}"
