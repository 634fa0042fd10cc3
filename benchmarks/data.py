"""The data pipeline: throughput, resuming, and the order of a billion samples, compared with webdataset's.

    python -m benchmarks.data [--set 32=datasets/cifar10/train ...]

Everything runs on one core. Throughput is that of batches of 100 decoded uint8 images; it is compared with (a)
libjpeg-turbo alone (simplejpeg) on the same bytes in memory, (b) webdataset's pipeline on the same shards with
shuffle(1000) and torchvision's decode_jpeg, batched, and (c) webdataset's decode("pil") with torchvision's ToTensor.
Ratios are medians over rounds in which all take turns. Resuming is timed from opening the shards to the first batch.
Without --set, the shards hold made images with the spectrum of photographs.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import to_tensor

from benchmarks.common import child, made_images, memory, parser, print_table, seconds
from data.loader import Batches, load
from data.order import Order
from data.processes import allow_open_files
from data.shards import index
from data.shards.reader import Shards

BATCH = 100
ROUND = {32: 40, 64: 40, 256: 4}  # batches of a turn, by the size of the images
# What is required: the share of the decoder's rate, times that of webdataset, and times that of decode("pil").
LEAST = {32: (0.6, 3.5, 6.0), 64: (0.6, 2.5, ""), 256: (0.85, 1.5, "")}
HUGE = (100_000, 10_000)  # shards, samples in each


# ---- throughput


def of_webdataset(shards: Shards, pil: bool = False) -> Iterator[object]:
    """Yield batches of webdataset's pipeline without end; `pil` decodes by its decode("pil")."""

    def decoded(content: bytes) -> torch.Tensor:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)

    while True:
        pipeline = webdataset.WebDataset(shards.paths, shardshuffle=False).shuffle(1000)
        pipeline = pipeline.decode("pil") if pil else pipeline
        yield from pipeline.to_tuple("jpg").map_tuple(to_tensor if pil else decoded).batched(BATCH)


def our_batches(shards: Shards, size: int, steps: range, batch: int = BATCH) -> Iterator[object]:
    order = Order(shards.counts, batch, 0)
    return load(Batches([shards], [order], size, 3, slice(0, batch)), steps, 0)


def throughput(shards: Shards, size: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds a batch of each pipeline, one number a round."""
    order = Order(shards.counts, BATCH, 0)
    ours = our_batches(shards, size, range(10**9))
    theirs = {"webdataset": of_webdataset(shards), "decode(pil)": of_webdataset(shards, pil=True)}
    taken: dict[str, list[float]] = {"ours": [], "decoder": [], **{name: [] for name in theirs}}
    for arriving in (ours, *theirs.values()):
        next(arriving)  # fills its buffers
    gc.freeze()  # otherwise one pipeline's allocations make the collector walk over the buffers of the others
    for turn in range(rounds):
        steps = range(1 + turn * ROUND[size], 1 + (turn + 1) * ROUND[size])
        contents = [content for step in steps for content in shards.images(order[step])[0]]
        taken["ours"].append(timed(islice, ours, len(steps)))
        taken["decoder"].append(timed(map, simplejpeg.decode_jpeg, contents))
        for name, arriving in theirs.items():
            few = max(1, len(steps) // 4)
            taken[name].append(timed(islice, arriving, few) * len(steps) / few)
    return {name: [each / ROUND[size] for each in values] for name, values in taken.items()}


def timed(work: Callable[..., Iterable], *given: Any) -> float:
    """Return the seconds until `work(*given)` has yielded everything."""
    return seconds(lambda: deque(work(*given), maxlen=0))


def compare_throughput(sets: dict[int, Shards], rounds: int) -> Iterator[list[object]]:
    for size, shards in sets.items():
        taken = throughput(shards, size, rounds)
        times = {
            name: statistics.median(other / own for other, own in zip(values, taken["ours"], strict=True))
            for name, values in taken.items()
        }
        length = statistics.mean(len(one) for one in shards.images(np.arange(500))[0])
        row: list[object] = [size, f"{length:,.0f}", f"{BATCH / statistics.median(taken['ours']):,.0f}"]
        shown = (f"{times['decoder']:.2f}", f"{times['webdataset']:.1f}", f"{times['decode(pil)']:.1f}")
        yield row + [cell for pair in zip(shown, LEAST[size], strict=True) for cell in pair]


# ---- resuming


def first_batch(shards: Shards, size: int, epoch: int, part: float) -> float:
    """Return the seconds from opening the shards to the first batch at a part of an epoch."""

    def work() -> Iterator:
        opened = Shards(shards.source)
        step = int((epoch + part) * Order(opened.counts, BATCH, 0).steps_per_epoch)
        return our_batches(opened, size, range(step, step + 1))

    return timed(work)


def skipping(shards: Shards, samples: int) -> float:
    """Return the same for webdataset, which reads the samples before and drops them undecoded."""
    pipeline = webdataset.WebDataset(shards.paths, shardshuffle=False).shuffle(1000).slice(samples, samples + BATCH)
    return timed(map, lambda sample: simplejpeg.decode_jpeg(sample["jpg"]), pipeline)


def compare_resuming(shards: Shards, size: int, rounds: int) -> None:
    pairs = [(first_batch(shards, size, 0, 0), first_batch(shards, size, 1000, 0.5)) for _ in range(rounds)]
    start, middle = (statistics.median(values) for values in zip(*pairs, strict=True))
    late = statistics.median(first_batch(shards, size, 1000, 0.9) for _ in range(rounds))
    places = [int(len(shards) * part) for part in (0, 0.5, 0.9)]
    rows = [
        ["ours, in epoch 1,000", f"{start:.3f} s (step 0)", f"{middle:.3f} s", f"{late:.3f} s"],
        ["webdataset, skipping", *(f"{skipping(shards, place):.2f} s" for place in places)],
    ]
    print_table("time to the first batch | at the start | half into an epoch | at nine tenths", rows)
    ratio = statistics.median(late / early for early, late in pairs)
    print(f"Half into epoch 1,000 over step 0: {ratio:.2f}, required at most 1.2 ({len(shards):,} samples).\n")


# ---- a billion samples


def of_a_billion(path: Path) -> dict[str, float]:
    """Return the seconds and the MB from an index's file to a step, in a process that does nothing else."""
    before, began = memory("VmRSS"), time.perf_counter()
    counts = np.array([shard.nsamples for shard in index.parse_index(path.read_text(), str(path))])
    loaded, between = time.perf_counter(), memory("VmRSS")
    order = Order(counts, 256, 0)
    order[1_234_567]
    first = time.perf_counter() - loaded
    step = timed(map, order.__getitem__, range(2_000_000, 2_010_000)) / 10_000
    sizes = {"index_memory": between - before, "memory": memory("VmRSS") - between}
    return {"index": loaded - began, "first": first, "step": step, **sizes}


def order_rows() -> Iterator[list[object]]:
    shards, samples = HUGE
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.json")
        entries = (index.Shard(f"{i:06d}.tar", samples, 10**9, 1, "0" * 16) for i in range(shards))
        path.write_bytes(index.index_json(entries))
        found = child("benchmarks.data", path)
    times = [f"{found['first']:.3f} s (index read: {found['index']:.2f} s)", f"{found['step'] * 1e3:.3f} ms"]
    sizes = f"{found['memory']:.0f} MB (index: {found['index_memory']:.0f} MB)"
    yield [f"ours, of {shards:,} shards", f"{shards * samples:.0e}", *times, sizes]
    yield ["required", "", "0.2 s", "0.2 ms", "100 MB"]


def main() -> None:
    options = parser(__doc__, rounds=15)
    options.add_argument("--set", action="append", default=[], metavar="SIZE=FOLDER", help="shards of JPEGs of a size")
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(1)
    allow_open_files()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if given.child:
        return print(json.dumps(of_a_billion(given.child)))
    folders = {int(size): folder for size, _, folder in (one.partition("=") for one in given.set)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {
            size: Shards(folders.get(size) or made_images(folder / str(size), size, 50_000 if size == 32 else 5_000))
            for size in ROUND
        }
        required = (
            f"{column} | required" for column in ("of the bare decoder", "times webdataset", 'times decode("pil")')
        )
        print_table(f"pixels | bytes | ours, images/s | {' | '.join(required)}", compare_throughput(sets, given.rounds))
        compare_resuming(sets[32], 32, given.rounds)
        print_table("order | samples | first step | a step | memory", order_rows())


if __name__ == "__main__":
    main()
