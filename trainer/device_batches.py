"""This process's batches, copied to the device while it computes the step before."""

import os
from collections.abc import Generator

import torch
from accelerate import Accelerator
from torch import Tensor

from data.loader import Augment, Batches, Images, load
from trainer.batch import Batch, normalize
from trainer.classes import check_labels
from trainer.log.window import LogWindow
from trainer.parts import RunParts


def device_batches(parts: RunParts, accelerator: Accelerator, first_step: int, window: LogWindow) -> Generator[Batch]:
    """Yield this process's rows of the global batch of each step from `first_step` on; `window` notes their samples.

    Raises:
        DataError: a sample is missing or damaged, and data.on_error is stop, or its label is not one of the classes.
    """
    settings, data, device = parts.config.trainer, parts.config.data, accelerator.device
    rows, steps = parts.system.rows, range(first_step, settings.steps)
    source = Batches(
        parts.trains, parts.orders, data.size, data.channels, rows, Augment(data.crop, data.flip), data.bits
    )
    loader = load(source, steps, data.workers, device.type == "cuda", _rows_of_this_machine(parts, accelerator))
    copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for step, sets in zip(steps, loader, strict=True):
        window.add_samples(step, rows, sets)
        first, classes = sets[0], parts.system.classes
        check_labels(parts.trains[0], classes, first.label.numpy(), first.position.numpy())
        label = first.label.to(device, non_blocking=True) if classes else None
        images = tuple(normalize(image) for image in _copied(sets, device, copy_stream))
        yield Batch(images, rows, settings.batch_size, settings.seed, step, label)


def _copied(sets: list[Images], device: torch.device, copy_stream: torch.cuda.Stream | None) -> list[Tensor]:
    with torch.cuda.stream(copy_stream):  # does nothing if it is None
        images = [one.image.to(device, non_blocking=True) for one in sets]
    if copy_stream is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(copy_stream)
        for image in images:
            image.record_stream(current)
    return images


def _rows_of_this_machine(parts: RunParts, accelerator: Accelerator) -> slice | None:
    """The rows whose shards this process fetches: all of its machine's on the machine's first rank, else None."""
    if not accelerator.is_local_main_process:
        return None
    first, ranks = parts.system.rows.start, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return slice(first, first + ranks * parts.per_rank_batch)
