"""What evaluations and `trainer.encode` cost beside the forward passes of their networks.

Each takes turns with the bare passes of the same networks on blocks of the same size, with one thread; times are CPU
times, in which nothing is hidden by another core. The weights are random, which costs what trained ones cost.

- Evaluation: `--num` samples of 32x32 pixels by demo-cnn against scikit-learn's digits, with FID and IS, and with all
  scores. Bare: the generator and the extractor. Then the peak memory of a process, for several numbers of samples.
- Encoding, for each `--set SIZE=FOLDER` of shards of images of that size: reading, decoding, encoding, packing and
  writing latents with their statistics, indexing the result. Bare: the posterior of the same images, decoded and scaled
  beforehand.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import accelerator, bar, child, memory, paired, parser, print_table
from data.dataset import Dataset, dataset_fingerprint
from data.loader import read
from data.prepare import prepare
from data.shards.reader import Shards, write
from data.unfinished import begin, complete, locked
from models import VAE, NetworkConfig
from trainer.batch import normalize, to_uint8
from trainer.config.settings import DataConfig
from trainer.distributed.accelerator import keep_freed_memory
from trainer.encode.command import encode
from trainer.encode.writer import LatentWriter, Task
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.extractors.demo_cnn import fit, load_demo_cnn
from trainer.latents import LatentEncoder
from trainer.precision import strict_fp32

LATENT, FEW, ALL = 16, ("fid", "is"), ("fid", "is", "kid", "prdc")
ENCODERS = {
    "dcgan, width 32": NetworkConfig("dcgan"),
    "residual, width 32 (the default)": NetworkConfig(),
    "residual, width 32, map of stride 8": NetworkConfig(latent_stride=8),
    "kl, width 64, stride 8": NetworkConfig("kl", 64, multipliers=(1, 2, 4, 4)),
}


class Sampler(VAE):
    """A VAE of which only samples are scored."""

    def can(self, use: str) -> bool:
        return use == "sample"


def evaluation(folder: Path, num: int, networks: NetworkConfig, wanted: tuple[str, ...]) -> tuple[Evaluator, Sampler]:
    torch.manual_seed(0)
    system = Sampler(32, 1, LATENT, networks).eval().requires_grad_(False)
    extractor = load_demo_cnn(folder / "demo-cnn.safetensors", 1).eval().requires_grad_(False)
    data, test = DataConfig(str(folder / "digits" / "train"), None, 32, 1), Shards(folder / "digits" / "test")
    return Evaluator(accelerator(), extractor, [test], data, num=num, seed=0, system=system, metrics=wanted), system


def bare_evaluation(evaluator: Evaluator, system: Sampler) -> None:
    for index in evaluator.ranks.blocks(evaluator.num):
        with torch.no_grad():
            pixels = to_uint8(system.sample(torch.randn(len(index), LATENT)))
        evaluator.extractor(pixels)


def evaluation_rows(folder: Path, num: int, rounds: int) -> Iterator[list[object]]:
    small = NetworkConfig("dcgan")
    for networks, wanted in ((small, FEW), (small, ALL), (NetworkConfig(), ALL)):
        whole = evaluation(folder, num, networks, wanted)
        took, alone, ratio = paired(lambda w=whole: w[0](w[1]), lambda w=whole: bare_evaluation(*w), rounds)
        name = f"{networks.family}, width {networks.width}"
        yield [name, ", ".join(wanted), f"{took:.2f}", f"{alone:.2f}", *bar(1 / ratio, 1.1, most=True)]


def encode_as_the_command_does(encoder: LatentEncoder, shards: Shards) -> None:
    with tempfile.TemporaryDirectory() as name, locked(out := Path(name) / "out") as unfinished:
        begin(unfinished, {})
        writer = LatentWriter(encoder, unfinished, mean_only=False, mirror=False, dtype="fp16", form="safetensors")
        tasks = [Task("train", shards, i) for i in range(len(shards.shards))]
        encode(writer, tasks, 0, accelerator())
        splits = {"train": writer.describe(tasks)}
        found = Dataset(fingerprint=dataset_fingerprint([], splits), classes=[], splits=splits, rejected=[])
        complete(unfinished, out, found)


def encoding_rows(size: int, source: Shards, num: int, rounds: int) -> Iterator[list[object]]:
    contents, labels = source.images(positions := np.arange(num) % len(source))
    samples = ({"__key__": f"{i:08d}", "jpg": contents[i], "cls": str(labels[i])} for i in range(len(positions)))
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), samples)
        shards = Shards(Path(name))
        for kind, networks in ENCODERS.items():
            system = VAE(size, 3, 4 if networks.stride else 32, networks).eval().requires_grad_(False)
            encoder = LatentEncoder(system, size, 3)
            images = read(shards, np.arange(num), size, 3).image
            blocks = [normalize(part) for part in images.split(encoder.block)]

            def bare(system: VAE = system, blocks: list[torch.Tensor] = blocks) -> None:
                with strict_fp32(torch.device("cpu")), torch.no_grad():
                    for block in blocks:
                        system.posterior(block)

            took, _, share = paired(lambda e=encoder: encode_as_the_command_does(e, shards), bare, rounds)
            yield [size, kind, f"{num / took:.4g}", *bar(share, 0.95)]


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--num", type=int, default=10_000, help="samples of an evaluation (10,000)")
    options.add_argument("--images", type=int, default=1_024, help="images that are encoded at once (1,024)")
    options.add_argument(
        "--set", metavar="SIZE=FOLDER", action="append", default=[], help="shards to encode; repeatable"
    )
    options.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    num, images = (50, 16) if given.small else (given.num, given.images)
    if given.child:
        evaluator, system = evaluation(Path(given.child[0]), int(given.child[1]), NetworkConfig("dcgan"), ALL)
        evaluator(system)
        return print(json.dumps(memory()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare("digits", folder / "digits")
        data = DataConfig(str(folder / "digits" / "train"), None, 32, 1)
        shards = [[Shards(folder / "digits" / split)] for split in ("train", "test")]
        fit(*shards, data, folder / "demo-cnn.safetensors")
        columns = "generator | scores | s | generator and extractor alone, s | ratio | required"
        print_table(columns, evaluation_rows(folder, num, given.rounds))
        counts = (num // 4, num, 4 * num)
        rows = ([f"{count:,}", f"{child('benchmarks.overhead', folder, count):.0f}"] for count in counts)
        print_table("samples, all scores | peak memory of a process, MB", rows)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for size, _, place in (one.partition("=") for one in given.set):
        head = "pixels | networks | images/s | of the bare encoder | required"
        print_table(head, encoding_rows(int(size), Shards(place), images, given.rounds))


if __name__ == "__main__":
    main()
