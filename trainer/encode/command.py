"""`python -m trainer.encode`: plan, encode this process's shards, describe them."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

import models
from data.dataset import Dataset, dataset_fingerprint, read_dataset
from data.errors import DataError
from data.images import Limits, plain
from data.loader import PositionBlocks, load
from data.redact import redacted, redacted_all
from data.shards.cache import Cache
from data.shards.reader import Shards
from data.unfinished import begin, complete, locked, unfinished_of
from models import manifest
from models.load import checkpoint_of
from trainer import schemas
from trainer.distributed.accelerator import command_accelerator
from trainer.distributed.exit import user_errors
from trainer.distributed.ranks import run_on_main
from trainer.distributed.rendezvous import is_network_error
from trainer.encode.arguments import parse
from trainer.encode.writer import LatentWriter, Task
from trainer.errors import RunError
from trainer.latents import LatentEncoder
from trainer.run_place import local_run

TIMEOUT = timedelta(days=1)  # for processes that wait while another encodes its last shard


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    settings = parse(arguments)
    with user_errors(), ExitStack() as stack:
        accelerator = command_accelerator(TIMEOUT)
        # One process looks for all: a run in training may save another checkpoint.
        checkpoint = run_on_main(accelerator, lambda: checkpoint_of(stack.enter_context(local_run(settings.run))))
        encoder = _encoder(checkpoint, str(accelerator.device))
        splits, classes = open_splits(settings)
        planned = plan(settings, checkpoint, splits, encoder)

        def begin_on_main() -> dict[str, Any]:
            begin(stack.enter_context(locked(settings.out)), planned)
            return planned

        if run_on_main(accelerator, begin_on_main) != planned:
            raise DataError("this process finds other shards, settings or versions than the main process")
        options = {name: getattr(settings, name) for name in ("mean_only", "mirror", "dtype")}
        writer = LatentWriter(encoder, unfinished_of(settings.out), form=settings.format, **options)
        tasks = [Task(split, shards, i) for split, shards in splits.items() for i in range(len(shards.shards))]
        encode(writer, tasks[accelerator.process_index :: accelerator.num_processes], settings.workers, accelerator)
        _wait(accelerator)
        if accelerator.is_main_process:
            print(finish(settings.out, writer, tasks, classes, planned, checkpoint))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def open_splits(settings: argparse.Namespace) -> tuple[dict[str, Shards], list[str]]:
    """Return the shards of each split, and the classes' names.

    Raises:
        DataError: there are no shards, or they are damaged.
    """
    source, folder = settings.shards, Path(settings.shards)
    cache = Cache(settings.cache, int(settings.cache_gb * 1e9)) if settings.cache else None
    limits = Limits(settings.max_pixels, settings.max_bytes, settings.max_scans)
    whole = read_dataset(folder) if folder.is_dir() else None
    if whole:
        places = {split: str(folder / split) for split in whole.splits}
    else:
        name = folder.resolve().name if folder.is_dir() else ""
        places = {name if name.isidentifier() else "train": source}
    described = whole or (read_dataset(folder.resolve().parent) if folder.is_dir() else None)
    classes = described.classes if described else []
    return {split: Shards(place, cache=cache, limits=limits) for split, place in places.items()}, classes


def plan(
    settings: argparse.Namespace, checkpoint: Path, splits: dict[str, Shards], encoder: LatentEncoder
) -> dict[str, Any]:
    """Return what decides the bytes of the latents, and where the images come from."""
    saved = schemas.checkpoint(checkpoint)
    return {
        "source": redacted(settings.shards),
        "images": {split: shards.fingerprint() for split, shards in splits.items()},
        "checkpoint": saved.sha256,
        "step": saved.step,
        "size": plain(encoder.size),
        "channels": encoder.format.channels,
        "bits": encoder.format.bits,
        "crop": "the largest centred part of the shape of size",
        "latent_shape": [*encoder.system.latent_shape],
        "mean_only": settings.mean_only,
        "mirror": settings.mirror,
        "dtype": settings.dtype,
        "format": settings.format,
        "device": encoder.device.partition(":")[0],
        "torch": str(torch.__version__),
    }


def encode(writer: LatentWriter, tasks: list[Task], workers: int, accelerator: Accelerator) -> None:
    """Write the shards of this process that are not finished, with a progress bar of the main process."""
    todo = [task for task in tasks if not writer.is_finished(task)]
    total = sum(len(task.positions) for task in tasks)
    done = total - sum(len(task.positions) for task in todo)
    hidden = None if accelerator.is_main_process else True
    with tqdm(total=total, initial=done, desc="encoding", unit="image", disable=hidden) as bar:
        if todo:
            arriving = read_ahead(todo, writer.encoder, workers)
            for task in todo:
                for images in writer.write(task, arriving):
                    bar.update(images)


def read_ahead(tasks: list[Task], encoder: LatentEncoder, workers: int) -> Iterator[Any]:
    """Yield the images of shards in the encoder's blocks, decoded ahead by worker processes."""
    blocks = [
        (task.shards, task.positions[rows.start : rows.stop])
        for task in tasks
        for rows in encoder.rows(len(task.positions))
    ]
    return load(PositionBlocks(blocks, *encoder.format), range(len(blocks)), workers)


def finish(
    out: Path, writer: LatentWriter, tasks: list[Task], classes: list[str], planned: dict[str, Any], checkpoint: Path
) -> str:
    """Complete the data set, and return what the user is told."""
    splits = {
        split: writer.describe([task for task in tasks if task.split == split])
        for split in dict.fromkeys(task.split for task in tasks)
    }
    configuration = redacted_all(manifest.read(checkpoint)["configuration"])
    settings = {name: value for name, value in planned.items() if name != "source"} | {"configuration": configuration}
    fingerprint = dataset_fingerprint(classes, splits)
    complete(
        unfinished_of(out),
        out,
        Dataset(
            source=planned["source"],
            settings=settings,
            fingerprint=fingerprint,
            classes=classes,
            splits=splits,
            rejected=[],
        ),
    )
    lines = []
    for name, split in splits.items():
        assert split.latents
        lines.append(
            f"{name}: {split.images:,} latents {planned['latent_shape']}, {split.image_bytes:,} bytes, scaling_factor "
            f"{split.latents.scaling_factor:.5g}, shift_factor {split.latents.shift_factor:.5g}"
        )
    return "\n".join([f"{out}, fingerprint of all samples {fingerprint}", *lines])


def _encoder(checkpoint: Path, device: str) -> LatentEncoder:
    data = schemas.checkpoint(checkpoint).configuration.data
    return LatentEncoder(models.load(checkpoint), data.size, data.channels, device, data.bits)


def _wait(accelerator: Accelerator) -> None:
    """Wait until all processes have finished their shards; raise RunError if one is gone."""
    try:
        accelerator.wait_for_everyone()
    except RuntimeError as error:
        if not is_network_error(error):
            raise
        raise RunError("another process is gone: see its own message. The same command continues") from error
