"""Time of a training step beside Pythae's: `python -m benchmarks.step`.

DCGAN-like networks for 64x64 images of 3 channels (four convolutions from `--width` up, latent 64), one batch in
memory, one CPU thread, no R1, no data loading, no averaging of weights. Ours is `trainer.step.TrainStep` on a binary
VAEGAN without normalisation; Pythae's is its own model and update in fp32, with BatchNorm in encoder and decoder as its
own networks have, where all three players move (its margin rule, which now and then skips one, is held off).

- `its losses`: ours lowers what Pythae's does: reconstruction on the discriminator's third level, KL, and a binary
  adversarial loss on samples from the prior alone.
- `two fakes`: ours as it is by default: reconstruction on pixels, KL, reconstructions and samples as fakes.

A round times one step of each, Pythae's before and after ours; a ratio is Pythae's mean time over ours. The FLOP count
is torch.utils.flop_counter's (convolutions and products of matrices), and `of FLOPs` the share of its ratio that the
fp32 time reaches.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peer import Pythae
from models import VAEGAN, DiscriminatorConfig, NetworkConfig
from models.adversary import Images
from models.systems.vaegan import Passes
from trainer.batch import Batch
from trainer.step import TrainStep

SIZE, CHANNELS, LATENT = 64, 3, 64
CASES = [("its losses", "no"), ("two fakes", "no"), ("two fakes", "bf16")]
REQUIRED = [1.5, 1.3, 2.0]


class SamplesOnly(VAEGAN):
    """A binary VAEGAN whose discriminator sees no reconstructions."""

    def fakes(self, passes: Passes) -> Images:
        return {"generated": passes.generated}


def our_system(case: str, width: int) -> VAEGAN:
    settings = {
        "latent_dim": LATENT,
        "networks": NetworkConfig("dcgan", width),
        "binary": DiscriminatorConfig(r1_weight=0.0),
    }
    if case == "its losses":
        return SamplesOnly(SIZE, CHANNELS, reconstruction="features", feature_layer=2, **settings)
    return VAEGAN(SIZE, CHANNELS, **settings)


def our_step(case: str, precision: str, width: int, image: torch.Tensor) -> Callable[[], None]:
    AcceleratorState._reset_state()  # one process, two precisions
    step = TrainStep(Accelerator(cpu=True, mixed_precision=precision), our_system(case, width), 1)
    batch = Batch((image,), slice(0, len(image)), len(image), seed=0, step=0)
    return lambda: step([batch], 0)


def pythae_step(width: int, image: torch.Tensor) -> Callable[[], None]:
    widths = [width * 2**level for level in range(4)]
    pythae = Pythae(SIZE, CHANNELS, LATENT, widths, lr=1e-4, batch_size=len(image), margin=1e9)
    return lambda: pythae.step(image)


def flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def seconds(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def compare(ours: Callable[[], None], pythae: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Medians over rounds: ours' seconds, Pythae's, and Pythae's over ours."""
    for step in (ours, pythae, ours, pythae):
        step()
    times = []
    for _ in range(rounds):
        before, mine, after = seconds(pythae), seconds(ours), seconds(pythae)
        times.append((mine, (before + after) / 2, (before + after) / 2 / mine))
    first, second, ratio = (statistics.median(column) for column in zip(*times, strict=True))
    return first, second, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--out", type=Path, help="a Markdown file to write the table to")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image = torch.rand(settings.batch_size, CHANNELS, SIZE, SIZE) * 2 - 1
    pythae = pythae_step(settings.width, image)
    their_flops = flops(pythae)
    table = [
        f"Batch {settings.batch_size}, width {settings.width}, {SIZE}x{SIZE} pixels; Pythae's step: "
        f"{their_flops / settings.batch_size / 1e9:.2f} GFLOP an image.",
        "",
        "| ours | precision | ms a step | Pythae's ms | times faster | required | FLOP ratio | of FLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (case, precision), required in zip(CASES, REQUIRED, strict=True):
        ours = our_step(case, precision, settings.width, image)
        allowed = their_flops / flops(ours)
        mine, theirs, ratio = compare(ours, pythae, settings.rounds)
        share = f"{ratio / allowed:.2f}" if precision == "no" else ""
        table.append(
            f"| {case} | {'fp32' if precision == 'no' else precision} | {1000 * mine:.0f} | {1000 * theirs:.0f} "
            f"| {ratio:.2f} | {required} | {allowed:.2f} | {share} |"
        )
    text = "\n".join(table)
    print(text)
    if settings.out:
        settings.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
