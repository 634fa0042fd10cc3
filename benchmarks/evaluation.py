"""What an evaluation costs beside what it cannot do without: `python -m benchmarks.evaluation`.

A run's evaluation of samples, by demo-cnn, one CPU thread a process: FID and IS alone, and with KID, precision, recall,
density and coverage. The bare sum is the time of the same generator and extractor on blocks of the same size, without
anything else; they take turns with the evaluations, and the share is a median over rounds. Then two processes of one
thread each against one, in pairs. Memory is the peak of a process that evaluates, for several counts of samples.

The generator is a DCGAN decoder of `--width` for 32x32 images of one channel, latent 16, and in the first table the
default networks' residual one, too; real images are scikit-learn's digits. Random weights cost what trained ones do.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

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
    """A VAE that is scored by its samples alone."""

    def can(self, use: str) -> bool:
        return use == "sample"


def evaluator_of(folder: Path, num: int, networks: NetworkConfig, wanted: tuple[str, ...]) -> tuple[Evaluator, Sampler]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    system = Sampler(SIZE, 1, LATENT, networks).eval().requires_grad_(False)
    extractor = load_demo_cnn(folder / "demo-cnn.safetensors", 1).eval().requires_grad_(False)
    data = DataConfig(str(folder / "digits" / "train"), None, SIZE, 1)
    accelerator = Accelerator(cpu=True)
    test = Shards(folder / "digits" / "train")
    return Evaluator(accelerator, extractor, [test], data, num=num, seed=0, system=system, metrics=wanted), system


def bare(evaluator: Evaluator, system: Sampler) -> None:
    """The generator's and the extractor's forward passes."""
    for index in evaluator.ranks.blocks(evaluator.num):
        z = torch.randn(len(index), LATENT)
        with torch.no_grad():
            pixels = to_uint8(system.sample(z))
        evaluator.extractor(pixels)


def seconds(work: Callable[[], object]) -> float:
    """Of the processor's time, all threads', which others on the machine take less from."""
    began = time.process_time()
    work()
    return time.process_time() - began


def child(folder: Path, num: int, width: int, processes: int) -> tuple[float, float]:
    """Seconds of an evaluation on some processes, and the peak of one's memory in MB."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "benchmarks.evaluation"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--child", str(folder), str(num), str(width)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    took, memory = done.stdout.split()[-2:]
    return float(took), float(memory)


def report_child(folder: Path, num: int, width: int) -> None:
    evaluator, system = evaluator_of(folder, num, NetworkConfig("dcgan", width), ALL)
    evaluator(system)  # once, to warm up
    scores = evaluator(system)
    # Not ru_maxrss, in which a process has that of its parent.
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    memory = int(peak.split()[1]) / 1024
    if evaluator.accelerator.is_main_process:
        print(scores["eval/seconds"], memory, flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        folder, num, width = settings.child
        report_child(Path(folder), int(num), int(width))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare("digits", folder / "digits")
        data = DataConfig(str(folder / "digits" / "train"), None, SIZE, 1)
        train, test = Shards(folder / "digits" / "train"), Shards(folder / "digits" / "test")
        fit([train], [test], data, folder / "demo-cnn.safetensors")
        measure(folder, settings.num, settings.width, settings.rounds)


def measure(folder: Path, num: int, width: int, rounds: int) -> None:
    print(f"{num:,} samples, width {width}, load {os.getloadavg()[0]:.1f}\n")
    print("| generator | scores | s | generator and extractor alone, s | share | required |\n|---|---|---|---|---|---|")
    small = NetworkConfig("dcgan", width)
    for networks, wanted in ((small, ("fid", "is")), (small, ALL), (NetworkConfig(), ALL)):
        evaluator, system = evaluator_of(folder, num, networks, wanted)
        turns = [partial(evaluator, system), partial(bare, evaluator, system)]
        turns[0]()
        pairs = [[seconds(turn) for turn in turns] for _ in range(rounds)]
        whole, alone = (statistics.median(times) for times in zip(*pairs, strict=True))
        share = statistics.median(a / b for a, b in pairs)
        which = f"{networks.family}, {networks.width} | {', '.join(wanted)}"
        print(f"| {which} | {whole:.2f} | {alone:.2f} | {share:.3f} | {SHARE} |", flush=True)
    pairs = [(child(folder, num, width, 1)[0], child(folder, num, width, 2)[0]) for _ in range(rounds)]
    faster = statistics.median(one / two for one, two in pairs)
    one, two = (statistics.median(times) for times in zip(*pairs, strict=True))
    print("\n| one process, s | two, s | times faster | required |\n|---|---|---|---|")
    print(f"| {one:.2f} | {two:.2f} | {faster:.2f} | {FASTER} |\n")
    print("| samples | peak memory, MB |\n|---|---|")
    for count in (num // 4, num, 4 * num):
        print(f"| {count:,} | {child(folder, count, width, 1)[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
