"""The cost of an evaluation over that of its generator and extractor: `python -m benchmarks.evaluation`.

A run's evaluation of samples by demo-cnn, with one CPU thread a process: with FID and IS, and with KID, precision,
recall, density and coverage as well. It takes turns with the bare forward passes of the same generator and extractor on
blocks of the same size; the share is the median over rounds of the ratio of the two. Then two processes of one thread
each are compared with one, in pairs. Memory is the peak of a process that evaluates, for several numbers of samples.

The generator is a DCGAN decoder of `--width` for 32x32 images of one channel, latent 16, and in the first table also
the residual decoder of the default networks. The real images are scikit-learn's digits. The weights are random, which
costs what trained ones cost.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import accelerator, parser, print_table, seconds
from data.prepare import prepare
from data.shards.reader import Shards
from models import VAE, NetworkConfig
from trainer.batch import to_uint8
from trainer.config.settings import DataConfig
from trainer.distributed.accelerator import keep_freed_memory
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.extractors.demo_cnn import fit, load_demo_cnn

SIZE, LATENT = 32, 16
SHARE, FASTER = 1.1, 1.7
ALL = ("fid", "is", "kid", "prdc")


class Sampler(VAE):
    """A VAE of which only samples are scored."""

    def can(self, use: str) -> bool:
        return use == "sample"


def evaluator_of(folder: Path, num: int, networks: NetworkConfig, wanted: tuple[str, ...]) -> tuple[Evaluator, Sampler]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    system = Sampler(SIZE, 1, LATENT, networks).eval().requires_grad_(False)
    extractor = load_demo_cnn(folder / "demo-cnn.safetensors", 1).eval().requires_grad_(False)
    data = DataConfig(str(folder / "digits" / "train"), None, SIZE, 1)
    test = Shards(folder / "digits" / "train")
    return Evaluator(accelerator(), extractor, [test], data, num=num, seed=0, system=system, metrics=wanted), system


def bare(evaluator: Evaluator, system: Sampler) -> None:
    """Take the forward passes of the generator and the extractor."""
    for index in evaluator.ranks.blocks(evaluator.num):
        z = torch.randn(len(index), LATENT)
        with torch.no_grad():
            pixels = to_uint8(system.sample(z))
        evaluator.extractor(pixels)


def child(folder: Path, num: int, width: int, processes: int) -> tuple[float, float]:
    """Return the seconds of an evaluation by some processes, and the peak memory of one of them in MB."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "benchmarks.evaluation", "--child"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), str(num), str(width)], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    took, memory = done.stdout.split()[-2:]
    return float(took), float(memory)


def report_child(folder: Path, num: int, width: int) -> None:
    evaluator, system = evaluator_of(folder, num, NetworkConfig("dcgan", width), ALL)
    evaluator(system)  # a warm-up
    scores = evaluator(system)
    # ru_maxrss would include the parent's peak.
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    memory = int(peak.split()[1]) / 1024
    if evaluator.accelerator.is_main_process:
        print(scores["eval/seconds"], memory, flush=True)
    os._exit(0)


def shares(folder: Path, num: int, width: int, rounds: int) -> Iterator[list[object]]:
    """Yield rows of the CPU seconds of an evaluation and of its forward passes."""
    small = NetworkConfig("dcgan", width)
    for networks, wanted in ((small, ("fid", "is")), (small, ALL), (NetworkConfig(), ALL)):
        evaluator, system = evaluator_of(folder, num, networks, wanted)
        evaluator(system)  # a warm-up
        works = ((evaluator, system), (bare, evaluator, system))
        pairs = [[seconds(*work, clock=time.process_time) for work in works] for _ in range(rounds)]
        whole, alone = (statistics.median(times) for times in zip(*pairs, strict=True))
        share = statistics.median(a / b for a, b in pairs)
        which = [f"{networks.family}, {networks.width}", ", ".join(wanted)]
        yield [*which, f"{whole:.2f}", f"{alone:.2f}", f"{share:.3f}", SHARE]


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--num", type=int, default=10_000, help="samples of an evaluation (10,000)")
    options.add_argument("--width", type=int, default=32, help="width of the DCGAN decoder (32)")
    options.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = options.parse_args()
    num, width = given.num, given.width
    if given.child:
        report_child(Path(given.child[0]), int(given.child[1]), int(given.child[2]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare("digits", folder / "digits")
        data = DataConfig(str(folder / "digits" / "train"), None, SIZE, 1)
        train, test = Shards(folder / "digits" / "train"), Shards(folder / "digits" / "test")
        fit([train], [test], data, folder / "demo-cnn.safetensors")
        print(f"{num:,} samples, width {width}, load {os.getloadavg()[0]:.1f}\n")
        columns = "generator | scores | s | generator and extractor alone, s | share | required"
        print_table(columns, shares(folder, num, width, given.rounds))
        pairs = [[child(folder, num, width, processes)[0] for processes in (1, 2)] for _ in range(given.rounds)]
        one, two = (statistics.median(times) for times in zip(*pairs, strict=True))
        faster = statistics.median(one / two for one, two in pairs)
        cells = [f"{one:.2f}", f"{two:.2f}", f"{faster:.2f}", FASTER]
        print_table("one process, s | two of one thread each, s | times faster | required", [cells])
        counts = (num // 4, num, 4 * num)
        rows = ([f"{count:,}", f"{child(folder, count, width, 1)[1]:.0f}"] for count in counts)
        print_table("samples, all scores | peak memory of a process, MB", rows)


if __name__ == "__main__":
    main()
