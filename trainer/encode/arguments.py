"""Encode a data set to latents: `python -m trainer.encode RUN SHARDS OUT`.

RUN is the folder of a run, whose newest checkpoint encodes, of a checkpoint, or of an export. SHARDS is a folder of
WebDataset shards, their index.json, a URL of either, or a data set that `python -m data.prepare` made, of which every
split is encoded. Images are cropped and resized as RUN reads them: to the largest centred part of its images' shape.

OUT becomes a folder of WebDataset shards for each split, with the same keys, labels and other members, and
dataset.json, which has the latents' mean, deviation and scaling_factor. Its bytes do not depend on the number of
processes: `accelerate launch -m trainer.encode RUN SHARDS OUT` shares the shards among several. To continue after an
interruption, run the same command again; OUT appears when it is complete.
"""

import argparse
import os
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveFloat

from data.command import add_limits
from data.latents import FORMATS, TYPES
from trainer.distributed.exit import CommandParser
from trainer.run_place import run_place


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the settings of the command line; exit with code 2 if they do not fit together."""
    made = parser()
    settings = made.parse_args(arguments)
    if settings.dtype == "bf16" and settings.format == "npy":
        made.error("--dtype bf16 cannot be written as --format npy, which lacks it: use safetensors, or fp16 or fp32")
    return settings


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="python -m trainer.encode",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "run",
        metavar="RUN",
        type=run_place,
        help="folder of a run, of a checkpoint or of an export, or the URL of a run",
    )
    add("shards", metavar="SHARDS", help="images to encode")
    add("out", metavar="OUT", type=Path, help="folder to make; it must not exist yet")
    add("--mean_only", action="store_true", help="leave out the log-variance, which a draw of z needs")
    add("--mirror", action="store_true", help="encode each image's mirror image, too, beside it in its sample")
    add("--dtype", choices=TYPES, default="fp16", help="type of the numbers (default: %(default)s)")
    add("--format", choices=FORMATS, default="safetensors", help="of a sample's latents (default: %(default)s)")
    cores = min(8, len(os.sched_getaffinity(0)))
    processes = "processes that decode ahead for each process that encodes; 0 decodes in that (default: %(default)s)"
    add("--workers", type=NonNegativeInt, default=cores, metavar="N", help=processes)
    add("--cache", metavar="FOLDER", help="folder on a local disk that keeps remote shards")
    add(
        "--cache_gb", type=PositiveFloat, default=50.0, metavar="GB", help="most gigabytes in it (default: %(default)s)"
    )
    add_limits(made)
    return made
