"""Steps beside a checkpoint that is being written: `python -m benchmarks.saving [--folder FOLDER] [--out FILE.md]`.

One process computes with one thread, and the other core is left to the writer of `trainer.checkpoint.writer.Saver`. The
networks are a VAEGAN of the dcgan family, width 192, with 76 MB of weights; a checkpoint has their moments of Adam and
their averages, too. Other settings of a run change them: `--config RECIPE --system.networks.width 64 ...`.

A round: steps without a save; one save, and the steps that are whole while it is written and the one before it removed;
steps without a save; and a save that the training waits for. `times` is the saving steps' mean over the others';
`without twice`, the later turn's over the earlier one's, says how much the machine itself wavers. `waits` is what the
training waits when it asks for the save: the copy of all tensors.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.scaling import random_batch, table
from trainer.checkpoint import writer
from trainer.checkpoint.state import TrainState
from trainer.config.parser import Config, configure
from trainer.distributed.accelerator import keep_freed_memory
from trainer.ema import EMA
from trainer.step import TrainStep

MEDIUM = [
    *("--system", "VAEGAN", "--system.networks.family", "dcgan", "--system.networks.width", "192"),
    *("--system.networks.norm", "group", "--system.discriminator", "ternary", "--data.train", "none"),
    *("--trainer.batch_size", "1"),
]
LIMIT = 1.1  # of a step's time while a checkpoint is written


class Training:
    """The real step on a batch in memory, and what a checkpoint keeps of it."""

    def __init__(self, config: Config):
        torch.manual_seed(0)
        system = config.system()
        self.step = TrainStep(Accelerator(cpu=True, mixed_precision=config.trainer.precision or "no"), system, 10**9)
        self.ema = EMA(system, config.trainer.ema_half_life, config.trainer.batch_size)
        self.state = TrainState(config, system, system.networks(), self.ema, self.step.player_states, [], [])
        self.batch = random_batch(config, system.domains, 0, 1, 0)
        self.done = 0

    def __call__(self) -> float:
        """Take a step; its seconds."""
        began = time.perf_counter()
        self.step([self.batch], self.done)
        self.done += 1
        self.ema.update(self.done)
        return time.perf_counter() - began


def save_beside(training: Training, saver: writer.Saver) -> tuple[list[float], float, float]:
    """Seconds of the steps that are whole while a checkpoint is written and the one before removed, of the wait for
    its copy, and of the writing."""
    began = time.perf_counter()
    saver.save(training.done, training.state.tensors(), training.state.manifest())
    waited = time.perf_counter() - began
    took, final = [], f"step_{training.done:08d}"
    while [path.name for path in saver.folder.glob("*")] != [final]:
        took.append(training())
    saver.finish()
    return took[:-1], waited, saver.seconds


def save_and_wait(training: Training, folder: Path) -> float:
    """Seconds of the same save with nothing beside it."""
    began = time.perf_counter()
    writer.save(folder, training.done, training.state.tensors(), training.state.manifest())
    writer.rotate(folder, 1)
    return time.perf_counter() - began


def compare(training: Training, folder: Path, rounds: int, steps: int) -> dict[str, float]:
    """Medians over rounds."""
    for _ in range(3):
        training()
    saver = writer.Saver(folder, 1, None, print)
    save_beside(training, saver)  # so that every later save removes one, and has its memory
    found = []
    for _ in range(rounds):
        training()  # another step than the last save's
        before = statistics.mean(training() for _ in range(steps))
        during, waited, beside = save_beside(training, saver)
        after = statistics.mean(training() for _ in range(steps))
        if not during:
            raise SystemExit(
                f"error: a save took {beside:.2f} s, and no step fits in: take more weights or fewer images"
            )
        alone = save_and_wait(training, folder)
        mean = statistics.mean(during)
        found.append(
            {
                "without": (before + after) / 2,
                "during": mean,
                "times": 2 * mean / (before + after),
                "steps": len(during),
            }
            | {"control": after / before, "waited": waited, "beside": beside, "alone": alone}
        )
    if training.step.failed() is not None:
        raise SystemExit("error: a step is not finite: nothing was measured")
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=5, help="of a turn without a save")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; unset: the system's for temporary files")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the table to")
    settings, others = parser.parse_known_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    load = os.getloadavg()[0]
    training = Training(configure(others or MEDIUM))
    training()  # optimizers begin to hold moments
    sizes = [
        sum(
            value.nbytes for name, content in training.state.tensors().items() if of(name) for value in content.values()
        )
        for of in (training.state.networks.__contains__, lambda _: True)
    ]
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        found = compare(training, Path(folder), settings.rounds, settings.steps)
    steps = [f"{found[name] * 1e3:.0f}" for name in ("without", "during")]
    saves = [f"{found[name] * 1e3:.0f}" for name in ("waited", "beside", "alone")]
    columns = {
        **dict(zip(("MB of weights", "of a checkpoint"), (f"{size / 1e6:.0f}" for size in sizes), strict=True)),
        **dict(zip(("ms a step", "while saving"), steps, strict=True)),
        "times": f"{found['times']:.3f}",
        "required": LIMIT,
        "without twice": f"{found['control']:.3f}",
        **dict(zip(("waits, ms", "save beside, ms", "save alone, ms"), saves, strict=True)),
    }
    lines = table(f"| {' | '.join(columns)} |", [columns.values()])
    lines.append(
        f"Medians of {settings.rounds} rounds; {found['steps']:.0f} steps fit into a save. Load before: {load:.1f}."
    )
    text = "\n".join(lines)
    print(text)
    if settings.out:
        settings.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
