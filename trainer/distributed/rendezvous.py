"""How the processes of a run find each other."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlparse
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from trainer.distributed.launcher import is_single_machine
from trainer.errors import RunError

INIT_METHOD = "anew://"  # how processes find each other: see `_rendezvous`
PAUSE = 0.05  # seconds between looks into the store


def _rendezvous(url: str, timeout: timedelta) -> Iterator[tuple[dist.Store, int, int]]:
    """torch's env://, but each start of the processes has a part of the launcher's store to itself, and where all are
    on one machine, a store that no other machine reaches.

    A launcher that starts them again keeps its store, where gloo would find the places of the processes before. What
    the launchers know of restarts may differ, so process 0 names the start, and answers whoever asks for the name.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if is_single_machine():
        for library in ("GLOO", "NCCL"):  # they, too, would listen where other machines reach them
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            port = int(os.environ["MASTER_PORT"])
            listening = _listen(port) if rank == 0 else None
            yield _on_loopback(port, listening, world_size, timeout), rank, world_size
            return
    for store, _, _ in rendezvous(urlparse(url)._replace(scheme="env").geturl(), timeout=timeout):
        own = uuid4().hex
        if rank:
            store.set(f"asks {rank}", own)
            name = store.get(f"answer to {own}").decode()
            store.add(name, 1)
        else:
            store.delete_key("exception_dump")  # by which NCCL tells all that one of its processes failed
            name, end = own, time.monotonic() + timeout.total_seconds()
            while store.add(name, 0) < world_size - 1:
                if time.monotonic() > end:
                    raise dist.DistStoreError(f"{store.add(name, 0)} of {world_size - 1} others asked")
                for other in range(1, world_size):
                    if store.check([f"asks {other}"]):
                        store.set(f"answer to {store.get(f'asks {other}').decode()}", name)
                time.sleep(PAUSE)
        part: dist.Store = dist.PrefixStore(name, store)
        if is_single_machine():
            listening = None
            if rank == 0:
                listening = _listen()
                part.set("port", str(listening.getsockname()[1]))
            part = _on_loopback(int(part.get("port")), listening, world_size, timeout)
        yield part, rank, world_size


def _listen(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def _on_loopback(port: int, listening: socket.socket | None, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """A store in process 0, the one with the listening socket: torch's own socket would be open to every network, and
    whoever reaches the store can have the processes meet at another place, and send them pickles there."""
    descriptor = None if listening is None else listening.detach()
    return dist.TCPStore(
        "127.0.0.1",
        port,
        world_size,
        is_master=descriptor is not None,
        timeout=timeout,
        master_listen_fd=descriptor,
        use_libuv=False,  # which takes no socket
    )


register_rendezvous_handler(urlparse(INIT_METHOD).scheme, _rendezvous)


@contextmanager
def rendezvous_errors(timeout: int) -> Iterator[None]:
    """Where processes that look for each other do not meet, say so.

    Raises:
        RunError: with where they looked.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_network_error(error):
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} did not meet the others at {where} "
            f"within trainer.timeout {timeout} s: one is gone, a firewall is between them, or gloo looks at the wrong "
            "network (GLOO_SOCKET_IFNAME)"
        ) from error


def is_network_error(error: RuntimeError) -> bool:
    # The last is what gloo says of an exchange that another one's timeout ended, and all it says.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "caused pair closure"))
