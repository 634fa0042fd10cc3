"""The processes of a run, beside their gradients: what one is asked, all learn; who is missing or astray is named."""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from models import System
from trainer.distributed.launcher import is_single_machine
from trainer.distributed.rendezvous import is_network_error
from trainer.distributed.store import STORE_TIMEOUT, ask_store
from trainer.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


class Ranks:
    """All processes of a run.

    Args:
        accelerator: gives them
        timeout: seconds after which one that does not answer is given up
    """

    def __init__(self, accelerator: Accelerator, timeout: int):
        self.accelerator, self.timeout = accelerator, timeout
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.hosts = gather_object([socket.gethostname()])
        self.processors = gather_object([_processor(accelerator.device)])
        self.step = 0
        self._asked: tuple[dist.Work, Tensor] | None = None
        self._group: dist.ProcessGroup | None = None
        if self.world > 1:
            # On the host and beside the gradients: a GPU is not waited for, and a dead process is noticed at once.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def agree(self, leave: bool, step: int) -> bool:
        """Whether any process wanted to leave when all were last asked, a call ago; the same answer for all."""
        self.step = step
        if self.world == 1:
            return leave
        before, wish = self._asked, torch.tensor(leave, dtype=torch.int32)
        asked = dist.all_reduce(wish, dist.ReduceOp.MAX, self._group, async_op=True)
        assert asked is not None
        self._asked = asked, wish
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])

    def name(self, rank: int) -> str:
        return f"process {rank} on {self.hosts[rank]}"

    @contextmanager
    def naming_missing_ranks(self) -> Iterator[None]:
        """Where an exchange with others fails because one is gone or stands still, say which one.

        Raises:
            RunError: names it, and the step.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not is_network_error(error):
                raise
            raise RunError(
                f"step {self.step + 1}: {self._missing()} is gone or stands still (trainer.timeout {self.timeout} s): "
                "see its own log. The checkpoints are intact: the same command goes on from the newest"
            ) from error

    def _missing(self) -> str:
        """Whoever is there meets the same failure and signs; the others are missing."""

        def absent(store: dist.Store) -> list[int]:
            store.set(f"here/{self.rank}", "")
            time.sleep(STORE_TIMEOUT)
            return [rank for rank in range(self.world) if not store.check([f"here/{rank}"])]

        missing = ask_store(absent, 2 * STORE_TIMEOUT)
        if missing is None and is_single_machine():
            return self.name(0)
        if missing is None:
            return f"the machine of {self.name(0)}, or the network to it,"
        return ", ".join(map(self.name, missing)) or "a process that has answered again"

    def check_same(self, own: dict[str, Any]) -> None:
        """All processes must agree on `own`, or each would train a run of its own.

        Raises:
            ValueError: names a process and what it has otherwise.
        """
        for rank, theirs in enumerate(gather_object([own])):
            for what in own.keys() | theirs.keys():
                if own.get(what) != theirs.get(what):
                    raise ValueError(
                        f"{self.name(self.rank)} and {self.name(rank)} differ in {what}: {own.get(what)} here, "
                        f"{theirs.get(what)} there. Give all of them the same"
                    )

    @torch.no_grad()
    def broadcast_weights(self, system: System) -> None:
        """Give all processes the main one's weights and statistics, of the networks that somebody moves."""
        if self.world > 1:
            for name, value in system.state_dict().items():
                if name.partition(".")[0] not in system.frozen:
                    dist.broadcast(value, 0)

    def check_weights(self, parts: dict[str, list[Tensor]]) -> None:
        """Weights and statistics must be the same to the bit on all processes, as they are where all was exchanged.

        Args:
            parts: tensors by the name of what they are of

        Raises:
            RunError: names the processes and parts that differ from most.
        """
        if self.world == 1:
            return
        sums = torch.stack([weights_checksum(tensors) for tensors in parts.values()])
        found = self.accelerator.gather(sums[None]).cpu()
        usual = found.mode(0).values
        astray = {
            rank: [name for name, other in zip(parts, row.tolist(), strict=True) if other]
            for rank, row in enumerate(found != usual)
            if row.any()
        }
        if astray:
            whose = "; ".join(
                f"{self.name(rank)} has other weights in {', '.join(names)}" for rank, names in astray.items()
            )
            than = "most" if len(astray) < self.world / 2 else "the others, and no majority says which are right"
            raise RunError(
                f"step {self.step + 1}: {whose} than {than}. {self._why()}, and give the same command again, which "
                "goes on from the newest checkpoint"
            )

    def _why(self) -> str:
        """What may make weights differ that all processes began with, and what to do about it."""
        if len({*self.processors}) > 1:
            unlike = ", ".join(f"{kind} on {self.name(rank)}" for rank, kind in enumerate(self.processors))
            return (
                f"Unlike processors round otherwise ({unlike}): take machines that are alike, or for CPUs set "
                "ATEN_CPU_CAPABILITY=default on all"
            )
        return (
            "Memory or a device may be at fault: leave that machine out, or take --trainer.grad_sync flat, which can "
            "miss no gradient"
        )


def run_on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What the main process makes, on all; what goes wrong there goes wrong on all.

    Raises:
        ValueError: with what was raised there; there itself, the very error.
    """
    made, trouble = None, None
    if accelerator.is_main_process:
        try:
            made = work()
        except Exception as error:
            trouble = error
    made, told = broadcast_object_list([made, None if trouble is None else str(trouble) or type(trouble).__name__])
    if trouble is not None:
        raise trouble
    if told is not None:
        raise ValueError(told)
    return made


def _processor(device: torch.device) -> str:
    """What decides how a process's arithmetic rounds."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def tensors_of(network: nn.Module) -> list[Tensor]:
    """A network's weights and buffers."""
    return [*network.parameters(), *network.buffers()]


def weights_checksum(tensors: list[Tensor]) -> Tensor:
    """int64: a sum over the bits of all numbers."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for i, value in enumerate(tensors):
        total += (2 * i + 1) * value.detach().reshape(-1).view(words[value.element_size()]).sum(dtype=torch.int64)
    return total


def code_checksum() -> str:
    """A checksum of the program's own code and of the torch that it runs on."""
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in ("trainer", "models", "data"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
