"""Ranks beside single processes on the same cores, and a model of more: `python -m benchmarks.scaling`.

    python -m benchmarks.scaling [--processes 2] [--rounds 15] [--out FILE.md] [--config RECIPE ... a run's settings]
    python -m benchmarks.scaling --model --gpus_per_node 8 --intra 300e9 --inter 50e9 --alpha 5e-6 --step 0.12 ...

The first measures: `--processes` gloo ranks (one thread each, pinned one to a core as far as there are cores) against
as many processes that know nothing of each other, at the same time on the same cores, which is all that a shared
machine has to give. Both take the real step (`trainer.step.TrainStep` and the averaged weights) on a batch in memory. A
round gives each way a turn of `--seconds`, in another order; every figure is a median over rounds, every ratio one
within a round.

The second predicts by the same model (docs/scaling.md) for machines that the reader describes. Of a network it takes
the sizes of its all-reduces and, as shares of a step, when in the backward each may begin; `--step` is a step's time on
one device, at the batch of one device.

Without settings of a run, the recipes' networks are taken at their batch sizes a process.
"""

import argparse
import math
import multiprocessing
import os
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from models.system import Terms
from trainer.batch import Batch
from trainer.config.parser import Config, configure
from trainer.distributed.accelerator import DDP_SETTINGS, keep_freed_memory
from trainer.distributed.ranks import Ranks
from trainer.ema import EMA
from trainer.step import PlayerState, TrainStep

RECIPES = ["digits-vaegan-ternary", "mnist-vaegan-ternary", "smiles-cyclegan", "cifar10-vaegan-ternary"]
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes after which DDP closes a bucket
MESSAGES = [2**exponent for exponent in range(10, 25, 2)]  # bytes, from 1 KiB to 16 MiB
WORLDS = [8, 16, 64, 256, 1024]
Algorithm = Literal["ring", "tree", "best"]
GradSync = Literal["ddp", "flat"]
SYNCS: list[GradSync] = ["ddp", "flat"]
WAYS = [*SYNCS, "unsynchronized"]

# ---- the model


@dataclass(frozen=True)
class Cluster:
    """Machines as the model sees them.

    Args:
        alpha: seconds that a message takes, however short (Hockney 1994)
        intra: bytes a second that a device sends within its node
        inter: bytes a second that a node sends to the others, by all its network cards together
        gpus_per_node: devices that a node has
        algorithm: of an all-reduce; best is the faster one at each size, as libraries choose
    """

    alpha: float
    intra: float
    inter: float = math.inf
    gpus_per_node: int = 8
    algorithm: Algorithm = "best"

    def bandwidth(self, processes: int) -> float:
        return self.intra if processes <= self.gpus_per_node else min(self.intra, self.inter)

    def all_reduce(self, processes: int, size: float) -> float:
        """Seconds of an all-reduce of `size` bytes."""
        ways = {"ring": [ring], "tree": [tree], "best": [ring, tree]}[self.algorithm]
        return min(way(self, processes, size) for way in ways)


def ring(cluster: Cluster, processes: int, size: float) -> float:
    """Reduce-scatter and all-gather along a ring (Patarasu & Yuan 2009; Thakur et al. 2005, 4.5)."""
    if processes == 1:
        return 0.0
    moved = 2 * (processes - 1) / processes * size
    return 2 * (processes - 1) * cluster.alpha + moved / cluster.bandwidth(processes)


def tree(cluster: Cluster, processes: int, size: float) -> float:
    """Chains within nodes and two binary trees between them, each of which carries half (Sanders et al. 2009)."""
    if processes == 1:
        return 0.0
    nodes = math.ceil(processes / cluster.gpus_per_node)
    hops = min(processes, cluster.gpus_per_node) - 1 + math.ceil(math.log2(nodes))
    return 2 * hops * cluster.alpha + 2 * size / cluster.bandwidth(processes)


@dataclass(frozen=True)
class Move:
    """What one player's move sends.

    Args:
        player: its name
        buckets: (slack, bytes) of DDP's buckets: from when one is complete to the end of the backward, as a share of a
            step's time; and its size
        statistics: (bytes, bytes more for each further process) of each statistic of its loss, which all wait for
    """

    player: str
    buckets: tuple[tuple[float, int], ...]
    statistics: tuple[tuple[int, int], ...] = ()

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.buckets)

    def exposed(self, cluster: Cluster, processes: int, step: float, overlap: float, sync: GradSync) -> float:
        """Seconds that its gradients' all-reduces add to a step of `step` seconds."""
        if sync == "flat":
            return cluster.all_reduce(processes, self.bytes)
        seconds = [cluster.all_reduce(processes, size) for _, size in self.buckets]
        end = -math.inf  # of the all-reduce before, where the backward ends at 0
        for (slack, _), takes in sorted(zip(self.buckets, seconds, strict=True), reverse=True):
            end = max(end, -slack * step) + takes
        return overlap * max(end, 0.0) + (1 - overlap) * sum(seconds)

    def told(self, cluster: Cluster, processes: int) -> float:
        """Seconds of the all-reduces of its statistics."""
        return sum(cluster.all_reduce(processes, size + (processes - 1) * more) for size, more in self.statistics)


@dataclass(frozen=True)
class Network:
    """A configured system as the model sees it.

    Args:
        name: of its recipe
        batch_size: images a process
        flops: of a step
        moves: of its players
    """

    name: str
    batch_size: int
    flops: int
    moves: tuple[Move, ...]

    def communication(
        self, cluster: Cluster, processes: int, step: float, overlap: float = 1.0, sync: GradSync = "ddp"
    ) -> float:
        """Seconds that communication adds to a step of `step` seconds."""
        return sum(
            move.exposed(cluster, processes, step, overlap, sync) + move.told(cluster, processes) for move in self.moves
        )

    def waiting(self, processes: int, step: float, jitter: float) -> float:
        """Seconds a step in which the others wait for the slowest, once a move (Blom 1958: the largest of P normals).

        Args:
            processes: P
            step: seconds of a step
            jitter: standard deviation of a process's steps, as a share of them
        """
        score = statistics.NormalDist().inv_cdf((processes - 0.375) / (processes + 0.25))
        return jitter * step * math.sqrt(len(self.moves)) * score


def fit(seconds: dict[int, float], processes: int) -> Cluster:
    """alpha and bandwidth from a ring's times of `seconds[bytes]`, with the least squares of relative errors."""
    size, took = np.array(list(seconds), float), np.array(list(seconds.values()))
    rows = np.stack([np.full_like(size, 2 * (processes - 1)), 2 * (processes - 1) / processes * size], axis=1)
    (alpha, inverse), *_ = np.linalg.lstsq(rows / took[:, None], np.ones_like(took), rcond=None)
    return Cluster(float(alpha), float(1 / inverse), gpus_per_node=processes, algorithm="ring")


# ---- a network's sizes


def random_batch(config: Config, domains: int, rank: int, world: int, step: int) -> Batch:
    data, share = config.data, config.trainer.batch_size
    generator = torch.Generator().manual_seed(rank)
    shape = (share, data.channels, data.size, data.size)
    images = tuple(torch.rand(shape, generator=generator) * 2 - 1 for _ in range(domains))
    return Batch(images, slice(rank * share, (rank + 1) * share), world * share, config.trainer.seed, step)


class Watch:
    """When each of a player's gradients is there, and what statistics it reduces."""

    def __init__(self, mover: PlayerState):
        self.mover = mover
        self.ready: dict[str, float] = {}
        self.slacks: list[dict[str, float]] = []  # of each step, as shares of it
        self.reduced: list[int] = []
        mover.player = replace(mover.player, after=self._after(mover.player.after))
        for name, parameter in mover.parameters.items():
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(lambda _, name=name: self._note(name))

    def _note(self, name: str) -> None:
        self.ready[name] = time.perf_counter()

    def _after(self, inner: Callable[[Terms], None] | None) -> Callable[[Terms], None] | None:
        def watched(statistics: Terms) -> None:
            self.reduced = [value.numel() * value.element_size() for value in statistics.values()]
            assert inner is not None
            inner(statistics)

        return watched if inner else None

    def end_step(self, seconds: float) -> None:
        end = max(self.ready.values())
        self.slacks.append({name: (end - at) / seconds for name, at in self.ready.items()})

    def buckets(self) -> list[tuple[float, int]]:
        """Slack, the median over steps, and bytes of each of DDP's buckets."""
        slack = {name: statistics.median(step[name] for step in self.slacks) for name in self.mover.parameters}
        found = []
        for network in self.mover.player.networks:
            arriving = sorted((name for name in slack if name.startswith(f"{network}.")), key=slack.get, reverse=True)
            sizes = [
                self.mover.parameters[name].numel() * self.mover.parameters[name].element_size() for name in arriving
            ]
            found += [(slack[arriving[last]], size) for last, size in fill(sizes)]
        return found


def fill(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """DDP's buckets of gradients as they arrive: each one's last gradient and bytes. The gradient that takes a bucket
    to its limit closes it (Li et al. 2020, 3.2.3; torch's compute_bucket_assignment_by_size)."""
    filled, held, limit = [], 0, FIRST_BUCKET
    for place, size in enumerate(sizes):
        held += size
        if held >= limit or place == len(sizes) - 1:
            filled.append((place, held))
            held, limit = 0, BUCKET
    return filled


def network_of(config: Config, name: str, repeats: int = 3) -> Network:
    """A system's sizes and slacks, by steps of one process on this machine."""
    torch.manual_seed(0)
    AcceleratorState._reset_state()
    system = config.system()
    step = TrainStep(Accelerator(cpu=True, mixed_precision=config.trainer.precision or "no"), system, 10**9)
    start = max(mover.player.start for mover in step.movers)
    batch = random_batch(config, system.domains, 0, 1, start)
    with FlopCounterMode(display=False) as counter:
        step([batch], start)
    watches = [Watch(mover) for mover in step.movers]
    for _ in range(repeats):
        began = time.perf_counter()
        step([batch], start)
        took = time.perf_counter() - began
        for watch in watches:
            watch.end_step(took)
    alone = [watch.reduced for watch in watches]
    step([random_batch(config, system.domains, 0, 2, start)], start)  # its half of a global batch twice as large
    moves = [
        Move(
            watch.mover.player.name,
            tuple(watch.buckets()),
            tuple((size, twice - size) for size, twice in zip(sizes, watch.reduced, strict=True)),
        )
        for watch, sizes in zip(watches, alone, strict=True)
    ]
    return Network(name, config.trainer.batch_size, counter.get_total_flops(), tuple(moves))


# ---- a process that is measured


class Worker:
    """One process: a rank of a gloo world, or one that knows of no others."""

    def __init__(self, rank: int, world: int, port: int, cores: set[int]):
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(1)
        keep_freed_memory()
        warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
        self.rank, self.world = rank, world
        os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        if world > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ |= {name: str(value) for name, value in place.items()}
        self.peers = Ranks(Accelerator(), timeout=600)
        assert self.peers.world == world

    def build(self, settings: list[str]) -> int:
        """Get ready for a configuration's steps; the steps after which its schedule of penalties begins again."""
        config = configure(settings)
        self.networks = {sync: self._networks(config, sync) for sync in SYNCS}
        step = self.networks["ddp"][0]
        players = [mover.player for mover in step.movers]
        self.done = max(player.start for player in players)
        self.batch = random_batch(config, step.system.domains, self.rank, self.world, self.done)
        return math.lcm(*(player.every * getattr(player.optimizer, "penalty_every", 1) for player in players))

    def _networks(self, config: Config, sync: GradSync) -> tuple[TrainStep, EMA]:
        AcceleratorState._reset_state()
        torch.manual_seed(0)
        accelerator = Accelerator(mixed_precision=config.trainer.precision or "no", kwargs_handlers=[DDP_SETTINGS])
        system = config.system()
        ema = EMA(system, config.trainer.ema_half_life, self.world * config.trainer.batch_size)
        for name, child in system.networks().items():
            setattr(system, name, accelerator.prepare_model(child, evaluation_mode=sync == "flat"))
        return TrainStep(accelerator, system, 10**9), ema

    def steps(self, count: int, way: str) -> dict[str, list[float]]:
        """Seconds, and those of this process's own work, of each of `count` steps; `way` unsynchronized leaves the
        all-reduces of gradients out."""
        step, ema = self.networks["flat" if way == "flat" else "ddp"]
        took, worked = [], []
        with ExitStack() as stack:
            for network in step.system.networks().values():
                if way == "unsynchronized" and isinstance(network, DistributedDataParallel):
                    stack.enter_context(network.no_sync())
            for _ in range(count):
                began, cpu = time.perf_counter(), time.process_time()
                self.peers.agree(False, self.done)
                step([replace(self.batch, step=self.done)], self.done)
                self.done += 1
                ema.update(self.done)
                took.append(time.perf_counter() - began)
                worked.append(time.process_time() - cpu)
        if (failed := step.failed()) is not None:
            raise RuntimeError(f"step {failed[0]} of {failed[1].name} is not finite: nothing was measured")
        return {"took": took, "worked": worked}

    def buckets(self) -> list[int]:
        """Bytes of the buckets that DDP made, sorted."""
        wrapped = self.networks["ddp"][0].system.networks().values()
        logged = [network._get_ddp_logging_data() for network in wrapped]
        return sorted(int(size) for data in logged for size in data["rebuilt_bucket_sizes"].split(", "))

    def all_reduces(self, moves: list[list[int]], repeats: int) -> list[float]:
        """Seconds of bare all-reduces: those of a move are begun together and waited for."""
        buffers = [[torch.zeros(max(1, size // 4)) for size in move] for move in moves]
        took = []
        for _ in range(repeats):
            began = time.perf_counter()
            for move in buffers:
                for work in [dist.all_reduce(buffer, async_op=True) for buffer in move]:
                    work.wait()
            took.append(time.perf_counter() - began)
        return took


def work(pipe: Connection, *place: Any) -> None:
    """Do what is asked for until the asking process has closed its end."""
    worker = Worker(*place)
    pipe.send(None)
    while True:
        try:
            name, *given = pipe.recv()
        except EOFError:
            os._exit(0)
        pipe.send(getattr(worker, name)(*given))


class Team:
    """Processes that do the same at the same time."""

    def __init__(self, processes: int, joined: bool):
        cores = sorted(os.sched_getaffinity(0))
        even = processes % len(cores) == 0 or processes < len(cores)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(processes):
            here, there = context.Pipe()
            place = {cores[rank % len(cores)]} if even else set(cores)
            world = (rank, processes) if joined else (0, 1)
            self.processes.append(context.Process(target=work, args=(there, *world, port, place), daemon=True))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)
        self.answers()

    def answers(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise SystemExit("error: a process that was being measured died; its message is above") from None

    def ask(self, *asked: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(asked)
        return self.answers()

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()


# ---- measured

Figures = dict[str, float]


def rate(steps: list[list[float]]) -> float:
    """Steps a second of processes together."""
    return sum(len(each) / sum(each) for each in steps)


def measure(network: Network, settings: list[str], single: Team, ranks: Team, rounds: int, seconds: float) -> Figures:
    """Medians over rounds, in seconds a step.

    single: of the processes that know of no others; waiting: that the slowest of them takes longer than their mean;
    cores: the share of its core that such a process got, beside what else the machine does; bare: of the same
    all-reduces with nothing else; and of each way its time, its efficiency and, times a single process's, its own work.
    """
    period = single.ask("build", settings)[0]
    ranks.ask("build", settings)
    teams = {"single": single, **dict.fromkeys(WAYS, ranks)}
    for way, team in teams.items():
        team.ask("steps", 3 * period, way)
    expected = sorted(size for move in network.moves for _, size in move.buckets)
    if (made := ranks.ask("buckets")[0]) != expected:
        raise SystemExit(f"error: {network.name}: DDP made buckets of {made} bytes, and the model of {expected}")
    messages = [[size for _, size in move.buckets] for move in network.moves]
    messages += [[size + (len(ranks.pipes) - 1) * more] for move in network.moves for size, more in move.statistics]
    rough = statistics.mean(single.ask("steps", period, "single")[0]["took"])
    count = period * max(1, round(seconds / rough / period))
    kept = []
    for turn in range(rounds):
        order = [*teams][turn % len(teams) :] + [*teams][: turn % len(teams)]
        told = {way: teams[way].ask("steps", count, way) for way in order}
        took = {way: [each["took"] for each in told[way]] for way in teams}
        worked = {way: sum(sum(each["worked"]) for each in told[way]) for way in teams}
        alone = len(single.pipes) / rate(took["single"])
        slowest = statistics.mean(map(max, zip(*took["single"], strict=True)))
        bare = statistics.median(map(max, zip(*ranks.ask("all_reduces", messages, 5), strict=True)))
        got = worked["single"] / sum(map(sum, took["single"]))
        kept.append({"single": alone, "waiting": slowest - alone, "bare": bare, "cores": got})
        for way in reversed(WAYS):
            kept[-1][way] = len(ranks.pipes) / rate(took[way])
            kept[-1][f"{way}/efficiency"] = alone / kept[-1][way]
            kept[-1][f"{way}/work"] = worked[way] / worked["single"]
            kept[-1][f"{way}/share"] = 1 - kept[-1]["unsynchronized"] / kept[-1][way]
    return {name: statistics.median(turn[name] for turn in kept) for name in kept[0]}


def measure_messages(ranks: Team, rounds: int) -> dict[int, float]:
    """Seconds of a bare all-reduce by its bytes: medians over rounds in which all sizes take turns."""
    took: dict[int, list[float]] = {size: [] for size in MESSAGES}
    for _ in range(rounds):
        for size in MESSAGES:
            took[size] += map(max, zip(*ranks.ask("all_reduces", [[size]], 5), strict=True))
    return {size: statistics.median(values) for size, values in took.items()}


# ---- tables


def table(head: str, rows: Iterable[Iterable[object]]) -> list[str]:
    ruler = "|" + "---|" * (head.count("|") - 1)
    return [head, ruler, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def tables_of_steps(found: dict[Network, Figures], processes: int, cluster: Cluster) -> list[str]:
    rows, checks = [], []
    for network, its in found.items():
        gradients = sum(move.bytes for move in network.moves) / 1e6
        for way in SYNCS:
            of = [network.name, way, network.batch_size, f"{gradients:.2f}"]
            took = [f"{its[name] * 1e3:.0f}" for name in ("single", way)]
            shares = [f"{its[f'{way}/efficiency']:.3f}", f"{its[f'{way}/work']:.3f}", f"{its[f'{way}/share']:.1%}"]
            rows.append([*of, *took, *shares])
            sent = network.communication(cluster, processes, its["single"], overlap=0.0, sync=way)
            predicted = its["single"] / (its["single"] + sent + its["waiting"])
            checks.append(
                [
                    *(network.name, way, f"{sent * 1e3:.1f}", f"{its['bare'] * 1e3:.1f}" if way == "ddp" else ""),
                    *(f"{its['waiting'] * 1e3:.1f}", f"{predicted:.3f}", f"{its[f'{way}/efficiency']:.3f}"),
                    f"{100 * (predicted - its[f'{way}/efficiency']):+.1f}",
                ]
            )
    head = (
        "| network | gradients by | batch a process | MB of gradients | ms a step, single | ms a step, ranks | "
        "efficiency | own work, of single | share of the all-reduces |"
    )
    check = (
        "| network | gradients by | all-reduces predicted, ms | bare ones measured, ms | waiting of single ones, ms | "
        "efficiency predicted | measured | off, points |"
    )
    return [*table(head, rows), *table(check, checks)]


def table_of_messages(found: dict[int, dict[int, float]], cluster: Cluster) -> list[str]:
    """Of each number of ranks, and the ring's with the cores shared out, fitted to the first."""
    cores, rows = len(os.sched_getaffinity(0)), []
    for size in MESSAGES:
        cells: list[object] = [f"{size:,}"]
        for processes, took in found.items():
            expected = ring(cluster, processes, size) * max(1, processes / cores)
            cells += [f"{took[size] * 1e3:.2f}", f"{expected * 1e3:.2f} ({expected / took[size]:.2f})"]
        rows.append(cells)
    head = "| bytes |" + "".join(f" {processes} ranks, ms | model (of measured) |" for processes in found)
    return table(head, rows)


def tables_of_worlds(networks: list[Network], cluster: Cluster, settings: argparse.Namespace) -> list[str]:
    lines = []
    for network in networks:
        rows = []
        for processes in settings.world:
            step, cells = settings.step, []
            waits = network.waiting(processes, step, settings.jitter)
            for sync in SYNCS:
                sent = network.communication(cluster, processes, step, settings.overlap, sync)
                total = step + sent + waits
                cells += [f"{sent * 1e3:.2f}", f"{step / total:.3f}", f"{processes * network.batch_size / total:,.0f}"]
            rows.append([processes, *cells])
        sizes = ", ".join(
            f"{move.player} {' + '.join(f'{size / 1e6:.3f} ({slack:.1%})' for slack, size in move.buckets)}"
            for move in network.moves
        )
        lines += [
            f"{network.name}: {network.batch_size} images a process, {network.flops / 1e9:.1f} GFLOP a step; MB of "
            f"gradients (and slack, of a step): {sizes}",
            "",
            *table(
                "| processes | ms sent, ddp | efficiency | images/s | ms sent, flat | efficiency | images/s |", rows
            ),
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--also", type=int, nargs="*", default=[3, 4], help="ranks of further bare all-reduces")
    parser.add_argument("--config", action="append", default=[], metavar="RECIPE", help="instead of the four recipes")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the tables to")
    model = parser.add_argument_group("the model")
    model.add_argument("--model", action="store_true", help="predict instead of measuring")
    model.add_argument("--step", type=float, help="seconds of a step on one device")
    model.add_argument("--alpha", type=float, help="seconds of a message, however short")
    model.add_argument("--intra", type=float, help="bytes/s that a device sends within its node")
    model.add_argument(
        "--inter", type=float, default=math.inf, help="bytes/s that a node sends, all its cards together"
    )
    model.add_argument("--gpus_per_node", type=int, default=8)
    model.add_argument("--world", type=int, nargs="+", default=WORLDS, help="numbers of processes")
    model.add_argument("--algorithm", choices=["ring", "tree", "best"], default="best")
    model.add_argument("--overlap", type=float, default=1.0, help="share of all-reduces that may hide in the backward")
    model.add_argument("--jitter", type=float, default=0.0, help="deviation of a process's steps, a share of them")
    settings, others = parser.parse_known_args()
    torch.set_num_threads(1)
    named = {Path(recipe).stem: ["--config", recipe, *others] for recipe in settings.config}
    if others and not named:
        named = {"as given": others}
    named = named or {name: ["--config", f"launch/recipes/{name}.yaml"] for name in RECIPES}
    networks = {name: network_of(configure(given), name) for name, given in named.items()}
    if settings.model:
        missing = [f"--{name}" for name in ("step", "alpha", "intra") if getattr(settings, name) is None]
        if missing:
            parser.error(f"--model needs {', '.join(missing)}")
        cluster = Cluster(*(settings.alpha, settings.intra, settings.inter, settings.gpus_per_node, settings.algorithm))
        lines = tables_of_worlds(list(networks.values()), cluster, settings)
    else:
        lines = measured(networks, named, settings)
    text = "\n".join(lines)
    print(text)
    if settings.out:
        settings.out.write_text(text)


def measured(networks: dict[str, Network], named: dict[str, list[str]], settings: argparse.Namespace) -> list[str]:
    before = os.getloadavg()[0]
    single, ranks = Team(settings.processes, joined=False), Team(settings.processes, joined=True)
    messages = {settings.processes: measure_messages(ranks, settings.rounds)}
    found = {}
    for name, network in networks.items():
        print(name, file=sys.stderr, flush=True)
        found[network] = measure(network, named[name], single, ranks, settings.rounds, settings.seconds)
    for team in (single, ranks):
        team.end()
    cluster = fit(messages[settings.processes], settings.processes)
    for processes in settings.also:
        team = Team(processes, joined=True)
        messages[processes] = measure_messages(team, settings.rounds)
        team.end()
    return [
        f"{settings.processes} gloo ranks and {settings.processes} single processes on {len(os.sched_getaffinity(0))} "
        f"cores, of which a single process got {min(its['cores'] for its in found.values()):.0%} and more beside what "
        f"else ran (load before: {before:.1f}); medians of {settings.rounds} rounds. Fitted: alpha "
        f"{cluster.alpha * 1e6:.0f} us, bandwidth {cluster.intra / 1e9:.2f} GB/s.",
        "",
        *tables_of_steps(found, settings.processes, cluster),
        *table_of_messages(messages, cluster),
    ]


if __name__ == "__main__":
    main()
