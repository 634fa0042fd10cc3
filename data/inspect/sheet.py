"""A picture of some images of each class."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.dataset import Dataset
from data.files import escaped
from data.images import LIMITS, Limits, decode_whole
from data.shards.reader import Shards

TILE, MARGIN, TOP = 96, 6, 64  # pixels
ACROSS, MOST_CLASSES = 10, 40  # tiles in a row; classes that are shown


def sheet(folder: Path, dataset: Dataset, limits: Limits = LIMITS) -> Image.Image:
    """Return a picture of the first split with a row of images per class; four rows if there are no classes."""
    split = next(iter(dataset.splits))
    shards = Shards(folder / split if (folder / split).is_dir() else folder, limits=limits)
    labels = np.unique(shards.labels)
    chosen = _spaced(labels, MOST_CLASSES).tolist()
    names = [escaped(dataset.class_name(label))[:40] if label >= 0 else "no class" for label in chosen]
    lines = 1 if len(labels) > 1 else 4
    title, small = (ImageFont.load_default(size) for size in (20, 14))
    step, left = TILE + MARGIN, 4 * MARGIN + max(60, *(int(small.getlength(name)) for name in names))
    page = Image.new("RGB", (left + ACROSS * step + MARGIN, TOP + len(chosen) * lines * step + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    note = f"{len(shards):,} images" + (f", {len(labels):,} classes" if len(labels) > 1 else "")
    note += f", of which {len(chosen)} are shown" if len(chosen) < len(labels) else ""
    draw.text((2 * MARGIN, 10), escaped(f"{folder.resolve().name}, {split}"), "black", title)
    draw.text((2 * MARGIN, 36), note, "dimgray", small)
    for row, (label, name) in enumerate(zip(chosen, names, strict=True)):
        positions, y = np.flatnonzero(shards.labels == label), TOP + row * step
        draw.text((2 * MARGIN, y + TILE // 2 - 18), name, "black", small)
        draw.text((2 * MARGIN, y + TILE // 2 + 2), f"{len(positions):,}", "dimgray", small)
        for i, position in enumerate(_spaced(positions, lines * ACROSS).tolist()):
            tile, corner = _tile(shards, position), (left + i % ACROSS * step, y + i // ACROSS * step)
            page.paste(tile, (corner[0] + (TILE - tile.width) // 2, corner[1] + (TILE - tile.height) // 2))
    return page


def _spaced(values: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the values, evenly spaced."""
    return values[np.linspace(0, len(values) - 1, min(len(values), most)).astype(int)]


def _tile(shards: Shards, position: int) -> Image.Image:
    try:
        image = decode_whole(shards.image(position), shards.limits).convert("RGB")
    except ValueError:  # --verify says why
        tile = Image.new("RGB", (TILE, TILE), "mistyrose")
        ImageDraw.Draw(tile).text((8, 8), "damaged", "firebrick", ImageFont.load_default(14))
        return tile
    is_small = max(image.size) * 2 <= TILE  # enlarged without blur
    size = [max(1, round(side * TILE / max(image.size))) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.NEAREST if is_small else Image.Resampling.BICUBIC)
