"""Make pictures with a trained system: `python -m trainer.generate COMMAND CHECKPOINT --out FOLDER`.

CHECKPOINT is the folder of a checkpoint, or of a run, whose newest checkpoint is used. The averaged weights (EMA) make
the pictures. Picture i is the same whatever --num is. Images of --images that cannot be read are left out and named at
the end, and the exit code is then 1. A folder that data.prepare wrote stands for its held-out images.
"""

import argparse
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from trainer.distributed.exit import CommandParser
from trainer.run_place import run_place
from trainer.samplers import add_sampler_options

FORMATS = ("png", "gif", "mp4")
COMMANDS = {
    "sample": "images that are drawn",
    "reconstruct": "images beside their reconstructions",
    "decode": "images of latents, as python -m trainer.encode writes them",
    "interpolate": "a strip or a film from one image to the next",
    "edit": "images with more and less of a label, such as a smile",
    "neighbours": "images beside the training images whose codes are nearest",
    "translate": "images beside their translations into the other domain",
}
FOLDER: dict[str, Any] = dict(metavar="FOLDER", type=Path)


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="python -m trainer.generate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    chosen = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = {name: chosen.add_parser(name, help=what, description=what) for name, what in COMMANDS.items()}
    for command in commands.values():
        command.add_argument(
            "checkpoint", metavar="CHECKPOINT", type=run_place, help="folder of a checkpoint or of a run, or its URL"
        )
        command.add_argument("--out", required=True, help="folder for PNGs; replaces those of the same name", **FOLDER)
        command.add_argument("--device", help="torch's name of a device (default: cuda if there is one, else cpu)")
    for name in (name for name in COMMANDS if name != "translate"):
        text = (
            "classes of the images in turn, such as 3,7, if the system was trained with system.classes (default: all "
            "of them; labels of LATENTS; required for --images and interpolate)"
        )
        commands[name].add_argument("--classes", type=_classes, metavar="K,...", help=text)
    for name in ("reconstruct", "translate"):
        commands[name].add_argument("--images", required=True, help="folder of images or WebDataset shards", **FOLDER)
        _add_num(commands[name], "all")
        _add_whole(commands[name])
    commands["translate"].add_argument(
        "--direction", choices=["a2b", "b2a"], required=True, help="source and target domain"
    )
    commands["decode"].add_argument("latents", metavar="LATENTS", type=Path, help="folder of WebDataset shards")
    _add_num(commands["decode"], "all")
    for name in ("sample", "decode"):
        text = "write WebDataset shards into --out, a new folder"
        commands[name].add_argument("--shards", action="store_true", help=text)
    _add_seed(commands["interpolate"])
    _add_interpolate(commands["interpolate"])
    _add_sample(commands["sample"])
    for name in ("edit", "neighbours"):
        text = "folder of images or WebDataset shards (default: images that are drawn)"
        commands[name].add_argument("--images", help=text, **FOLDER)
        _add_num(commands[name], "all of --images, or 64 that are drawn", grid=16)
        _add_seed(commands[name])
        add_sampler_options(commands[name])
    _add_edit(commands["edit"])
    nearest = "number of training images beside each image (default: 7)"
    commands["neighbours"].add_argument("--nearest", type=PositiveInt, default=7, help=nearest)
    return made


def _classes(text: str) -> list[int]:
    return [NonNegativeInt(part) for part in text.split(",")]


def _add_num(command: CommandParser, usual: str, grid: int = 64) -> None:
    text = f"number of images, if there are as many (default: {usual}, or {grid} in a grid)"
    command.add_argument("--num", type=PositiveInt, help=text)
    command.add_argument("--grid", action="store_true", help="write a single PNG that shows all images")


def _add_whole(command: CommandParser) -> None:
    add = command.add_argument
    add("--whole", action="store_true", help="keep the images' own sizes (networks of convolutions alone)")
    tiles = "as --whole, in tiles of this side, blended over a quarter of it where they overlap, to save memory"
    add("--tile", type=PositiveInt, metavar="PIXELS", help=tiles)


def _add_seed(command: CommandParser) -> None:
    command.add_argument("--seed", type=NonNegativeInt, default=0, help="seed of the samples (default: 0)")


def _add_sample(command: CommandParser) -> None:
    _add_num(command, "10000")
    _add_seed(command)
    add_sampler_options(command)


def _add_interpolate(command: CommandParser) -> None:
    ends = "two or more image files, or numbers of samples, on the way from the first to the last"
    command.add_argument("--between", metavar="END", nargs="+", required=True, help=ends)
    command.add_argument("--format", choices=FORMATS, default="png", help="a strip, or a film (default: png)")
    steps = "pictures from an end to the next one, with both (default: 9 in a strip, 49 in a film)"
    command.add_argument("--steps", type=PositiveInt, help=steps)
    command.add_argument("--fps", type=PositiveInt, help="pictures of a film in a second (default: 24)")


def _add_edit(command: CommandParser) -> None:
    add = command.add_argument
    add("--with", dest="with_", metavar="LABEL", required=True, help="label, or its name, of images that have it")
    add("--without", metavar="LABEL", help="label of those that do not have it (default: all other labels)")
    add("--strengths", type=float, nargs="+", default=[-1.0, 0.0, 1.0], help="how much of it (default: -1 0 1)")
