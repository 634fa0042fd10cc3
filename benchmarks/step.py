"""The time of a training step, compared with Pythae's and a plain loop's: `python -m benchmarks.step`.

DCGAN-like networks for 64x64 images of 3 channels (four convolutions from `--width` up, latent 64), one batch in memory
and one CPU thread, without R1, data loading and averaging of weights. Ours is `TrainStep` on a binary VAEGAN
without normalisation. Pythae's is its own model and update in fp32, with BatchNorm in encoder and decoder as in its own
networks; all three players move, because its margin rule, which sometimes skips one, is switched off.

- `its losses`: our step lowers the losses of Pythae's: reconstruction on the discriminator's third level, KL, and a
  binary adversarial loss on samples from the prior alone.
- `two fakes`: our default losses: reconstruction on pixels, KL, and reconstructions and samples as fakes.

The second table compares the step of `two fakes` with `benchmarks/plain.py`, a plain loop of the same networks and
losses.

A round times the other's step before and after ours; the ratio is the mean of its times over ours. FLOPs are those of
convolutions and matrix products (torch.utils.flop_counter). `of FLOPs` is the ratio of times over that of FLOPs.

The last table is of networks that are one channel wide, on two images of 32x32 pixels: nearly all of a step is then the
host's own time, in Python and in launching operations. Its times are the lowest of all rounds, which other work on the
machine disturbs least.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import accelerator, parser, print_table, seconds
from benchmarks.plain import PlainLoop
from models import VAEGAN, DiscriminatorConfig, NetworkConfig
from models.adversary import Fakes
from models.systems.vaegan import Passes
from trainer.batch import Batch
from trainer.step import TrainStep

SIZE, CHANNELS, LATENT = 64, 3, 64
CASES = [("its losses", "no", 1.5), ("two fakes", "no", 1.3), ("two fakes", "bf16", 2.0)]  # and the required ratio


class SamplesOnly(VAEGAN):
    """A binary VAEGAN whose discriminator sees no reconstructions."""

    def fakes(self, passes: Passes) -> Fakes:
        return {"generated": passes.generated}


def settings_of(width: int) -> dict[str, Any]:
    binary = DiscriminatorConfig(r1_weight=0.0)
    return {"latent_dim": LATENT, "networks": NetworkConfig("dcgan", width), "binary": binary}


def our_step(case: str, precision: str, width: int, image: torch.Tensor) -> Callable[[], None]:
    settings = settings_of(width)
    if case == "its losses":
        system = SamplesOnly(SIZE, CHANNELS, reconstruction="features", feature_layer=2, **settings)
    else:
        system = VAEGAN(SIZE, CHANNELS, **settings)
    step = TrainStep(accelerator(precision), system, 1)
    batch = Batch((image,), slice(0, len(image)), len(image), seed=0, step=0)
    return lambda: step([batch], 0)


def flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compare(ours: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Return medians over rounds: the CPU seconds of our step and of the other's, and the ratio of the two."""
    for step in (ours, other, ours, other):
        step()
    times = []
    for _ in range(rounds):
        before, mine, after = (seconds(step, clock=time.process_time) for step in (other, ours, other))
        times.append((mine, (before + after) / 2, (before + after) / 2 / mine))
    first, second, ratio = (statistics.median(column) for column in zip(*times, strict=True))
    return first, second, ratio


def host_times(rounds: int) -> list[object]:
    """Return a row: the lowest CPU milliseconds of a step of the narrowest networks, ours and the plain loop's."""
    image = torch.rand(2, 1, 32, 32) * 2 - 1
    narrow = {"latent_dim": 1, "networks": NetworkConfig("dcgan", 1), "binary": DiscriminatorConfig(r1_weight=0.0)}
    step, plain = TrainStep(accelerator(), VAEGAN(32, 1, **narrow), 1), PlainLoop(VAEGAN(32, 1, **narrow))
    batch = Batch((image,), slice(0, 2), 2, seed=0, step=0)
    both = (lambda: step([batch], 0), lambda: plain.step(image))
    times = [[seconds(each, clock=time.process_time) for each in both] for _ in range(20 * rounds)]
    ours, others = (min(column) for column in zip(*times, strict=True))
    return [f"{1e3 * ours:.2f}", f"{1e3 * others:.2f}", f"{ours / others:.2f}", 1.3]


def pythae_rows(given: argparse.Namespace, image: torch.Tensor) -> Iterator[list[object]]:
    from benchmarks.peer import Pythae  # in the extra `bench`

    widths = [given.width * 2**level for level in range(4)]
    peer = Pythae(SIZE, CHANNELS, LATENT, widths, lr=1e-4, batch_size=len(image), margin=1e9)
    their_flops = flops(lambda: peer.step(image))
    for case, precision, required in CASES:
        ours = our_step(case, precision, given.width, image)
        allowed = their_flops / flops(ours)
        mine, theirs, ratio = compare(ours, lambda: peer.step(image), given.rounds)
        times = [f"{1e3 * mine:.0f}", f"{1e3 * theirs:.0f}", f"{ratio:.2f}"]
        share = f"{ratio / allowed:.2f}" if precision == "no" else ""
        yield [case, "fp32" if precision == "no" else precision, *times, required, f"{allowed:.2f}", share]


def plain_rows(given: argparse.Namespace, image: torch.Tensor) -> Iterator[list[object]]:
    for precision in ("no", "bf16"):
        plain = PlainLoop(VAEGAN(SIZE, CHANNELS, **settings_of(given.width)), precision)
        ours = our_step("two fakes", precision, given.width, image)
        mine, theirs, ratio = compare(ours, lambda plain=plain: plain.step(image), given.rounds)
        name = "fp32" if precision == "no" else precision
        yield [name, f"{1e3 * mine:.0f}", f"{1e3 * theirs:.0f}", f"{ratio:.2f}", 1.0]


def main() -> None:
    options = parser(__doc__, rounds=15)
    options.add_argument("--batch_size", type=int, default=64)
    options.add_argument("--width", type=int, default=32, help="channels after the first convolution (32)")
    options.add_argument("--without_pythae", action="store_true", help="compare with the plain loop only")
    given = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image = torch.rand(given.batch_size, CHANNELS, SIZE, SIZE) * 2 - 1
    print(f"Batch {given.batch_size}, width {given.width}, {SIZE}x{SIZE} pixels.\n")
    if not given.without_pythae:
        head = "ours | precision | ms a step | Pythae's ms | times faster | required | FLOP ratio | of FLOPs"
        print_table(head, pythae_rows(given, image))
    head = "precision | ms a step | the plain loop's ms | times faster | required"
    print_table(head, plain_rows(given, image))
    head = "the host's ms a step | in the plain loop | ratio | at most"
    print_table(head, [host_times(given.rounds)])


if __name__ == "__main__":
    main()
