"""Pictures as files: PNGs, grids, films and WebDataset shards."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.files import atomically
from data.shards.reader import write as write_samples
from trainer.batch import visible_pixels
from trainer.extras import needs
from trainer.generate.panels import Pictures
from trainer.log.pictures import below_originals, encoded, grid, picture

FILM_SIZE = 256  # pixels a side of a film's smaller images, which are enlarged by a whole number


def write(pictures: Pictures, out: Path) -> set[Path]:
    """Write a PNG for each name, or a .npy file where that does not hold it, with its panels side by side.

    Return the paths.
    """
    written = set()
    for names, panels in pictures:
        for name, *images in zip(names, *panels.values(), strict=True):
            ending, content = encoded(torch.cat(images, dim=-1))
            path = out / f"{name}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written.add(path)
    return written


def write_grid(pictures: Pictures, path: Path, strips: bool) -> set[Path]:
    """Write a single PNG that shows all images; return its path.

    Args:
        pictures: names and panels
        path: of the PNG
        strips: show a row for each name, with its panels side by side, instead of what is made of images below them
    """
    parts = [panels for _, panels in pictures]
    whole = {title: torch.cat([panels[title] for panels in parts]) for title in parts[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    if strips:
        drawn = grid({"": torch.stack([*whole.values()], 1).flatten(0, 1)}, len(whole), headings=[*whole])
    else:
        columns = min(len(next(iter(whole.values()))), math.ceil(math.sqrt(sum(map(len, whole.values())))))
        drawn = grid(below_originals(whole, columns), columns)
    with atomically(path) as unfinished:
        drawn.save(unfinished, "PNG")
    return {path}


def write_strips(pictures: Pictures, out: Path) -> set[Path]:
    """Write a titled PNG for each name, with its panels in a row; return the paths."""
    written = set()
    for names, panels in pictures:
        for name, *images in zip(names, *panels.values(), strict=True):
            out.mkdir(parents=True, exist_ok=True)
            drawn = grid({name.replace("_to_", " to "): torch.stack(images)}, columns=len(images))
            with atomically(path := out / f"{name}.png") as unfinished:
                drawn.save(unfinished, "PNG")
            written.add(path)
    return written


def write_films(pictures: Pictures, out: Path, kind: str, fps: int) -> set[Path]:
    """Write a film for each name, whose pictures are the panels; return the paths.

    Args:
        pictures: names and panels
        out: a folder
        kind: "gif", which loops, or "mp4" (H.264)
        fps: pictures in a second

    Raises:
        ValueError: MP4 needs a package that is not installed.
    """
    save = {"gif": _save_gif, "mp4": _save_mp4}[kind]
    if kind == "mp4":
        needs("--format mp4", "video", "imageio_ffmpeg")
    written = set()
    for names, panels in pictures:
        for name, *images in zip(names, *panels.values(), strict=True):
            path = out / f"{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomically(path) as unfinished:
                save([_enlarged(image) for image in images], unfinished, fps)
            written.add(path)
    return written


def _enlarged(pixels: Tensor) -> Image.Image:
    _, height, width = pixels.shape
    scale = max(1, FILM_SIZE // max(height, width))
    return picture(visible_pixels(pixels[None])[0]).resize((width * scale, height * scale), Image.Resampling.NEAREST)


def _save_gif(frames: list[Image.Image], path: Path, fps: int) -> None:
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def _save_mp4(frames: list[Image.Image], path: Path, fps: int) -> None:
    ffmpeg = needs("--format mp4", "video", "imageio_ffmpeg")
    # yuv420p, which all players know, halves the colour's sides; these are even, as those of all networks' images are.
    options = {"fps": fps, "macro_block_size": 2, "output_params": ["-f", "mp4", "-movflags", "+faststart"]}
    film = ffmpeg.write_frames(str(path), frames[0].size, **options)
    film.send(None)
    for frame in frames:
        film.send(frame.convert("RGB").tobytes())
    film.close()


def write_shards(pictures: Pictures, out: Path) -> int:
    """Write the images of the only panel as WebDataset shards into a new folder; return their number.

    Their members are PNGs, or .image.npy where that does not hold them. The folder appears when it is complete.

    Raises:
        OSError: the folder exists and is not empty, or the disk is full.
    """

    def samples() -> Iterator[dict[str, Any]]:
        for names, panels in pictures:
            (images,) = panels.values()
            for name, pixels in zip(names, images, strict=True):
                ending, content = encoded(pixels)
                yield {"__key__": name, ending.replace("npy", "image.npy"): content}

    out.parent.mkdir(parents=True, exist_ok=True)
    with atomically(out) as unfinished:
        return write_samples(unfinished, samples())
