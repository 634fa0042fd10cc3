"""Data-parallel scaling: measured on this machine, or predicted for a cluster. See docs/scaling.md.

    python -m benchmarks.scaling [--processes 2] [--rounds 21] [--config RECIPE] [settings of a run ...]
    python -m benchmarks.scaling --predict --step 0.12 --alpha 5e-6 --intra 300e9 --inter 50e9 [--gpus 8 64] ...

The first command compares ranks that synchronize by gloo with as many independent processes, which run on the same
cores. The second computes the step time on each number of GPUs from the step time on one GPU, the cluster's links and
the sizes of the system's all-reduces. Without `--config` and settings, both take four recipes of launch/recipes/.
"""

import argparse
import math
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import Training, accelerator, medians, parser, print_table, seconds
from trainer.config.parser import Config, configure
from trainer.distributed.accelerator import keep_freed_memory
from trainer.distributed.ranks import Ranks

RECIPES = ["digits-vaegan-ternary", "mnist-vaegan-ternary", "smiles-cyclegan", "cifar10-vaegan"]
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes at which DDP closes a bucket
MESSAGES = [2**exponent for exponent in range(10, 25, 2)]  # bytes, from 1 KiB to 16 MiB
GradSync = Literal["ddp", "flat"]
SYNCS: list[GradSync] = ["ddp", "flat"]


@dataclass(frozen=True)
class Cluster:
    """The links of a cluster, and the time of an all-reduce over them.

    Args:
        alpha: Seconds that the shortest message takes (Hockney 1994).
        intra: Bytes a second that a GPU sends within its node.
        inter: Bytes a second that a node sends to other nodes, over all its network cards together.
        gpus_per_node: GPUs in a node.
    """

    alpha: float
    intra: float
    inter: float = math.inf
    gpus_per_node: int = 8

    def ring(self, processes: int, size: float) -> float:
        """Return the seconds of an all-reduce of `size` bytes along a ring (Patarasu & Yuan 2009)."""
        return 2 * (processes - 1) * (self.alpha + size / processes / self._bandwidth(processes))

    def tree(self, processes: int, size: float) -> float:
        """Return the same for a chain in each node and two binary trees between nodes (Sanders et al. 2009)."""
        nodes = math.ceil(processes / self.gpus_per_node)
        hops = min(processes, self.gpus_per_node) - 1 + math.ceil(math.log2(nodes))
        return 2 * hops * self.alpha + 2 * size / self._bandwidth(processes)

    def all_reduce(self, processes: int, size: float) -> float:
        """Return the seconds of the faster of the two, which is what NCCL chooses; one process sends nothing."""
        return min(self.ring(processes, size), self.tree(processes, size)) if processes > 1 else 0.0

    def _bandwidth(self, processes: int) -> float:
        return self.intra if processes <= self.gpus_per_node else min(self.intra, self.inter)


@dataclass(frozen=True)
class Traffic:
    """What each step of a configured system all-reduces.

    Args:
        batch_size: Images of one process.
        buckets: For each player, the bytes of DDP's gradient buckets in the order in which they fill.
        statistics: Bytes of each statistic of a loss.
    """

    batch_size: int
    buckets: tuple[tuple[int, ...], ...]
    statistics: tuple[int, ...] = ()

    def seconds(self, cluster: Cluster, processes: int, backward: float = 0.0, sync: GradSync = "ddp") -> float:
        """Return the seconds that the all-reduces of `processes` processes add to a step.

        Args:
            backward: Seconds of each player's backward pass during which DDP's all-reduces cost nothing. That of the
                last bucket starts after it.
            sync: The run's `trainer.grad_sync`.
        """
        total = sum(cluster.all_reduce(processes, size) for size in self.statistics)
        for buckets in self.buckets:
            each = [cluster.all_reduce(processes, size) for size in (buckets if sync == "ddp" else [sum(buckets)])]
            total += max(each[-1], sum(each) - backward)
        return total


def buckets_of(gradients: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    """Return the bytes of DDP's buckets, in the order in which they fill (Li et al. 2020, 3.2.3).

    Args:
        gradients: The network and the bytes of each gradient, in the order in which the backward pass computes them.
            Each network has buckets of its own.
    """
    filled, missing = [], Counter(network for network, _ in gradients)
    held, limits = Counter[str](), dict.fromkeys(missing, FIRST_BUCKET)
    for network, size in gradients:
        held[network] += size
        missing[network] -= 1
        if held[network] >= limits[network] or not missing[network]:
            filled.append(held.pop(network))
            limits[network] = BUCKET
    return tuple(filled)


def traffic_of(config: Config) -> Traffic:
    """Return the all-reduces of a system, found by a step of it on the CPU."""
    training, reduced = Training(config, accelerator(config.trainer.precision)), list[int]()
    gradients: list[list[tuple[str, int]]] = [[] for _ in training.step.player_states]
    for player_state, found in zip(training.step.player_states, gradients, strict=True):
        for name, weight in player_state.parameters.items():
            size = (name.partition(".")[0], weight.nbytes)
            weight.requires_grad_(True).register_post_accumulate_grad_hook(lambda _, f=found, s=size: f.append(s))

    def reduce(statistic: torch.Tensor, *_: object) -> torch.Tensor:
        reduced.append(statistic.nbytes)
        return statistic

    training.step.accelerator.reduce = reduce  # one process reduces statistics only
    training()
    return Traffic(config.trainer.batch_size, tuple(map(buckets_of, gradients)), tuple(reduced))


def fit(times: dict[int, float], processes: int) -> Cluster:
    """Return the alpha and bandwidth with which a ring takes `times[bytes]`, by least squares of relative errors."""
    size, took = np.array(list(times), float), np.array(list(times.values()))
    rows = np.stack([np.full_like(size, 2 * (processes - 1)), 2 * (processes - 1) / processes * size], axis=1)
    (alpha, inverse), *_ = np.linalg.lstsq(rows / took[:, None], np.ones_like(took), rcond=None)
    return Cluster(float(alpha), float(1 / inverse), gpus_per_node=processes)


# The state of a measured process: its place among the others, and its system for each way to synchronize.
PLACE: list[Ranks] = []
TRAININGS: dict[GradSync, Training] = {}


def start(rank: int, world: int, port: int, core: int) -> None:
    """Prepare a measured process: a rank of a gloo group, or an independent process where `world` is 1."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in place.items()}
    PLACE.append(Ranks(accelerator(), timeout=600))


def build(settings: list[str]) -> int:
    """Build the system once for each way to synchronize; return the steps after which its penalties repeat."""
    for sync in SYNCS:
        config = configure([*settings, "--trainer.grad_sync", sync])
        TRAININGS[sync] = Training(config, accelerator(config.trainer.precision))
    players = [player_state.player for player_state in TRAININGS["ddp"].step.player_states]
    return math.lcm(*(player.every * getattr(player.optimizer, "penalty_every", 1) for player in players))


def steps(repeats: int, sync: GradSync) -> float:
    """Return the mean seconds of a step."""
    training, began = TRAININGS[sync], time.perf_counter()
    for _ in range(repeats):
        PLACE[0].agree(False, training.done)
        training()
    took = time.perf_counter() - began
    training.check()
    return took / repeats


def all_reduce(size: int) -> float:
    """Return the median seconds of five all-reduces of `size` bytes."""
    return statistics.median(seconds(dist.all_reduce, torch.zeros(size // 4)) for _ in range(5))


class Team:
    """Processes that do the same work at the same time, each on one core, in gloo groups of `world` ranks."""

    def __init__(self, processes: int, world: int):
        cores, context = sorted(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        places = [(rank % world, world, port, cores[rank % len(cores)]) for rank in range(processes)]
        self.pools = [ProcessPoolExecutor(1, context, start, place) for place in places]

    def __call__(self, work: Callable[..., object], *given: object) -> list[Any]:
        """Return what `work(*given)` returns in each process."""
        return [each.result() for each in [pool.submit(work, *given) for pool in self.pools]]


def measure(settings: list[str], single: Team, ranks: Team, rounds: int, turn: float) -> dict[str, float]:
    """Return medians over rounds: seconds of a step of each kind, and the efficiency within a round.

    In a round, the independent processes and the ranks by each way to synchronize take turns of `turn` seconds.
    """
    (period, *_), _ = single(build, settings), ranks(build, settings)
    kinds: list[tuple[str, Team, GradSync]] = [("single", single, "ddp"), *((sync, ranks, sync) for sync in SYNCS)]
    warmup = [statistics.mean(team(steps, 3 * period, sync)) for _, team, sync in kinds]
    repeats = period * max(1, round(turn / warmup[0] / period))
    found = []
    for first in range(rounds):
        order = kinds[first % 3 :] + kinds[: first % 3]
        took = {kind: statistics.harmonic_mean(team(steps, repeats, sync)) for kind, team, sync in order}
        found.append(took | {f"{sync}/efficiency": took["single"] / took[sync] for sync in SYNCS})
    return medians(found)


def print_measured(systems: dict[str, list[str]], options: argparse.Namespace) -> None:
    """Print the table of measured steps and of the predicted time of their all-reduces."""
    single, ranks = Team(options.processes, world=1), Team(options.processes, world=options.processes)
    sent = [{size: max(ranks(all_reduce, size)) for size in MESSAGES} for _ in range(options.rounds)]
    cluster = fit({size: statistics.median(each[size] for each in sent) for size in MESSAGES}, options.processes)
    print(
        f"{options.processes} gloo ranks and {options.processes} independent processes on {os.cpu_count()} cores (load "
        f"{os.getloadavg()[0]:.1f}); medians of {options.rounds} rounds. All-reduces of 1 KiB to 16 MiB fit "
        f"alpha {cluster.alpha * 1e6:.0f} us and {cluster.intra / 1e9:.2f} GB/s.\n"
    )

    def rows() -> Iterator[list[object]]:
        for name, settings in systems.items():
            traffic = traffic_of(configure(settings))
            found = measure(settings, single, ranks, options.rounds, options.seconds)
            for sync in SYNCS:
                predicted = traffic.seconds(cluster, options.processes, sync=sync)
                times = [f"{1e3 * found['single']:.0f}", f"{1e3 * found[sync]:.0f}", f"{1e3 * predicted:.1f}"]
                of = [name, sync, traffic.batch_size, f"{sum(map(sum, traffic.buckets)) / 1e6:.2f}"]
                yield [*of, *times, f"{found[f'{sync}/efficiency']:.3f}"]

    columns = "ms a step, independent | ms a step, ranks | ms of all-reduces, predicted | efficiency"
    print_table(f"system | gradients by | images a process | MB of gradients | {columns}", rows())


def print_predicted(systems: dict[str, list[str]], options: argparse.Namespace) -> None:
    """Print the table of predicted steps for each number of GPUs."""
    cluster = Cluster(options.alpha, options.intra, options.inter, options.gpus_per_node)
    traffics = {name: traffic_of(configure(settings)) for name, settings in systems.items()}
    for name, traffic in traffics.items():
        buckets = "; ".join(" + ".join(f"{size / 1e6:.3f}" for size in player) for player in traffic.buckets)
        print(f"{name}: {traffic.batch_size} images a GPU; MB of gradients, by player: {buckets}\n")

    def row(name: str, gpus: int) -> Iterator[object]:
        traffic = traffics[name]
        yield from (name, gpus)
        for sync in SYNCS:
            sent = traffic.seconds(cluster, gpus, options.overlap * options.step / len(traffic.buckets), sync)
            step = options.step + sent
            yield from (f"{1e3 * sent:.2f}", f"{options.step / step:.3f}", f"{gpus * traffic.batch_size / step:,.0f}")

    columns = " | ".join(f"ms of all-reduces, {sync} | efficiency | images/s" for sync in SYNCS)
    print_table(f"system | GPUs | {columns}", (row(name, gpus) for name in systems for gpus in options.gpus))


def main() -> None:
    options = parser(__doc__, rounds=21)
    options.add_argument("--config", action="append", default=[], metavar="RECIPE", help="a recipe's file; repeatable")
    options.add_argument("--processes", type=int, default=2, help="measured ranks, and independent processes (2)")
    options.add_argument("--seconds", type=float, default=1.0, help="length of each measurement (1)")
    predicted = options.add_argument_group("prediction")
    predicted.add_argument("--predict", action="store_true", help="predict instead of measuring")
    predicted.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64, 256, 1024], help="numbers of GPUs")
    predicted.add_argument("--gpus_per_node", type=int, default=8, help="GPUs in a node (8)")
    for name, default, text in (
        ("step", None, "seconds of a step on one GPU, at one GPU's batch"),
        ("alpha", None, "seconds that the shortest message takes"),
        ("intra", None, "bytes/s that a GPU sends within its node"),
        ("inter", math.inf, "bytes/s that a node sends to other nodes, over all its network cards (unlimited)"),
        ("overlap", 0.5, "share of a step, in backward passes, during which all-reduces cost nothing (0.5)"),
    ):
        predicted.add_argument(f"--{name}", type=float, default=default, help=text)
    given, others = options.parse_known_args()
    missing = [f"--{name}" for name in ("step", "alpha", "intra") if getattr(given, name) is None]
    if given.predict and missing:
        options.error(f"--predict needs {', '.join(missing)}")
    torch.set_num_threads(1)
    recipes = given.config or ([] if others else [f"launch/recipes/{name}.yaml" for name in RECIPES])
    systems = {Path(recipe).stem: ["--config", recipe, *others] for recipe in recipes} or {"as given": others}
    (print_predicted if given.predict else print_measured)(systems, given)


if __name__ == "__main__":
    main()
