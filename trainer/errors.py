"""Errors that end a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RunError(RuntimeError):
    """The run cannot continue; the message says why and what to do. Its last checkpoint is intact."""


class DivergedError(RunError):
    """A loss or gradient is not finite: the same run would come to the same step again."""


def needed(error: torch.OutOfMemoryError) -> str:
    """Return what torch says was needed; it goes on with what its processes hold."""
    return str(error).partition(" GPU ")[0]


@contextmanager
def memory_errors() -> Iterator[None]:
    """A context of a training step: where a GPU has too little memory, RunError names the settings that save it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"a step does not fit into the GPU's memory: {needed(error)} Lower trainer.micro_batch, "
            "the images that a process takes through the networks at once, or set trainer.share_passes false, or, for "
            "networks with residual blocks, trainer.activation_checkpointing true: the result is the same. --dry_run "
            "says how much memory a step takes"
        ) from error
