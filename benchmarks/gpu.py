"""Training on one GPU: `python -m benchmarks.gpu`; `--device cpu` only tries the benchmark itself.

For each recipe, and for two systems that a CPU would train for days: images a second, milliseconds a step and peak
memory, in fp32 (with TF32 where torch's defaults allow it) and bf16, eager and compiled. The training step works on one
batch in memory: no data is read, and nothing is evaluated. Times are medians over --rounds of --steps steps each,
between two synchronizations, after --warmup steps; memory is the allocator's peak since the system was built.
"""

import argparse
import gc
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import Training, accelerator, parser, print_table, seconds
from trainer.config.parser import configure

FOLDER = Path(__file__).parents[1] / "launch" / "recipes"
RECIPES = {path.stem: f"--config {path}" for path in sorted(FOLDER.glob("*-*.yaml")) if "compare-" not in path.stem}
LARGE_VAEGAN = "--system VAEGAN --system.networks.family residual --system.networks.width 64 --data.channels 3"
SYSTEMS = {
    "ternary-64-pixels": f"{LARGE_VAEGAN} --system.discriminator ternary --system.latent_dim 128 --data.size 64 "
    "--trainer.batch_size 64",
    "tokenizer-256-pixels": f"{LARGE_VAEGAN} --system.networks.latent_stride 16 --system.networks.patches true "
    "--system.latent_dim 8 --system.kl_weight 1e-6 --data.size 256 --trainer.batch_size 16",
    **RECIPES,
}


def measure(settings: list[str], options: argparse.Namespace) -> tuple[float, int, int]:
    """Return the seconds of a step, the peak memory in bytes (0 on a CPU), and the images of a step."""
    torch.compiler.reset()
    gc.collect()  # frees the system measured before
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = configure([*settings, "--data.train", "none", "--evaluate.every", "0"])
    training = Training(config, accelerator(config.trainer.precision, cpu=not cuda))

    def take(count: int) -> None:
        for _ in range(count):
            training()
        if cuda:
            torch.cuda.synchronize()

    take(options.warmup)
    times = [seconds(take, options.steps) / options.steps for _ in range(options.rounds)]
    training.check()
    return statistics.median(times), torch.cuda.max_memory_allocated() if cuda else 0, config.trainer.batch_size


def rows(options: argparse.Namespace) -> Iterator[list[object]]:
    for name in options.only:
        first = 0.0
        for precision in ("no", "bf16"):
            for compiled in [False] if options.eager else [False, True]:
                given = ["--trainer.precision", precision, "--trainer.compile", str(compiled).lower()]
                took, memory, images = measure([*SYSTEMS[name].split(), *given], options)
                first = first or took
                of = [name, "fp32" if precision == "no" else precision, "compiled" if compiled else "eager"]
                figures = [f"{images / took:,.0f}", f"{1e3 * took:.2f}", f"{first / took:.2f}", f"{memory / 2**30:.2f}"]
                yield [*of, *figures]


def main() -> None:
    options = parser(__doc__, rounds=5)
    names = [*SYSTEMS]
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options.add_argument("--eager", action="store_true", help="do not measure compiled networks")
    options.add_argument("--warmup", type=int, default=20, help="steps before the first measurement (20)")
    options.add_argument("--steps", type=int, default=50, help="steps of each measurement (50)")
    given = options.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        options.error("torch finds no NVIDIA GPU; --device cpu only tries the benchmark itself")
    where = torch.cuda.get_device_name() if given.device == "cuda" else "a CPU, which says nothing about a GPU"
    print(f"On {where}, torch {torch.__version__}; medians of {given.rounds} x {given.steps} steps.\n")
    print_table("system | precision | networks | images/s | ms a step | times fp32 eager | peak GiB", rows(given))


if __name__ == "__main__":
    main()
