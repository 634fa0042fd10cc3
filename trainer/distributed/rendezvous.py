"""How the processes of a run find each other, and what they write into their common store.

torch's own rendezvous listens on every network, and after a restart by the launcher it finds the addresses of the
processes before.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlparse
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from trainer.distributed.launcher import is_single_machine
from trainer.errors import RunError

INIT_METHOD = "vaegan://"  # selects `_rendezvous`
POLL = 0.05  # seconds between looks into the store
STORE_TIMEOUT = 5  # seconds in which a running process responds
T = TypeVar("T")


def _rendezvous(url: str, timeout: timedelta) -> Iterator[tuple[dist.Store, int, int]]:
    """torch's env://, but with a prefix of the launcher's store for each start, and on one machine a local store."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if is_single_machine():
        for library in ("GLOO", "NCCL"):  # they would also listen where other machines reach them
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            port = int(os.environ["MASTER_PORT"])
            yield _local_store(port, _listen(port) if rank == 0 else None, world_size, timeout), rank, world_size
            return
    for store, _, _ in rendezvous(urlparse(url)._replace(scheme="env").geturl(), timeout=timeout):
        part: dist.Store = dist.PrefixStore(_name_of_start(store, rank, world_size, timeout), store)
        if is_single_machine():
            listening = None
            if rank == 0:
                listening = _listen()
                part.set("port", str(listening.getsockname()[1]))
            part = _local_store(int(part.get("port")), listening, world_size, timeout)
        yield part, rank, world_size


def _name_of_start(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name that process 0 chooses for this start of all processes, which launchers may count differently.

    Each other process sends an ID and receives the name under that ID, and so never the name of an earlier start.
    """
    own = uuid4().hex
    if rank:
        store.set(f"request {rank}", own)
        name = store.get(f"response to {own}").decode()
        store.add(name, 1)
        return name
    store.delete_key("exception_dump")  # by which NCCL reports a failed process
    end = time.monotonic() + timeout.total_seconds()
    while store.add(own, 0) < world_size - 1:
        if time.monotonic() > end:
            raise dist.DistStoreError(f"{store.add(own, 0)} of {world_size - 1} other processes responded")
        for other in range(1, world_size):
            if store.check([f"request {other}"]):
                store.set(f"response to {store.get(f'request {other}').decode()}", own)
        time.sleep(POLL)
    return own


def _listen(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def _local_store(port: int, listening: socket.socket | None, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Return a store in process 0, which has the listening socket.

    torch's own socket is open to every network, and whoever reaches the store can redirect processes and send them
    pickles.
    """
    descriptor = None if listening is None else listening.detach()
    return dist.TCPStore(
        "127.0.0.1",
        port,
        world_size,
        is_master=descriptor is not None,
        timeout=timeout,
        master_listen_fd=descriptor,
        use_libuv=False,  # libuv takes no socket
    )


register_rendezvous_handler(urlparse(INIT_METHOD).scheme, _rendezvous)


@contextmanager
def rendezvous_errors(timeout: int) -> Iterator[None]:
    """A context in which processes look for each other.

    Raises:
        RunError: they do not meet; names the address.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_network_error(error):
            raise
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} did not meet the others at {address} "
            f"within trainer.timeout {timeout} s: one is gone, a firewall is between them, or gloo uses the wrong "
            "network (GLOO_SOCKET_IFNAME)"
        ) from error


def is_network_error(error: RuntimeError) -> bool:
    # The last is all that gloo says of an exchange that another process's timeout ended.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "caused pair closure"))


def query_store(query: Callable[[dist.Store], T], seconds: float) -> T | None:
    """Return what `query` returns from the processes' common store, or None if the store does not respond in time.

    It runs in a thread, since the store itself waits for ever when its network is cut.
    """
    results: list[T] = []

    def run() -> None:
        with suppress(RuntimeError):  # the process that holds the store is gone
            store = dist.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=seconds))
            results.append(query(store))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
