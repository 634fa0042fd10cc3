"""Training steps while a checkpoint is written: `python -m benchmarks.saving [--folder FOLDER] [settings of a run]`.

One process trains with one thread; the other core is free for the writer thread of checkpoints. The system is a
VAEGAN with 76 MB of weights; a checkpoint also holds Adam's moments and the averaged weights. Settings of a run replace
it: `--config RECIPE --system.networks.width 64 ...`.

A round takes steps without a save, a save with the steps that fit wholly into it (it also removes the checkpoint
before), steps without a save again, and a save for which training waits. In the table, `times` is the time of a step
during a save over that of one without; `wait` is how long training waits for the copy of all tensors; and `control` is
the ratio of the two turns without a save, which shows how steady the machine is.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import Training, accelerator, medians, parser, print_table, seconds
from trainer.checkpoint import writer
from trainer.checkpoint.state import TrainState
from trainer.config.parser import Config, configure
from trainer.distributed.accelerator import keep_freed_memory

SYSTEM = (
    "--system VAEGAN --system.networks.family dcgan --system.networks.width 192 --system.networks.norm group "
    "--system.discriminator ternary --data.train none --trainer.batch_size 1"
)
LIMIT = 1.1  # of the time of a step while a checkpoint is written, over that of one without


def state_of(config: Config, training: Training) -> TrainState:
    """Return what a checkpoint of the training holds."""
    return TrainState(config, training.system, training.networks, training.ema, training.step.player_states, [], [])


def save_while_training(training: Training, state: TrainState, saver: writer.Saver) -> tuple[list[float], float, float]:
    """Save while training goes on.

    Returns:
        The seconds of each step that fits wholly into the save, of the wait for the copy, and of the writing.
    """
    waited = seconds(saver.save, training.done, state.tensors(), state.manifest())
    took, final = [], f"step_{training.done:08d}"
    while [path.name for path in saver.folder.glob("*")] != [final]:
        took.append(seconds(training))
    saver.finish()
    return took[:-1], waited, saver.seconds


def save_and_wait(training: Training, state: TrainState, folder: Path) -> float:
    """Return the seconds of the same save while nothing trains."""
    began = time.perf_counter()
    writer.save(folder, training.done, state.tensors(), state.manifest())
    writer.rotate(folder, 1)
    return time.perf_counter() - began


def compare(training: Training, state: TrainState, folder: Path, rounds: int, steps: int) -> dict[str, float]:
    """Return the medians over rounds of each figure, in seconds or as ratios."""
    saver = writer.Saver(folder, 1, None, print)
    save_while_training(training, state, saver)  # every later save has its memory, and removes a checkpoint
    found = []
    for _ in range(rounds):
        training()  # the last save was at the step before
        before = statistics.mean(seconds(training) for _ in range(steps))
        during, waited, beside = save_while_training(training, state, saver)
        after = statistics.mean(seconds(training) for _ in range(steps))
        if not during:
            raise SystemExit(
                f"error: no step fits into a save of {beside:.2f} s; "
                "take a larger --system.networks.width or a smaller --trainer.batch_size"
            )
        without, mean = (before + after) / 2, statistics.mean(during)
        figures = {"without": without, "during": mean, "times": mean / without, "control": after / before}
        saves = {"waited": waited, "beside": beside, "alone": save_and_wait(training, state, folder)}
        found.append(figures | saves | {"steps": len(during)})
    training.check()
    return medians(found)


def main() -> None:
    options = parser(__doc__, rounds=21)
    options.add_argument("--steps", type=int, default=5, help="steps of a turn without a save (5)")
    options.add_argument("--folder", type=Path, help="folder on the disk to write to (the system's temporary folder)")
    given, others = options.parse_known_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    load = os.getloadavg()[0]
    config = configure(others or SYSTEM.split())
    training = Training(config, accelerator(config.trainer.precision))
    state = state_of(config, training)
    for _ in range(4):
        training()
    sizes = {name: sum(value.nbytes for value in content.values()) for name, content in state.tensors().items()}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = compare(training, state, Path(folder), given.rounds, given.steps)
    cells = [f"{sum(sizes[name] for name in training.networks) / 1e6:.0f}", f"{sum(sizes.values()) / 1e6:.0f}"]
    cells += [f"{1e3 * found[name]:.0f}" for name in ("without", "during")]
    cells += [f"{found['times']:.3f}", str(LIMIT), f"{found['control']:.3f}"]
    cells += [f"{1e3 * found[name]:.0f}" for name in ("waited", "beside", "alone")]
    columns = (
        "ms a step | while saving | times | required | control | wait, ms | save while training, ms | save alone, ms"
    )
    print_table(f"MB of weights | MB of a checkpoint | {columns}", [cells])
    print(f"Medians of {given.rounds} rounds; {found['steps']:.0f} steps fit into a save. Load before: {load:.1f}.")


if __name__ == "__main__":
    main()
