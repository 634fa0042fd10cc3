"""The processes of a run beside their gradients: what they agree on, and which one is missing or differs."""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from models import System
from trainer.distributed.launcher import is_single_machine
from trainer.distributed.rendezvous import STORE_TIMEOUT, is_network_error, query_store
from trainer.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


class Ranks:
    """All processes of a run.

    Args:
        accelerator: of this process
        timeout: seconds to wait for other processes
    """

    def __init__(self, accelerator: Accelerator, timeout: int):
        self.accelerator, self.timeout = accelerator, timeout
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.hosts = gather_object([socket.gethostname()])
        self.processors = gather_object([_processor(accelerator.device)])
        self.step = 0
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._group: dist.ProcessGroup | None = None
        if self.world > 1:
            # On the host, beside the gradients: no GPU is waited for, and a dead process is noticed at once.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def agree(self, stop: bool, step: int) -> bool:
        """Return whether any process passed `stop` in the previous call; the same result on all processes.

        The exchange runs beside a whole step, so that no step waits for it.
        """
        self.step = step
        if self.world == 1:
            return stop
        previous, any_stop = self._pending, torch.tensor(stop, dtype=torch.int32)
        work = dist.all_reduce(any_stop, dist.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._pending = work, any_stop
        if previous is None:
            return False
        previous[0].wait()
        return bool(previous[1])

    def name(self, rank: int) -> str:
        return f"process {rank} on {self.hosts[rank]}"

    @contextmanager
    def naming_missing_ranks(self) -> Iterator[None]:
        """A context in which an error of communication names the process that is gone or stands still.

        Raises:
            RunError: names the process and the step.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not is_network_error(error):
                raise
            raise RunError(
                f"step {self.step + 1}: {self._missing()} is gone or stands still (trainer.timeout {self.timeout} s): "
                "see its own log. The checkpoints are intact; run the same command to resume"
            ) from error

    def _missing(self) -> str:
        """Name the missing processes: all others meet the same error and write a key into the store."""

        def find(store: dist.Store) -> list[int]:
            store.set(f"here/{self.rank}", "")
            time.sleep(STORE_TIMEOUT)
            return [rank for rank in range(self.world) if not store.check([f"here/{rank}"])]

        missing = query_store(find, 2 * STORE_TIMEOUT)
        if missing is None and is_single_machine():
            return self.name(0)
        if missing is None:
            return f"the machine of {self.name(0)}, or the network to it,"
        return ", ".join(map(self.name, missing)) or "a process that responds again"

    def check_same(self, own: dict[str, Any]) -> None:
        """Check that all processes have the same settings, code and data.

        Raises:
            ValueError: names a process and what differs.
        """
        for rank, theirs in enumerate(gather_object([own])):
            for what in own.keys() | theirs.keys():
                if own.get(what) != theirs.get(what):
                    raise ValueError(
                        f"{self.name(self.rank)} and {self.name(rank)} differ in {what}: {own.get(what)} here, "
                        f"{theirs.get(what)} there. It must be the same on all processes"
                    )

    @torch.no_grad()
    def broadcast_weights(self, system: System) -> None:
        """Copy the main process's weights and statistics to all others, but for frozen networks."""
        if self.world > 1:
            for name, value in system.state_dict().items():
                if name.partition(".")[0] not in system.frozen:
                    dist.broadcast(value, 0)

    def gather_rows(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors whose rows are those of all processes, in order, on the main process's host.

        Other processes get their own rows back. The exchange goes over the hosts, and no other process holds all rows.
        """
        if self.world == 1:
            return tensors
        gathered = {}
        for name, own in tensors.items():
            own = gathered[name] = own.cpu().contiguous()
            parts = None
            if self.rank == 0:
                gathered[name] = own.new_empty(self.world * len(own), *own.shape[1:])
                parts = list(gathered[name].split(len(own)))
            dist.gather(own, parts, 0, self._group)
        return gathered

    def check_weights(self, parts: dict[str, list[Tensor]]) -> None:
        """Check that weights and statistics are the same on all processes, to the bit.

        Args:
            parts: tensors by the name of their network or statistic

        Raises:
            RunError: names the processes and parts that differ from most.
        """
        if self.world == 1:
            return
        sums = torch.stack([weights_checksum(tensors) for tensors in parts.values()])
        found = self.accelerator.gather(sums[None]).cpu()
        wrong = [
            f"{self.name(rank)} has other weights in {', '.join(compress(parts, row))}"
            for rank, row in enumerate((found != found.mode(0).values).tolist())
            if any(row)
        ]
        if wrong:
            than = "most" if len(wrong) < self.world / 2 else "the others, and no majority says which are right"
            raise RunError(
                f"step {self.step + 1}: {'; '.join(wrong)} than {than}. {self._remedy()}, and run the same command to "
                "resume from the newest checkpoint"
            )

    def _remedy(self) -> str:
        if len({*self.processors}) > 1:
            kinds = ", ".join(f"{kind} on {self.name(rank)}" for rank, kind in enumerate(self.processors))
            return (
                f"Unlike processors round differently ({kinds}): use machines of one kind, or for CPUs set "
                "ATEN_CPU_CAPABILITY=default on all"
            )
        return (
            "Memory or a device may be faulty: leave that machine out, or try --trainer.grad_sync flat, which cannot "
            "miss a gradient"
        )


def run_on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return on all processes what `work` returns on the main one, which alone calls it.

    Raises:
        ValueError: with the message of the main process's error, which itself raises that error.
    """
    made, error = None, None
    if accelerator.is_main_process:
        try:
            made = work()
        except Exception as raised:
            error = raised
    made, message = broadcast_object_list([made, None if error is None else str(error) or type(error).__name__])
    if error is not None:
        raise error
    if message is not None:
        raise ValueError(message)
    return made


def _processor(device: torch.device) -> str:
    """Return what decides how a process's arithmetic rounds."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Return a network's weights and buffers."""
    return [*network.parameters(), *network.buffers()]


def weights_checksum(tensors: list[Tensor]) -> Tensor:
    """Return a scalar int64 sum over the bits of all numbers, in which each tensor has its own factor."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for i, value in enumerate(tensors):
        total += (2 * i + 1) * value.detach().reshape(-1).view(words[value.element_size()]).sum(dtype=torch.int64)
    return total


def code_checksum() -> str:
    """Return a checksum of the program's own code and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in ("trainer", "models", "data"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
