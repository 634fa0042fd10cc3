"""Peak memory of a training step, and how speed and memory grow with the work.

Each row is a fresh process with one CPU thread that takes steps of a binary VAEGAN (dcgan, no R1) on a batch in memory:
images a second of CPU time (median over `--rounds` steps), and the MB that the steps add to the process at their peak
(peak resident memory, less that before the first step: Python, torch, weights and the batch). All processes keep freed
memory, as runs do.

- Memory: `TrainStep` with shared passes, as by default, and without, over the plain loop of benchmarks/plain.py.
- Growth: one of width, resolution and batch at a time; the others are 32, 64 pixels and 64 images, or 16 images where
  the resolution grows. `python -m benchmarks.scaling` measures the growth over processes.
- Samples: the loader of a set of 1,000-image shards, `images/s` of batches of 64 in one process, and the MB that the
  process needs more than with the smallest set. The shards are links to one, so the disk is not measured.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from msgspec.structs import replace

from benchmarks.common import accelerator, bar, child, made_images, memory, parser, print_table, seconds
from benchmarks.plain import PlainLoop
from data.loader import Batches, load
from data.order import Order
from data.processes import allow_open_files
from data.shards.index import index_folder, index_json, table_path
from data.shards.reader import Shards
from models import VAEGAN
from trainer.batch import Batch
from trainer.config.parser import configure
from trainer.distributed.accelerator import keep_freed_memory
from trainer.step import TrainStep

SYSTEM = "--system VAEGAN --system.networks.family dcgan --system.binary.r1_weight 0 --data.train none"
BASE = {"width": 32, "size": 64, "batch": 64}
GROWTH = {"width": (8, 16, 32, 64, 128), "size": (32, 64, 128, 256), "batch": (1, 4, 16, 64, 256)}
SAMPLES = (10_000, 100_000, 1_000_000, 10_000_000)


def step_in_child(way: str, rounds: str, width: str, size: str, batch: str) -> dict[str, float]:
    """Return the images a second and the MB of steps: `shared`, `replayed` passes, or of the `plain` loop."""
    torch.set_num_threads(1)
    keep_freed_memory()
    words = f"{SYSTEM} --system.networks.width {width} --data.size {size} --trainer.batch_size {batch}"
    system, image = configure(words.split()).system(), torch.rand(int(batch), 3, int(size), int(size)) * 2 - 1
    assert isinstance(system, VAEGAN)
    if way == "plain":
        plain = PlainLoop(system)
        step = lambda: plain.step(image)  # noqa: E731
    else:
        ours = TrainStep(accelerator(), system, 1, share_passes=way == "shared")
        rows = [Batch((image,), slice(0, len(image)), len(image), seed=0, step=0)]
        step = lambda: ours(rows, 0)  # noqa: E731
    before = memory("VmRSS")
    took = [seconds(step, clock=time.process_time) for _ in range(int(rounds) + 1)][1:]
    return {"rate": len(image) / statistics.median(took), "memory": memory() - before}


def samples_in_child(folder: str, rounds: str) -> dict[str, float]:
    """Return the images a second of the loader, and the MB of the process."""
    allow_open_files()
    shards = Shards(folder)
    batches = load(Batches([shards], [Order(shards.counts, 64, 0)], 32, 3, slice(0, 64)), range(10**6), 0)
    took = [seconds(lambda: list(islice(batches, 10)), clock=time.process_time) for _ in range(int(rounds) + 1)][1:]
    return {"rate": 640 / statistics.median(took), "memory": memory()}


def step(way: str, rounds: int, **sizes: int) -> dict[str, float]:
    return child("benchmarks.growth", step_in_child.__name__, way, rounds, *(BASE | sizes).values())


def memory_rows(given: argparse.Namespace) -> Iterator[list[object]]:
    for batch in (2,) if given.small else (64, 256):
        found = {way: step(way, 2, batch=batch)["memory"] for way in ("plain", "shared", "replayed")}
        for way, most in (("shared", 1.3), ("replayed", 1.05)):
            megabytes = [f"{found[each]:.0f}" for each in (way, "plain")]
            yield [batch, f"{way} passes", *megabytes, *bar(found[way] / found["plain"], most, most=True)]


def growth_rows(given: argparse.Namespace) -> Iterator[list[object]]:
    for name, values in GROWTH.items():
        for value in values[:1] if given.small else values:
            found = step("shared", given.rounds, **{"batch": 16} | {name: value} if name == "size" else {name: value})
            yield [name, value, f"{found['rate']:.4g}", f"{found['memory']:.0f}"]


def samples_rows(given: argparse.Namespace) -> Iterator[list[object]]:
    smallest = None
    with tempfile.TemporaryDirectory() as name:
        one = made_images(Path(name) / "one", 32, 1000) / "00000.tar"
        (entry,), _ = index_folder(one.parent)
        for samples in SAMPLES[:1] if given.small else SAMPLES:
            folder = Path(name) / str(samples)
            folder.mkdir()
            urls = [f"{i:05d}.tar" for i in range(samples // 1000)]
            for url in urls:
                os.link(one, folder / url)
                os.link(table_path(one), table_path(folder / url))
            (folder / "index.json").write_bytes(index_json(replace(entry, url=url) for url in urls))
            found = child("benchmarks.growth", samples_in_child.__name__, folder, given.rounds)
            smallest = smallest or found["memory"]
            yield [f"{samples:,}", f"{found['rate']:,.0f}", f"{found['memory'] - smallest:.0f}"]


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        work, *rest = given.child
        print(json.dumps({each.__name__: each for each in (step_in_child, samples_in_child)}[work](*rest)))
        return
    print_table("batch | ours | MB a step | the plain loop's | ratio | required", memory_rows(given))
    print_table("what grows | to | images/s | MB a step", growth_rows(given))
    print_table("samples in the set | images/s | MB more", samples_rows(given))


if __name__ == "__main__":
    main()
