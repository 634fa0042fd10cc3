"""Make pictures with a trained system: `python -m trainer.generate COMMAND CHECKPOINT --out FOLDER`.

CHECKPOINT is the folder of a checkpoint, or of a run, whose newest checkpoint is used. The averaged weights (EMA) make
the pictures. Picture i is the same whatever --num is.
"""

import argparse
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from trainer.distributed.exit import CommandParser


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="python -m trainer.generate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    sample = commands.add_parser("sample", help="images from draws of the prior")
    reconstruct = commands.add_parser("reconstruct", help="images beside their reconstructions")
    interpolate = commands.add_parser("interpolate", help="a strip from one image to another")
    translate = commands.add_parser("translate", help="images beside their translations into the other domain")
    folder: dict[str, Any] = dict(metavar="FOLDER", type=Path, required=True)
    for command in (sample, reconstruct, interpolate, translate):
        command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a checkpoint or of a run")
        command.add_argument("--out", help="folder for PNGs; replaces those of the same name", **folder)
        command.add_argument("--device", help="torch's name of a device (default: cuda if there is one, else cpu)")
    for command, usual in (sample, "10000"), (reconstruct, "all"), (translate, "all"):
        command.add_argument("--num", type=PositiveInt, help=f"number of images (default: {usual}, or 64 in a grid)")
        command.add_argument("--grid", action="store_true", help="write a single PNG that shows all images")
    for command in (reconstruct, translate):
        command.add_argument("--images", help="folder of images or WebDataset shards", **folder)
    for command in (sample, interpolate):
        command.add_argument("--seed", type=NonNegativeInt, default=0, help="seed of the samples (default: 0)")
    ends = "two image files, or the numbers of two samples"
    interpolate.add_argument("--between", metavar=("A", "B"), nargs=2, required=True, help=ends)
    interpolate.add_argument("--steps", type=PositiveInt, default=9, help="pictures in the strip (default: 9)")
    translate.add_argument("--direction", choices=["a2b", "b2a"], required=True, help="source and target domain")
    return made
