"""Score a checkpoint, or images, against real images: `python -m trainer.evaluate WHAT [--against REAL]`.

WHAT is one of
  a run's folder      its newest checkpoint is scored
  a checkpoint        it is scored as in training, against the run's held-out images or those of --against
  images              a folder, an archive or WebDataset shards, scored against the images of --against

A folder that data.prepare wrote stands for its held-out images.

It prints a table of scores. For several processes: `accelerate launch -m trainer.evaluate WHAT`.
"""

import argparse
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from data.command import add_limits, size_of
from data.images import Size, sides
from trainer.distributed.exit import CommandParser
from trainer.metrics import METRICS
from trainer.samplers import add_sampler_options


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="python -m trainer.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("what", metavar="WHAT", help="a run's folder, a checkpoint's folder, the URL of one, or images")
    add("--against", metavar="REAL", help="real images, or an .npz of their statistics (default: the run's data.test)")
    add(
        "--num",
        type=_number,
        help="number of images to score (default: all, or 10000 samples if the run scores any)",
    )
    names = ",".join(METRICS)
    add("--metrics", type=_metrics, help=f"which scores samples get (default: {names}; prdc: precision, recall, ...)")
    add("--extractor", help="feature extractor, as evaluate.extractor (default: the run's, or inception for images)")
    add("--weights", metavar="FILE", help="the extractor's weights (default: inception's are downloaded)")
    add("--lpips", metavar="FILE", help="torchvision's vgg16 weights; adds LPIPS of reconstructions")
    add(
        "--statistics",
        metavar="PATH",
        type=Path,
        help="folder that keeps statistics of the real images (default: the run's)",
    )
    add("--unverified", action="store_true", help="accept an .npz that does not say which images it describes")
    add(
        "--size",
        type=_size,
        help='crop and resize images to PIXELS a side, or to "[HEIGHT, WIDTH]" (default: their own, the same for all)',
    )
    channels = "1 for grey, 3 for colour, 4 to write alpha, too, with --out (default: as the first image)"
    add("--channels", type=PositiveInt, help=channels)
    add("--seed", type=NonNegativeInt, help="seed of the samples (default: the run's)")
    add_sampler_options(made)
    add("--cache", metavar="FOLDER", help="folder on a local disk that keeps a run's remote shards")
    add("--cache_gb", type=PositiveFloat, help="most gigabytes in --cache (default: the run's)")
    add("--out", metavar="FOLDER", type=Path, help="also write the scored images as PNG into this new folder")
    add("--json", action="store_true", help="also print one line of JSON: the scores and all that they depend on")
    add("--audit", action="store_true", help="compute the scores again by torch-fidelity; exit with 1 if one differs")
    add_limits(made)
    return made


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2; got {text}")
    return int(text)


def _size(text: str) -> Size:
    size = size_of(text)
    if not all(8 <= side <= 4096 for side in sides(size)):
        raise argparse.ArgumentTypeError(f"must be between 8 and 4096 pixels; got {text}")
    return size


def _metrics(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"must be some of {','.join(METRICS)}; got {', '.join(unknown)}")
    return names
