"""A whole run compared with its bare training step.

`accelerate launch trainer/main.py` trains a VAEGAN (dcgan, width 32) on JPEGs of 64 pixels, batch 64, with one thread,
two workers, EMA, progress, metrics and TensorBoard, a log line every 5 steps and a checkpoint every 25. Each time it
has logged a line, all its processes are stopped, this one takes as many steps of the bare `TrainStep` (the same
networks, one thread, one batch in memory, no EMA), and the run goes on: they take turns, so what else the machine does
cancels.

The share is the CPU time of the bare steps over that of the run's training process with all its threads, both summed
over the turns, so that each checkpoint counts. Logging, EMA, checkpoints and receiving batches are in it; the workers
are not, as they have the other core. CPU time does not see a process wait, so the table also has the share by wall
time; a neighbour disturbs it, so it has no bar.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from benchmarks.common import Training, accelerator, bar, made_images, parser, print_table
from trainer.config.parser import configure
from trainer.distributed.accelerator import keep_freed_memory

SYSTEM = "--system VAEGAN --system.networks.family dcgan --system.binary.r1_weight 0 --evaluate.every 0"
LEAST, TURN = 0.97, 5  # steps between log lines


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


class WholeRun:
    """A run in processes of its own, which are stopped but for the turns."""

    def __init__(self, words: list[str], folder: Path):
        launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet", "--num_processes", "1"]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
        self.metrics = folder / "metrics.jsonl"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(folder.with_suffix(".log"), "w") as log:
            command = [*launch, "trainer/main.py", *words, "--trainer.run_dir", str(folder)]
            self.launcher = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.wait_for_line()
        (self.process,) = self.launcher.children()

    def wait_for_line(self, known: int = 0) -> None:
        """Wait until the log has more lines than `known`."""
        while not self.metrics.exists() or self.metrics.read_text().count("\n") <= known:
            if self.launcher.poll() is not None:
                raise SystemExit(f"error: the run ended too early: see {self.metrics.parent.with_suffix('.log')}")
            time.sleep(0.005)

    def turn(self, known: int) -> tuple[float, float]:
        """Let the run go on to its next line; return its CPU and wall seconds."""
        processes = [self.process, *self.process.children(recursive=True)]
        began, before = time.perf_counter(), cpu(self.process)
        for each in processes:
            each.resume()
        self.wait_for_line(known)
        for each in processes:
            each.suspend()
        return cpu(self.process) - before, time.perf_counter() - began


def measure(words: list[str], rounds: int, folder: Path) -> list[object]:
    torch.set_num_threads(1)
    keep_freed_memory()
    config = configure(words)
    bare = Training(config, accelerator())
    run = WholeRun(words, folder)
    found = []
    try:
        for known in range(1, rounds + 3):
            turn = run.turn(known)
            began, before = time.perf_counter(), time.process_time()
            for step in range(TURN):
                bare.step([bare.batch], step)
            found.append((*turn, time.process_time() - before, time.perf_counter() - began))
    finally:
        for each in [*run.launcher.children(recursive=True), run.launcher]:
            each.kill()
    found = found[2:]  # the first have a start in them
    whole, wall, alone, alone_wall = (statistics.mean(column) / TURN for column in zip(*found, strict=True))
    return [
        f"{1e3 * whole:.0f}",
        f"{1e3 * alone:.0f}",
        *bar(alone / whole, LEAST),
        f"{alone_wall / wall:.2f}",
    ]


def rows(small: bool, rounds: int) -> Iterator[list[object]]:
    width, size, batch = (8, 32, 16) if small else (32, 64, 64)
    with tempfile.TemporaryDirectory() as name:
        data = made_images(Path(name) / "data", size, 2_000)
        words = f"{SYSTEM} --data.train {data} --data.size {size} --data.workers 2 --system.networks.width {width}"
        words += (
            f" --trainer.batch_size {batch} --trainer.steps 100000 --trainer.log_every {TURN} --trainer.save_every 25"
        )
        yield [batch, *measure([*words.split(), "--trainer.precision", "no"], rounds, Path(name) / "run")]


def main() -> None:
    given = parser(__doc__, rounds=25).parse_args()
    columns = "the bare step's | share | required | share by wall time"
    print_table(f"batch | the run's CPU ms a step | {columns}", rows(given.small, given.rounds))


if __name__ == "__main__":
    main()
