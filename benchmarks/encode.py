"""The rate of `python -m trainer.encode` over that of the bare encoder: `python -m benchmarks.encode --set 64=FOLDER`.

FOLDER has WebDataset shards of images that have been cropped to that size. One process on one core encodes the first
images as the command does: it reads and decodes them, encodes, packs and writes latents with their statistics, and
completes the data set. It takes turns with the bare encoder: the posterior of the same blocks, decoded and scaled
beforehand, in the same precision. The clock is the process's CPU time, in which nothing is hidden by another core. The
weights are random, which costs what trained ones cost.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import accelerator, parser, print_table, seconds
from data.dataset import Dataset, dataset_fingerprint
from data.loader import read
from data.shards.reader import Shards, write
from data.unfinished import begin, complete, locked
from models import VAE, NetworkConfig
from trainer.batch import normalize
from trainer.distributed.accelerator import keep_freed_memory
from trainer.encode.command import encode
from trainer.encode.writer import LatentWriter, Task
from trainer.latents import LatentEncoder
from trainer.precision import strict_fp32

NETWORKS = {
    "dcgan, width 32": NetworkConfig("dcgan"),
    "residual, width 32 (the default)": NetworkConfig(),
    "residual, width 32, map of stride 8": NetworkConfig(latent_stride=8),
    "kl, width 64, stride 8": NetworkConfig("kl", 64, multipliers=(1, 2, 4, 4)),
}
SHARE = 0.95  # of the bare encoder's rate


def command(encoder: LatentEncoder, shards: Shards, out: Path) -> None:
    """Encode shards as the command does, without its start."""
    with locked(out) as unfinished:
        begin(unfinished, {})
        writer = LatentWriter(encoder, unfinished, mean_only=False, mirror=False, dtype="fp16", form="safetensors")
        tasks = [Task("train", shards, i) for i in range(len(shards.shards))]
        encode(writer, tasks, 0, accelerator())
        splits = {"train": writer.describe(tasks)}
        found = Dataset(fingerprint=dataset_fingerprint([], splits), classes=[], splits=splits, rejected=[])
        complete(unfinished, out, found)


def bare(encoder: LatentEncoder, blocks: list[torch.Tensor]) -> None:
    with strict_fp32(torch.device("cpu")), torch.no_grad():
        for block in blocks:
            encoder.system.posterior(block)


def measure(networks: NetworkConfig, size: int, source: Shards, rounds: int, turn: float, folder: Path) -> list[str]:
    """Return a row of the table: images that take about `turn` seconds are encoded in each round."""
    encoder = LatentEncoder(VAE(size, 3, 4 if networks.stride else 32, networks).eval().requires_grad_(False), size, 3)
    block = [normalize(read(source, np.arange(encoder.block), size, 3).image)]
    bare(encoder, block)  # the first is slower
    num = max(1, round(turn / seconds(bare, encoder, block, clock=time.process_time))) * encoder.block
    positions = np.arange(num) % len(source)
    contents, labels = source.images(positions)
    samples = ({"__key__": f"{i:08d}", "jpg": contents[i], "cls": str(labels[i])} for i in range(num))
    write(folder / "images", samples)
    shards = Shards(folder / "images")
    blocks = [normalize(part) for part in read(shards, np.arange(num), size, 3).image.split(encoder.block)]
    shares, rates = [], []
    for i in range(rounds):
        alone = seconds(bare, encoder, blocks, clock=time.process_time)
        whole = seconds(command, encoder, shards, folder / f"{i}", clock=time.process_time)
        shares.append(alone / whole)
        rates.append(num / whole)
    return [f"{statistics.median(rates):.4g}", f"{statistics.median(shares):.3f}", str(SHARE)]


def main() -> None:
    options = parser(__doc__, rounds=5)
    sets = "shards of images of a size; several may be given"
    options.add_argument("--set", metavar="SIZE=FOLDER", action="append", required=True, help=sets)
    options.add_argument("--turn", type=float, default=10, help="seconds of CPU of a turn (10)")
    given = options.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    keep_freed_memory()

    def rows():
        for one in given.set:
            size, _, place = one.partition("=")
            for name, networks in NETWORKS.items():
                with tempfile.TemporaryDirectory() as folder:
                    cells = measure(networks, int(size), Shards(place), given.rounds, given.turn, Path(folder))
                yield [size, name, *cells]

    print_table("pixels | networks | images/s | of the bare encoder | required", rows())


if __name__ == "__main__":
    main()
