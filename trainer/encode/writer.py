"""Latents of a shard of images, as a shard of the same samples."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import webdataset
from torch import Tensor

from data.dataset import Split
from data.errors import DataError
from data.files import atomically, parse, read, sha256
from data.inspect.summary import DatasetSummary
from data.inspect.verify import describe_split
from data.latents import MIRRORED, TYPES, describe, pack
from data.loader import Images
from data.shards.reader import Shards
from trainer.latents import LatentEncoder, LatentSums


class Task(NamedTuple):
    """A shard to encode: of a split, the shard with a number."""

    split: str
    shards: Shards
    number: int

    @property
    def tar(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"

    @property
    def report(self) -> str:
        return f"{self.split}-{self.number:05d}.json"

    @property
    def positions(self) -> range:
        """Its samples' positions in the split."""
        end = int(self.shards.ends[self.number])
        return range(end - int(self.shards.counts[self.number]), end)


class Report(msgspec.Struct):
    """What a finished shard holds."""

    sha256: str  # of the file
    summary: dict[str, Any]  # of the samples, as DatasetSummary has it
    sums: list[list[list[float]]]  # of the latents, as LatentSums has them in `parts`


class LatentWriter:
    """Encodes images and writes their latents: a shard, `out/SPLIT/NUMBER.tar`, after a report of what it holds.

    Args:
        encoder: gives the latents
        unfinished: folder of the reports and of `out`
        mean_only, mirror, dtype, form: as the command's options
    """

    def __init__(
        self, encoder: LatentEncoder, unfinished: Path, *, mean_only: bool, mirror: bool, dtype: str, form: str
    ):
        self.encoder, self.unfinished = encoder, unfinished
        self.mean_only, self.mirror, self.dtype, self.form = mean_only, mirror, dtype, form

    def write(self, task: Task, arriving: Iterator[list[Images]]) -> Iterator[int]:
        """Write a shard and yield the number of images after each block of them, of which `arriving` gives the next.

        Raises:
            DataError: an image is damaged or cannot be read.
            ValueError: a latent is not finite in the type of numbers.
        """
        tar = self.unfinished / "out" / task.tar
        tar.parent.mkdir(parents=True, exist_ok=True)
        samples = iter(task.shards.others(task.number))
        summary, sums = DatasetSummary(), self._sums()
        with atomically(tar, self.unfinished / f"{task.report}.tar") as path:
            # One thread writes a block while the encoder is at the next one.
            with open(path, "wb") as file, webdataset.TarWriter(file, mtime=0) as writer, ThreadPoolExecutor(1) as pool:
                written: Future[None] | None = None
                for _, [images] in zip(self.encoder.rows(len(task.positions)), arriving, strict=False):
                    latents = self._encode(task.shards, images)
                    if written:
                        written.result()
                    written = pool.submit(self._write, writer, samples, images, latents, summary, sums)
                    yield len(images.image)
                if written:
                    written.result()
            report = Report(sha256(path), summary.to_json(), sums.parts.tolist())
            with atomically(self.unfinished / task.report) as beside:
                beside.write_text(json.dumps(msgspec.to_builtins(report)))

    def is_finished(self, task: Task) -> bool:
        """Return whether a shard is whole: its bytes are those of its report."""
        try:
            report = parse(read(self.unfinished / task.report), Report)
            return report.sha256 == sha256(self.unfinished / "out" / task.tar)
        except (OSError, ValueError):
            return False

    def describe(self, tasks: list[Task]) -> Split:
        """Return what dataset.json says of a split's shards, all of which are finished."""
        sums, parts = self._sums(), list[tuple[Path, DatasetSummary]]()
        for task in tasks:
            report = parse(read(self.unfinished / task.report), Report)
            sums.parts += torch.tensor(report.sums, dtype=torch.float64)
            parts.append((self.unfinished / "out" / task.tar, DatasetSummary(**report.summary)))
        return msgspec.structs.replace(describe_split(parts), latents=sums.compute())

    def _sums(self) -> LatentSums:
        return LatentSums(self.encoder.system.latent_shape[0], "means" if self.mean_only else "draws")

    def _encode(self, shards: Shards, images: Images) -> dict[str, Tensor]:
        """Return the latents of images by name, [n, *latent_shape]."""
        latents = {}
        for copy in ("", MIRRORED) if self.mirror else ("",):
            mean, log_variance = self.encoder(images.image.flip(-1) if copy else images.image)
            latents[f"{copy}mean"] = mean.to(TYPES[self.dtype])
            if not self.mean_only:
                latents[f"{copy}log_variance"] = log_variance.to(TYPES[self.dtype])
        for name, values in latents.items():
            kept = values.isfinite() | values.isneginf() if name.endswith("log_variance") else values.isfinite()
            if not kept.all():
                row = int((~kept.flatten(1).all(1)).nonzero()[0])
                where = shards.name(int(images.position[row]))
                raise ValueError(f"the {name} of {where} is too large for --dtype {self.dtype}: use bf16 or fp32")
        return latents

    def _write(
        self,
        writer: webdataset.TarWriter,
        samples: Iterator[tuple[str, dict[str, bytes]]],
        images: Images,
        latents: dict[str, Tensor],
        summary: DatasetSummary,
        sums: LatentSums,
    ) -> None:
        for copy in ("", MIRRORED) if self.mirror else ("",):
            sums.update(latents[f"{copy}mean"], latents.get(f"{copy}log_variance"))
        description = describe({"mean": latents["mean"][0]}, self.form)
        for content, label in zip(pack(latents, self.form), images.label.tolist(), strict=True):
            key, others = next(samples)
            if self.form in others:
                raise DataError(
                    f"sample {key} has a member .{self.form}, where its latents go: choose another --format"
                )
            writer.write({"__key__": key, self.form: content, **others})
            summary.count(key, content, label, description)
