"""The time of a training step, compared with Pythae's, a plain loop's, and the passes that the mathematics needs.

DCGAN-like networks for 64x64 images of 3 channels (four convolutions from width 32 up, latent 64), a batch of 64 in
memory, on one CPU thread and on two, without R1, data loading and averaging of weights. Ours is `TrainStep` on a binary
VAEGAN without normalisation. The others:

- `Pythae` (fp32): its own model and update (benchmarks/peer.py), with BatchNorm in encoder and decoder as in its own
  networks; all three players move, because its margin rule, which sometimes skips one, is switched off. With `its
  losses` our step lowers the losses of Pythae's: reconstruction on the discriminator's third level, KL, and a binary
  adversarial loss on samples from the prior alone. In all other rows ours has its default losses: reconstruction on
  pixels, KL, and reconstructions and samples as fakes.
- `plain loop`, `limit`: the same networks and losses in `PlainLoop` and `Limit` of benchmarks/plain.py.

The times are CPU times of all threads; a thread that waits sleeps. bf16 is compared only where the processor computes
it.

The last table is of networks that are one channel wide, on two images of 32x32 pixels: nearly all of a step is then the
host's own time, in Python and in launching operations; medians of 50 times as many rounds.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.common import accelerator, bar, paired, parser, precisions, print_table
from benchmarks.plain import Limit, PlainLoop
from models import VAEGAN, DiscriminatorConfig, NetworkConfig
from models.adversary import Fakes
from models.systems.vaegan import Passes
from trainer.batch import Batch
from trainer.step import TrainStep

CHANNELS, LATENT = 3, 64
BARS = {PlainLoop: 1.0, Limit: 0.92}


class SamplesOnly(VAEGAN):
    """A binary VAEGAN whose discriminator sees no reconstructions."""

    def fakes(self, passes: Passes) -> Fakes:
        return {"generated": passes.generated}


def settings_of(width: int, latent: int = LATENT) -> dict[str, Any]:
    binary = DiscriminatorConfig(r1_weight=0.0)
    return {"latent_dim": latent, "networks": NetworkConfig("dcgan", width), "binary": binary}


def stepping(system: VAEGAN, precision: str, image: torch.Tensor) -> Callable[[], None]:
    """Return our step of a system on a batch of images."""
    step = TrainStep(accelerator(precision), system, 1)
    batch = Batch((image,), slice(0, len(image)), len(image), seed=0, step=0)
    return lambda: step([batch], 0)


def pythae_rows(width: int, image: torch.Tensor, rounds: int) -> Iterator[list[object]]:
    try:
        from benchmarks.peer import Pythae
    except ModuleNotFoundError as error:
        reason = f"Pythae: left out, as there is no module {error.name} (`pip install -e '.[bench]'`)"
        yield [reason, "fp32", torch.get_num_threads(), *4 * [""]]
        return
    size, widths = image.shape[-1], [width * 2**level for level in range(4)]
    peer = Pythae(size, CHANNELS, LATENT, widths[: size.bit_length() - 3], lr=1e-4, batch_size=len(image), margin=1e9)
    its = SamplesOnly(size, CHANNELS, reconstruction="features", feature_layer=2, **settings_of(width))
    cases = {"its losses": (its, 1.6), "our losses": (VAEGAN(size, CHANNELS, **settings_of(width)), 1.3)}
    for case, (system, required) in cases.items():
        times = paired(stepping(system, "no", image), lambda: peer.step(image), rounds)
        yield row(f"Pythae, {case}", "fp32", times, required)


def row(other: str, precision: str, times: tuple[float, float, float], required: float) -> list[object]:
    cells = [f"{1e3 * took:.0f}" for took in times[:2]]
    return [other, precision, torch.get_num_threads(), *cells, *bar(times[2], required)]


def rows(given: argparse.Namespace) -> Iterator[list[object]]:
    size, width, count = (32, 8, 4) if given.small else (64, 32, 64)
    image = torch.rand(count, CHANNELS, size, size) * 2 - 1
    for threads in given.threads:
        torch.set_num_threads(threads)
        yield from pythae_rows(width, image, given.rounds)
        for name, precision in precisions().items():
            for kind, required in BARS.items():
                ours = stepping(VAEGAN(size, CHANNELS, **settings_of(width)), precision, image)
                other = kind(VAEGAN(size, CHANNELS, **settings_of(width)), precision)
                times = paired(ours, lambda other=other: other.step(image), given.rounds)
                yield row("the plain loop" if kind is PlainLoop else "the limit", name, times, required)


def host_times(rounds: int) -> list[object]:
    """Return a row: the CPU milliseconds of a step of the narrowest networks, ours and the plain loop's."""
    image = torch.rand(2, 1, 32, 32) * 2 - 1
    plain = PlainLoop(VAEGAN(32, 1, **settings_of(1, latent=1)))
    ours = stepping(VAEGAN(32, 1, **settings_of(1, latent=1)), "no", image)
    mine, others, ratio = paired(ours, lambda: plain.step(image), 50 * rounds)
    return [f"{1e3 * mine:.2f}", f"{1e3 * others:.2f}", *bar(1 / ratio, 1.3, most=True)]


def main() -> None:
    options = parser(__doc__, rounds=15)
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of CPU threads (1 2)")
    given = options.parse_args()
    torch.manual_seed(0)
    head = "compared with | precision | threads | ms a step | the other's ms | times faster | required"
    print_table(head, rows(given))
    torch.set_num_threads(1)
    head = "the host's ms a step | in the plain loop | ratio | required"
    print_table(head, [host_times(given.rounds)])


if __name__ == "__main__":
    main()
