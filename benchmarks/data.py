"""Input beside the bare decoder and webdataset, resuming, and the order of a billion samples.

    python -m benchmarks.data [--set 32=datasets/cifar10/train ...] [--streaming PYTHON] [--out FILE.md]

All on one core. Throughput: batches of 100 decoded uint8 images against (a) libjpeg-turbo alone (simplejpeg) on the
same bytes in memory, (b) webdataset's pipeline on these shards with shuffle(1000), torchvision's decode_jpeg, batched,
(c) webdataset's decode("pil") with torchvision's ToTensor; medians of the ratios of rounds in which all take turns.
Resuming: from nothing to the first batch at a position. `--streaming` names a Python that has mosaicml-streaming, whose
partition of samples is timed beside our order. Without --set, shards of images with a natural spectrum are made.
"""

import argparse
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import to_tensor

from data.loader import Batches, load
from data.order import Order
from data.processes import allow_open_files
from data.shards import index
from data.shards.reader import Shards, write

BATCH = 100
ROUND = {32: 40, 64: 40, 256: 4}  # batches that each takes at a turn
LEAST = {32: (0.6, 3.5), 64: (0.6, 2.5), 256: (0.85, 1.5)}  # of the decoder; times webdataset
LEAST_PIL = 6.0  # times decode("pil"), at 32 pixels
HUGE = (100_000, 10_000)  # shards, samples in each


def natural(size: int, rng: np.random.Generator) -> bytes:
    """A JPEG of random pixels whose spectrum falls as that of photographs does, as 1/f."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = np.inf
    noise = np.fft.fft2(rng.standard_normal((3, size, size))) / frequency
    pixels = np.fft.ifft2(noise).real
    pixels = pixels.mean(0) + 0.4 * pixels  # colours that go together
    pixels = (127.5 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "JPEG", quality=90)
    return file.getvalue()


def made(folder: Path, size: int, count: int) -> Path:
    rng = np.random.default_rng(size)
    some = [natural(size, rng) for _ in range(min(count, 2000))]
    write(folder, ({"__key__": f"{i:08d}", "jpg": some[i % len(some)], "cls": "0"} for i in range(count)), 5000)
    return folder


# ---- throughput


def forever(pipeline: Callable[[], Iterator]) -> Iterator:
    while True:
        yield from pipeline()


def of_webdataset(shards: Shards) -> Iterator[object]:
    def decoded(content: bytes) -> torch.Tensor:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)

    return iter(
        webdataset.WebDataset(shards.paths, shardshuffle=False)
        .shuffle(1000)
        .to_tuple("jpg")
        .map_tuple(decoded)
        .batched(BATCH)
    )


def of_pil(shards: Shards) -> Iterator[object]:
    return iter(
        webdataset.WebDataset(shards.paths, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(to_tensor)
        .batched(BATCH)
    )


def throughput(shards: Shards, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a batch of each, a number a round."""
    order = Order(shards.counts, BATCH, 0)
    batches = Batches([shards], [order], size, 3, slice(0, BATCH))
    ours = load(batches, range(10**9), 0)
    theirs = {"webdataset": forever(lambda: of_webdataset(shards)), "decode(pil)": forever(lambda: of_pil(shards))}
    seconds: dict[str, list[float]] = {"ours": [], "decoder": [], **{name: [] for name in theirs}}
    for arriving in (ours, *theirs.values()):
        next(arriving)  # fills their buffers
    gc.freeze()  # else whoever allocates pays for the collector's walks over the others' buffers
    for turn in range(rounds):
        steps = range(1 + turn * ROUND[size], 1 + (turn + 1) * ROUND[size])
        contents = [shards.images(order[step])[0] for step in steps]
        seconds["ours"].append(timed(islice, ours, len(steps)))
        seconds["decoder"].append(timed(map, decode_all, contents))
        for name, arriving in theirs.items():
            few = max(1, len(steps) // 4)
            seconds[name].append(timed(islice, arriving, few) * len(steps) / few)
    return {name: [each / ROUND[size] for each in values] for name, values in seconds.items()}


def decode_all(contents: list[bytes]) -> None:
    for content in contents:
        simplejpeg.decode_jpeg(content)


def timed(work: Callable[..., Iterable], *given: Any) -> float:
    """Seconds until all that `work` gives has come."""
    began = time.perf_counter()
    for _ in work(*given):
        pass
    return time.perf_counter() - began


def beyond_the_window(shards: Shards, size: int, folder: Path) -> str:
    """Images a second, and of the decoder's, of a set that is larger than the window: 1,000 shards of 1,000 images."""
    samples = ({"__key__": f"{i:04d}", "jpg": shards.image(i)} for i in range(1000))
    write(folder / "one", samples)
    (folder / "many").mkdir()
    for i in range(1000):
        os.link(folder / "one" / "00000.tar", folder / "many" / f"{i:05d}.tar")
    many = Shards(folder / "many")
    order = Order(many.counts, 256, 0)
    assert many.counts.sum() > order.window
    arriving = load(Batches([many], [order], size, 3, slice(0, 256)), range(10**6), 0)
    for _ in islice(arriving, 20):
        pass
    contents = many.images(order[10])[0]
    ours, bare = [], []
    for _ in range(9):
        ours.append(timed(islice, arriving, 10) / 10)
        bare.append(timed(map, simplejpeg.decode_jpeg, contents))
    share = statistics.median(b / o for b, o in zip(bare, ours, strict=True))
    return (
        f"1,000 shards, beyond the window: {256 / statistics.median(ours):,.0f} images/s, {share:.2f} of the decoder."
    )


def compare_throughput(sets: dict[int, Shards], rounds: int) -> list[str]:
    rows = [
        "| pixels | bytes | ours, images/s | of the bare decoder | required | times webdataset | required | "
        'times decode("pil") | required |',
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, shards in sets.items():
        seconds = throughput(shards, size, rounds)
        times = {
            name: statistics.median(other / own for other, own in zip(seconds[name], seconds["ours"], strict=True))
            for name in seconds
        }
        length = statistics.mean(len(one) for one in shards.images(np.arange(500))[0])
        rate = BATCH / statistics.median(seconds["ours"])
        least, peer = LEAST[size]
        pil = LEAST_PIL if size == 32 else ""
        rows.append(
            f"| {size} | {length:,.0f} | {rate:,.0f} | {times['decoder']:.2f} | {least} | {times['webdataset']:.1f} | "
            f"{peer} | {times['decode(pil)']:.1f} | {pil} |"
        )
    return rows


# ---- resuming


def first_batch(shards: Shards, size: int, epoch: int, part: float) -> float:
    """Seconds from nothing to the first batch at a part of an epoch."""

    def work() -> Iterator:
        opened = Shards(shards.source)
        order = Order(opened.counts, BATCH, 0)
        step = int((epoch + part) * order.steps_per_epoch)
        return load(Batches([opened], [order], size, 3, slice(0, BATCH)), range(step, step + 1), 0)

    return timed(work)


def skipping(shards: Shards, samples: int) -> float:
    """webdataset's way: read, and throw away undecoded, what was seen."""
    pipeline = webdataset.WebDataset(shards.paths, shardshuffle=False).shuffle(1000).slice(samples, samples + BATCH)
    return timed(map, lambda sample: simplejpeg.decode_jpeg(sample["jpg"]), pipeline)


def stateful(shards: Shards, samples: int) -> float | None:
    """torchdata's way: its loader's state, loaded."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        return None

    def made() -> "StatefulDataLoader":
        pipeline = webdataset.WebDataset(shards.paths, shardshuffle=False).shuffle(1000).to_tuple("jpg")
        return StatefulDataLoader(pipeline.map_tuple(simplejpeg.decode_jpeg).batched(BATCH), batch_size=None)

    loader = made()
    for _ in islice(loader, samples // BATCH):
        pass
    state = loader.state_dict()

    def resumed() -> Iterator:
        again = made()
        again.load_state_dict(state)
        return islice(again, 1)

    return timed(resumed)


def compare_resuming(shards: Shards, size: int, rounds: int) -> list[str]:
    pairs = [(first_batch(shards, size, 0, 0), first_batch(shards, size, 1000, 0.5)) for _ in range(rounds)]
    start, middle = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(late / early for early, late in pairs)
    rows = ["| time to the first batch | at the start | half into an epoch | at nine tenths |", "|---|---|---|---|"]
    late = statistics.median(first_batch(shards, size, 1000, 0.9) for _ in range(rounds))
    rows.append(f"| ours, in epoch 1,000 | {start:.3f} s (step 0) | {middle:.3f} s | {late:.3f} s |")
    places = [int(len(shards) * part) for part in (0, 0.5, 0.9)]
    rows.append("| webdataset, skipping | " + " | ".join(f"{skipping(shards, place):.2f} s" for place in places) + " |")
    found = [stateful(shards, place) for place in places]
    cells = ["torchdata is not installed" if one is None else f"{one:.2f} s" for one in found]
    rows.append("| torchdata's StatefulDataLoader over it | " + " | ".join(cells) + " |")
    return [
        *rows,
        "",
        f"Half into epoch 1,000 over step 0: {ratio:.2f}, required at most 1.2 ({len(shards):,} samples).",
    ]


# ---- a billion samples


def of_a_billion(path: Path) -> None:
    """In a process of its own: from an index's file to a step."""
    before, began = resident(), time.perf_counter()
    counts = np.array([shard.nsamples for shard in index.of_file(path.read_text(), str(path))])
    loaded, between = time.perf_counter(), resident()
    order = Order(counts, 256, 0)
    order[1_234_567]
    first = time.perf_counter() - loaded
    step = timed(map, order.__getitem__, range(2_000_000, 2_010_000)) / 10_000
    memory = {"index_bytes": between - before, "bytes": resident() - between}
    print(json.dumps({"index": loaded - began, "first": first, "step": step, **memory}))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


STREAMING = """
import os, sys, time
import numpy as np
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
n, before, began = int(sys.argv[1]), resident(), time.perf_counter()
ids = get_partitions("relaxed", n, 1, 1, 8, 1, 32, 0)
order = get_shuffle("py1e", np.full(n // 1000, 1000), 1, 0, 0)
ids = np.where(ids != -1, order[ids], -1)
print(time.perf_counter() - began, (resident() - before) / 1e9)
"""


def compare_orders(streaming: str | None) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path, (shards, samples) = Path(folder, "index.json"), HUGE
        path.write_bytes(index._json(index.Shard(f"{i:06d}.tar", samples, 10**9, 1, "0" * 16) for i in range(shards)))
        command = [sys.executable, "-m", "benchmarks.data", "--billion", str(path)]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    rows = ["| order | samples | first step | a step | memory |", "|---|---|---|---|---|"]
    rows.append(
        f"| ours, of {HUGE[0]:,} shards | {HUGE[0] * HUGE[1]:.0e} | {found['first']:.3f} s (index read: "
        f"{found['index']:.2f} s) | {found['step'] * 1e3:.3f} ms | {found['bytes'] / 1e6:.0f} MB (index: "
        f"{found['index_bytes'] / 1e6:.0f} MB) |"
    )
    rows.append("| required | | 0.2 s | 0.2 ms | 100 MB |")
    for n in (10**6, 10**7, 5 * 10**7):
        if streaming is None:
            rows.append(f"| Streaming's partition and py1e shuffle | {n:.0e} | not measured: --streaming PYTHON | | |")
            continue
        done = subprocess.run([streaming, "-c", STREAMING, str(n)], capture_output=True, text=True, check=True)
        seconds, gigabytes = map(float, done.stdout.split())
        rows.append(
            f"| Streaming's partition and py1e shuffle | {n:.0e} | {seconds:.2f} s | | {gigabytes * 1e3:.0f} MB |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="SIZE=FOLDER", help="shards of JPEGs of a size")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--streaming", metavar="PYTHON", help="of an environment with mosaicml-streaming")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the tables to")
    parser.add_argument("--billion", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    allow_open_files()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if settings.billion:
        return of_a_billion(settings.billion)
    given = {int(size): folder for size, _, folder in (one.partition("=") for one in settings.set)}
    with tempfile.TemporaryDirectory() as folder:
        sets = {
            size: Shards(given.get(size) or made(Path(folder, str(size)), size, 50_000 if size == 32 else 5_000))
            for size in ROUND
        }
        text = "\n".join(
            [
                *compare_throughput(sets, settings.rounds),
                "",
                f"{beyond_the_window(sets[32], 32, Path(folder))} (32 pixels, batches of 256)",
                "",
                *compare_resuming(sets[32], 32, settings.rounds),
                "",
                *compare_orders(settings.streaming),
            ]
        )
    print(text)
    if settings.out:
        settings.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
