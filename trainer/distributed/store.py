"""Questions to the processes' common store, within a time limit."""

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed

STORE_TIMEOUT = 5  # seconds in which a process that is there answers
Answer = TypeVar("Answer")


def ask_store(question: Callable[[torch.distributed.Store], Answer], seconds: float) -> Answer | None:
    """What the processes' common store answers; None where its host, or the network to it, does not in some seconds.

    In a thread, for the store itself waits without end on a network that was cut.
    """
    answers: list[Answer] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the host is gone
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=seconds))
            answers.append(question(store))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
