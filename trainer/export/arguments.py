"""Export a trained system: `python -m trainer.export RUN OUT`.

RUN is the folder of a run, whose newest checkpoint is used, or of a checkpoint. OUT appears when it is complete:

  manifest.json, *.safetensors   the averaged weights: models.load(OUT), trainer.generate and trainer.evaluate open OUT
  config.json                    sizes, and the mean and deviation of the latents; diffusers opens OUT of family kl
  README.md, pictures.png        a model card with scores, settings and pictures
  scores.json                    the checkpoint's scores, if it has any
"""

import argparse
from pathlib import Path

from jsonargparse.typing import NonNegativeInt

from trainer.distributed.exit import CommandParser
from trainer.run_place import run_place


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="python -m trainer.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("run", metavar="RUN", type=run_place, help="folder of a run or of a checkpoint, or its URL")
    add("out", metavar="OUT", type=Path, help="new folder")
    add("--overwrite", action="store_true", help="replace OUT if it is an older export")
    number = "images of which latents are measured; 0 reads no images (default: 10000, or all if there are fewer)"
    add("--num", type=NonNegativeInt, default=10_000, help=number)
    shown = (
        "folder of images or shards to measure and show (default: measures the run's data.train, shows its data.test)"
    )
    add("--images", metavar="FOLDER", help=shown)
    length = (
        "average the weights over this length, such as 0.08, instead of by the run's own half-life; needs a run with "
    )
    add("--ema_length", metavar="LENGTH", type=float, help=length + "trainer.ema_lengths")
    add("--onnx", action="store_true", help="add encoder.onnx and decoder.onnx, or those of translators")
    add("--torch_export", action="store_true", help="add the same as .pt2, which torch.export.load opens")
    add("--full", action="store_true", help="add OUT/training, a run's folder with which others can go on training")
    add("--license", metavar="NAME", help="licence in the model card, such as apache-2.0 or cc-by-4.0")
    add("--push", metavar="ORG/NAME", help="upload OUT to the Hugging Face hub")
    add("--private", action="store_true", help="make the pushed model private, if it is new")
    add("--device", help="torch's name of a device (default: cuda if there is one, else cpu)")
    return made
