"""How the ranks of an evaluation divide its work, add up their results and share their errors."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data.errors import DataError
from trainer.evaluate.extractors.extractor import BATCH
from trainer.exact_sum import ExactSum
from trainer.metrics.statistics import ROWS

BLOCK = BATCH  # images of a block, the unit in which images are dealt to ranks
T = TypeVar("T")
# The classes of errors that other ranks raise again; every other error becomes a RuntimeError there.
ERRORS = (FloatingPointError, DataError, ValueError, OSError)


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """Do this rank's part of the work and return its result. If one rank fails, all ranks fail with its error.

    Raises:
        Exception: on the failing rank the error itself; on other ranks an error of the same class (one of ERRORS, else
            RuntimeError) whose message starts with "process RANK: ".
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    kind = next((kind for kind in ERRORS if isinstance(error, kind)), RuntimeError)
    failures = gather_object([error and (kind, str(error) or type(error).__name__)])
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure:
            raise failure[0](f"process {rank}: {failure[1]}")
    return result


class EvaluationRanks:
    """The ranks of an evaluation: this rank's part of the work, and sums over all ranks."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        # Sums are float64, which Apple's GPUs lack.
        self.device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's items: every n-th of n ranks. There may be none."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def blocks(self, count: int) -> Sequence[Tensor]:
        """Return the indices [n] of this rank's images out of `count`, in blocks of BLOCK; the last may be smaller."""
        return self.own(torch.arange(count).split(BLOCK))

    def rows(self, count: int) -> Sequence[slice]:
        """Return this rank's rows of a matrix of distances, in parts whose arithmetic is the same on any rank."""
        return self.own([slice(i, min(i + ROWS, count)) for i in range(0, count, ROWS)])

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        return self.accelerator.reduce(value, "sum")

    def total(self, value: ExactSum) -> float:
        """Return an exact scalar sum over all ranks."""
        return self.sum(value.parts).sum().item()

    run = staticmethod(raise_on_all_ranks)
