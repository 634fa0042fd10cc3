"""Images into shards, each by one call in any process."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image, ImageOps

from data.arrays import MAGIC, array, encode_npy, is_array
from data.dataset import Rejected
from data.deep import changed, encode_png, is_deep, over_white, read_deep, to_eight
from data.errors import DataError
from data.files import atomically, escaped
from data.images import FORMATS, MODES, decode_whole, header, sides
from data.inspect.summary import DatasetSummary
from data.prepare.plan import PrepareSettings, Task
from data.processes import run_in_parallel
from data.shards.names import save_names
from data.sources import Item

NPY = "NPY"  # the format of arrays, as which TIFFs of many channels are written
ENDINGS = {  # of a shard's members, by Pillow's name of the format or NPY; the first if the file's own does not fit
    "PNG": ("png",),
    "JPEG": ("jpg", "jpeg"),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "PPM": ("ppm", "pgm"),
    "TIFF": ("tif", "tiff"),
    "GIF": ("gif",),
    NPY: ("image.npy",),  # .npy alone may be latents
}
ENCODED = ("PNG", "JPEG", "WEBP")  # formats in which changed images are written


@dataclass
class Writer:
    """Writes a shard, `out/SPLIT/NUMBER.tar`, and before it its images' names and a report of what it holds."""

    read: Callable[[Item], tuple[bytes, int]]  # the source's reader
    settings: PrepareSettings  # how images are changed
    unfinished: Path  # folder of the reports and of `out`

    def __call__(self, task: Task, advance: Callable[[int], Any]) -> list[Rejected]:
        """Write a shard, and return the images that were left out."""
        summary, rejected, names = DatasetSummary(), list[Rejected](), list[str]()
        tar = self.unfinished / "out" / task.tar
        tar.parent.mkdir(parents=True, exist_ok=True)
        with atomically(tar, self.unfinished / f"{task.report}.tar") as path:
            with open(path, "wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
                for key, item in task.items:
                    try:
                        content, label = self.read(item)
                        ending, content = self._encoded(item, content)
                        summary.add(key, content, label, self.settings.limits)
                    except ValueError as error:
                        rejected.append(Rejected(item.name, str(error)))
                    else:
                        writer.write({"__key__": key, ending: content, **({"cls": str(label)} if label >= 0 else {})})
                        names.append(item.name)
                    advance(1)
            save_names(tar, path.stat().st_size, names, self.unfinished / f"{task.report}.names")
            listed = [[one.file, one.reason] for one in rejected]
            with atomically(self.unfinished / task.report) as path:
                path.write_text(json.dumps({"summary": summary.to_json(), "rejected": listed}))
        return rejected

    def report(self, task: Task) -> tuple[DatasetSummary, list[Rejected]]:
        """Return what a finished shard holds, and the images that were left out of it."""
        content = json.loads((self.unfinished / task.report).read_text())
        return DatasetSummary(**content["summary"]), [Rejected(*one) for one in content["rejected"]]

    def _encoded(self, item: Item, content: bytes) -> tuple[str, bytes]:
        if not content:
            raise ValueError("it holds no bytes")
        form, content = convert(content, self.settings)
        ending = Path(item.name).suffix.lower().lstrip(".")
        return ending if ending in ENDINGS[form] else ENDINGS[form][0], content


def convert(content: bytes, settings: PrepareSettings) -> tuple[str, bytes]:
    """Return an image's format and bytes in the size, crop and format of the settings; its own bytes if they fit.

    A changed image is upright, of mode L or RGB (or RGBA, where alpha is kept), and with the format `keep` JPEG or WebP
    if it was that, else PNG. Sixteen bits a channel stay sixteen in PNGs. An array stays one, as it is, with `keep`.

    Raises:
        ValueError: The bytes are no image or damaged, or the new image would be too large, or lose channels.
    """
    form, (width, height) = _form_and_size(content, settings)
    wanted = form if settings.format == "keep" else settings.format.upper()
    size = settings.size or min(width, height)
    fits = (height, width) == sides(size) if settings.crop else min(width, height) == size
    if fits and wanted == form:
        return form, content if form != NPY or content.startswith(MAGIC) else encode_npy(array(content))
    if is_array(content):
        pixels = array(content)
        if wanted == NPY:
            made = changed(read_deep(content, settings.limits), lambda image: _resized(image, settings))
            return wanted, encode_npy(made if pixels.dtype == np.uint16 else to_eight(made))
        if pixels.shape[2] not in MODES:
            raise ValueError(
                f"it has {pixels.shape[2]} channels, which {wanted} cannot hold: leave --format {settings.format} out"
            )
    wanted = wanted if wanted in ENCODED else "PNG"
    if wanted == "PNG" and is_deep(content):
        pixels = read_deep(content, settings.limits)
        pixels = pixels if settings.alpha else over_white(pixels)
        return wanted, encode_png(pixels if fits else changed(pixels, lambda image: _resized(image, settings)))
    image = decode_whole(content, settings.limits, settings.alpha)
    if not fits:
        image = _resized(image, settings)
    file = io.BytesIO()
    try:
        image.save(file, wanted, **({} if wanted == "PNG" else {"quality": settings.quality}))
    except (OSError, ValueError) as error:  # WebP ends at 16,383 pixels a side
        raise ValueError(f"it cannot be written as {wanted}: {error}") from error
    return wanted, file.getvalue()


def _form_and_size(content: bytes, settings: PrepareSettings) -> tuple[str, tuple[int, int]]:
    """Return an image's format, and its width and height."""
    if is_array(content):
        return NPY, header(content, settings.limits)[0]
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return str(image.format).replace("MPO", "JPEG"), image.size  # MPO: several JPEGs
    except Exception:
        decode_whole(content, settings.limits)  # raises with a reason for the user
        raise


def _resized(image: Image.Image, settings: PrepareSettings) -> Image.Image:
    size = settings.size or min(image.size)
    if settings.crop:
        return ImageOps.fit(image, sides(size)[::-1], Image.Resampling.BICUBIC)  # as a run does that reads the image
    assert isinstance(size, int)
    width, height = (round(side * size / min(image.size)) for side in image.size)
    if width * height > settings.max_pixels:
        raise ValueError(f"it would have {width} x {height} pixels, more than {settings.max_pixels:,}")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def write_shards(tasks: list[Task], writer: Writer, workers: int, max_rejected: float) -> list[Rejected]:
    """Write the shards that are not finished, and return the images that were left out of all of them.

    Raises:
        DataError: Too many were, or a worker process died.
    """
    total = sum(len(task.items) for task in tasks)
    rejected: list[Rejected] = []

    def collect(more: list[Rejected]) -> None:
        rejected.extend(more)
        if len(rejected) > max_rejected * total:
            reasons = "".join(f"\n  {escaped(one.file)}: {one.reason}" for one in rejected[:10])
            raise DataError(
                f"{len(rejected):,} of {total:,} images could not be read, more than --max_rejected {max_rejected}. "
                f"Repair or remove them, or raise --max_rejected to leave them out; the first are:{reasons}"
            )

    todo = []
    for task in tasks:
        if (writer.unfinished / "out" / task.tar).exists():
            collect(writer.report(task)[1])
        else:
            todo.append(task)
    done = total - sum(len(task.items) for task in todo)
    run_in_parallel(writer, todo, workers, collect, "preparing", total, done)
    return sorted(rejected, key=lambda one: one.file)
