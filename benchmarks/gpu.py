"""Training on one GPU: `python -m benchmarks.gpu`; `--device cpu` only tries the benchmark itself.

For each recipe whose weights are here, and for three systems that a CPU would train for days: images a second,
milliseconds a step, TFLOP/s of the passes that the mathematics needs, their share of the GPU's peak (MFU,
`trainer/flops.py`) and peak memory, in fp32 (with TF32 where torch's defaults allow it), bf16 and fp16: eager in
torch's default memory format, eager in channels_last, which is what runs do, compiled, and compiled with CUDA graphs.
The training step works on one batch in memory: no data is read, and nothing is evaluated. Times are medians over
--rounds of --steps steps each, between two synchronizations, after --warmup steps; memory is the allocator's peak since
the system was built.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import Training, accelerator, parser, print_table, seconds
from trainer.config.parser import configure
from trainer.errors import RunError
from trainer.flops import StepFlops, peak_tflops

FOLDER = Path(__file__).parents[1] / "launch" / "recipes"
RECIPES = {path.stem: f"--config {path}" for path in sorted(FOLDER.glob("*.yaml")) if "compare-" not in path.stem}
LARGE_VAEGAN = "--system VAEGAN --system.networks.family residual --system.networks.width 64 --data.channels 3"
SYSTEMS = {
    "ternary-64-pixels": f"{LARGE_VAEGAN} --system.discriminator ternary --system.latent_dim 128 --data.size 64 "
    "--trainer.batch_size 64",
    "tokenizer-256-pixels": f"{LARGE_VAEGAN} --system.networks.latent_stride 16 --system.networks.patches true "
    "--system.latent_dim 8 --system.kl_weight 1e-6 --data.size 256 --trainer.batch_size 16",
    # The network of VA-VAE (Yao et al. 2025) and of LDM's f16 autoencoders.
    "va-vae-f16-256-pixels": "--system VAEGAN --data.channels 3 --data.size 256 --trainer.batch_size 16 "
    "--system.networks.family kl --system.networks.width 128 --system.networks.multipliers [1,1,2,2,4] "
    "--system.networks.patches true --system.latent_dim 32 --system.kl_weight 1e-6 --system.binary.r1_weight 0",
    **RECIPES,
}
VARIANTS = {"default format": "false", "channels_last": "false", "compiled": "true", "CUDA graphs": "cuda_graphs"}


def measure(settings: list[str], variant: str, options: argparse.Namespace) -> list[object]:
    """Return the seconds of a step, and the figures of a row."""
    torch.compiler.reset()
    gc.collect()  # frees the system measured before
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = configure(
        [*settings, "--trainer.compile", VARIANTS[variant], "--data.train", "none", "--evaluate.every", "0"]
    )
    images, precision = config.trainer.batch_size, config.trainer.precision
    training = Training(config, accelerator(precision, cpu=not cuda), variant != "default format")

    def take(count: int) -> None:
        for _ in range(count):
            training()
        if cuda:
            torch.cuda.synchronize()

    take(options.warmup)
    first = training.done
    took = statistics.median(seconds(take, options.steps) / options.steps for _ in range(options.rounds))
    training.check()
    tflops = StepFlops(config, images)(range(first, training.done)) / took / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(), precision) if cuda else None
    share, memory = f"{tflops / peak:.2f}" if peak else "", torch.cuda.max_memory_allocated() if cuda else 0
    return [took, f"{images / took:,.0f}", f"{1e3 * took:.2f}", f"{tflops:.2f}", share, f"{memory / 2**30:.2f}"]


def rows(options: argparse.Namespace) -> Iterator[list[object]]:
    for name in options.only:
        first = 0.0
        for precision in ("no", "bf16", "fp16") if options.device == "cuda" else ("no", "bf16"):
            for variant, compiled in VARIANTS.items():
                if compiled != "false" and (options.eager or (compiled == "cuda_graphs" and options.device == "cpu")):
                    continue
                row = [name, "fp32" if precision == "no" else precision, variant]
                try:
                    took, *figures = measure(
                        [*SYSTEMS[name].split(), "--trainer.precision", precision], variant, options
                    )
                except (ValueError, OSError, RunError, torch.OutOfMemoryError, SystemExit) as error:
                    print(f"{name}, {variant}: {error}", file=sys.stderr)
                    yield [*row, "not measured", *[""] * 5]
                    continue
                assert isinstance(took, float)
                first = first or took
                yield [*row, *figures, f"{first / took:.2f}"]


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
    print_table(
        "system | precision | networks | images/s | ms a step | TFLOP/s | MFU | peak GiB | times the first", rows(given)
    )


if __name__ == "__main__":
    main()
