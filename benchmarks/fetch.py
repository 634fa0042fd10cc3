"""What ranks and machines read of a large set: `python -m benchmarks.fetch [--images N ...] [--window N] [--lanes N]`.

This is arithmetic: no process is started and nothing is read. `data.order.Order` says which samples each machine's rows
are in every step, and so which shards it needs. A machine keeps the shards that it downloads in a cache, from which the
least recently used are dropped, as `data.shards.cache` does.

In the table are the most of any machine or rank: `shards` that a rank and a machine read, `open files`, the shards that
a rank reads in one step, `GB fetched` by a machine, in all and as a multiple of the bytes of the images that it sees,
and `GB in use`, of the shards that it reads within a minute, for which the cache should have room. `at once` is the
largest number of machines that need the first byte of one shard within the same minute, in which the run sees `epochs`
of the set.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.common import parser, print_table
from data.order import Order


@dataclass(frozen=True)
class Plan:
    """A run on many machines, and how long it is looked at.

    Args:
        images: of the set
        per_shard: images of a shard
        size: bytes of an image
        machines, gpus: machines, and ranks on each
        batch, rate: images of a rank in a step and in a second
        cache: bytes of a machine's cache
        window, lanes: settings of the order
        minutes: from the first step on
    """

    images: int = 1_281_167
    per_shard: int = 1_000
    size: float = 150e3
    machines: int = 128
    gpus: int = 8
    batch: int = 64
    rate: float = 200.0
    cache: float = 50e9
    window: int | None = None
    lanes: int | None = None
    minutes: float = 60.0

    def order(self) -> Order:
        counts = [self.per_shard] * (self.images // self.per_shard)
        rest = [self.images % self.per_shard] if self.images % self.per_shard else []
        return Order(counts + rest, self.batch * self.gpus * self.machines, 0, self.lanes, self.window)


@dataclass
class Reading:
    """What a machine reads.

    Attributes:
        fetched: minute and shard of each download
        in_use: shards that are read in each minute
        by_rank: shards that the machine's first rank reads
        open_files: most shards that this rank reads in one step
    """

    fetched: list[tuple[int, int]] = field(default_factory=list)
    in_use: dict[int, set[int]] = field(default_factory=dict)
    by_rank: set[int] = field(default_factory=set)
    open_files: int = 0


def read(plan: Plan, machine: int, order: Order) -> Reading:
    """Return what a machine reads in the first minutes of a run."""
    found, cached, ends = Reading(), OrderedDict[int, None](), np.cumsum(order.counts)
    rows, room = plan.batch * plan.gpus, int(plan.cache / (plan.per_shard * plan.size))
    for step in range(int(plan.minutes * 60 * plan.rate / plan.batch)):
        minute = int(step * plan.batch / plan.rate / 60)
        positions = order.rows(step, slice(machine * rows, (machine + 1) * rows))
        shards = np.searchsorted(ends, positions, side="right").tolist()
        of_rank = {*shards[: plan.batch]}
        found.by_rank |= of_rank
        found.open_files = max(found.open_files, len(of_rank))
        found.in_use.setdefault(minute, set()).update(shards)
        for shard in dict.fromkeys(shards):
            if shard not in cached:
                found.fetched.append((minute, shard))
                if len(cached) >= room:
                    cached.popitem(last=False)
            cached[shard] = None
            cached.move_to_end(shard)
    return found


def at_once(readings: list[Reading]) -> int:
    """Return the most machines that need the first byte of one shard in the same minute."""
    needed = [minute * 2**32 + shard for reading in readings for minute, shard in {*reading.fetched}]
    return int(np.unique(needed, return_counts=True)[1].max())


def row(plan: Plan, sample: int = 4, crowd: float = 5.0) -> Iterator[object]:
    """Yield the cells of a plan: of `sample` machines in its time, and `at_once` of all in the first minutes."""
    chosen = np.linspace(0, plan.machines - 1, sample).round().astype(int).tolist()
    order = plan.order()
    readings = [read(plan, machine, order) for machine in chosen]
    shard, seen = plan.per_shard * plan.size, plan.minutes * 60 * plan.rate * plan.gpus * plan.size
    fetched = max(len(one.fetched) for one in readings) * shard
    yield from (f"{plan.images:,}", f"{plan.cache / 1e9:,g}", str(order), f"{plan.minutes:g}")
    yield from (max(len(one.by_rank) for one in readings), max(one.open_files for one in readings))
    yield max(len({number for _, number in one.fetched}) for one in readings)
    yield from (f"{fetched / 1e9:,.0f}", f"{fetched / seen:.2f}")
    yield f"{plan.machines * plan.gpus * plan.rate * 60 / plan.images:.2g}"
    yield f"{max(len(used) for one in readings for used in one.in_use.values()) * shard / 1e9:,.1f}"
    short = replace(plan, minutes=min(crowd, plan.minutes))
    yield at_once([read(short, machine, order) for machine in range(plan.machines)])


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--images", type=int, nargs="+", default=[1_281_167, 100_000_000], help="of each set")
    for name, kind in (("per_shard", int), ("size", float), ("machines", int), ("gpus", int), ("batch", int)):
        options.add_argument(f"--{name}", type=kind, default=getattr(Plan, name), help=f"({getattr(Plan, name):,g})")
    for name in ("rate", "cache", "minutes"):
        options.add_argument(f"--{name}", type=float, default=getattr(Plan, name), help=f"({getattr(Plan, name):,g})")
    for name in ("window", "lanes"):
        options.add_argument(f"--{name}", type=int, help=f"data.{name}")
    given = vars(options.parse_args())
    del given["rounds"], given["small"]
    columns = "images | cache, GB | order | minutes | shards, rank | open files | shards, machine | GB fetched"
    head = f"{columns} | of its images | epochs a minute | GB in use | at once"
    print_table(head, (row(Plan(**{**given, "images": images})) for images in given["images"]))


if __name__ == "__main__":
    main()
