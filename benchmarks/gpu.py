"""Training on one GPU: `python -m benchmarks.gpu`, or with --device cpu to try it.

For each recipe, and for two that a CPU would take days for: images a second, milliseconds a step and peak memory, in
fp32 (convolutions may take TF32, as torch has it by default) and bf16, eager and compiled. A step is
`trainer.step.TrainStep` and the average of weights, on one batch in memory: no data, no evaluation. Times are medians
over --rounds of --steps steps each, between two synchronizations, after --warmup steps; memory is the allocator's peak
since the system was built.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from trainer.batch import Batch
from trainer.config.parser import Config, configure
from trainer.ema import EMA
from trainer.step import TrainStep

RECIPES = sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("*-*.yaml"))
RESIDUAL = "--system.networks.family residual --data.channels 3"
LARGE = {
    "ternary-64-pixels": f"--system VAEGAN --system.discriminator ternary {RESIDUAL} --system.networks.width 64 "
    "--system.latent_dim 128 --data.size 64 --trainer.batch_size 64",
    "tokenizer-256-pixels": f"--system VAEGAN {RESIDUAL} --system.networks.width 64 --system.networks.latent_stride 16 "
    "--system.networks.patches true --system.latent_dim 8 --system.kl_weight 1e-6 --data.size 256 "
    "--trainer.batch_size 16",
}
WAYS = [("no", False), ("no", True), ("bf16", False), ("bf16", True)]


class Result(NamedTuple):
    seconds: float  # a step
    memory: int  # bytes; 0 on a CPU


def arguments(name: str) -> Sequence[str]:
    return (
        LARGE[name].split() if name in LARGE else ["--config", str(next(path for path in RECIPES if path.stem == name))]
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(config: Config, precision: str, compiled: bool, cpu: bool, warmup: int, steps: int, rounds: int) -> Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    device, settings, data = accelerator.device, config.trainer, config.data
    if device.type == "cuda":
        gc.collect()  # the system before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    system = config.system().to(device)
    ema = EMA(system, settings.ema_half_life, settings.batch_size, settings.ema_ramp)
    for name, network in system.networks().items():
        if compiled and not name.startswith("discriminator"):
            network.compile()
    train_step = TrainStep(accelerator, system, 1_000_000)
    shape = (settings.batch_size, data.channels, data.size, data.size)
    images = tuple(torch.rand(shape, device=device) * 2 - 1 for _ in range(system.domains))

    def take(first: int, count: int) -> None:
        for step in range(first, first + count):
            train_step([Batch(images, slice(0, len(images[0])), len(images[0]), 0, step)], step)
            ema.update(step + 1)

    take(0, warmup)
    times = []
    for i in range(rounds):
        wait(device)
        began = time.perf_counter()
        take(warmup + i * steps, steps)
        wait(device)
        times.append((time.perf_counter() - began) / steps)
    if failed := train_step.failed():
        raise SystemExit(f"step {failed[0]}: player {failed[1].name} is not finite: its time would mean nothing")
    return Result(statistics.median(times), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def rows(name: str, options: argparse.Namespace) -> list[str]:
    config = configure([*arguments(name), "--data.train", "unread", "--evaluate.every", "0"])
    table: list[str] = []
    first = 0.0
    for precision, compiled in WAYS:
        if compiled and options.eager:
            continue
        cpu = options.device == "cpu"
        found = measure(config, precision, compiled, cpu, options.warmup, options.steps, options.rounds)
        first = first or found.seconds
        table.append(
            f"| {name} | {'fp32' if precision == 'no' else precision} | {'compiled' if compiled else 'eager'} "
            f"| {config.trainer.batch_size / found.seconds:,.0f} | {1000 * found.seconds:.2f} "
            f"| {first / found.seconds:.2f} | {found.memory / 2**30:.2f} |"
        )
        print(table[-1], flush=True)
    return table


def main() -> None:
    names = [*LARGE, *(path.stem for path in RECIPES if not path.stem.startswith("compare-"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a Markdown file to write the table to")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no NVIDIA GPU: --device cpu only tries the benchmark itself")
    where = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU, which says nothing about a GPU"
    head = [
        f"On {where}, torch {torch.__version__}; medians of {options.rounds} x {options.steps} steps.",
        "",
        "| system | precision | networks | images/s | ms a step | times fp32 eager | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    text = "\n".join([*head, *(row for name in options.only for row in rows(name, options))])
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
