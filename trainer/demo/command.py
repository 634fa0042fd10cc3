"""Play with a trained system in a browser: `python -m trainer.demo CHECKPOINT`.

CHECKPOINT is the folder of a checkpoint, or of a run, whose newest checkpoint is used, with its averaged weights (EMA).
The page shows what the system can do: reconstructions of images that you drop on it, with a map of their errors;
sliders over the leading directions of the code; interpolation between two images; samples; translations. Only this
machine can open it, unless --host says otherwise. Ctrl-C ends it.
"""

import argparse
import os
import tempfile
import threading
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from trainer.distributed.exit import CommandParser, user_errors
from trainer.extras import needs
from trainer.run_place import local_run, run_place

LOOPBACK = "127.0.0.1"


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="python -m trainer.demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=run_place, help="folder of a checkpoint or of a run, or its URL"
    )
    images = "folder of images or WebDataset shards, for examples and directions (default: the run's data.test)"
    made.add_argument("--images", metavar="FOLDER", type=Path, help=images)
    num = "number of these images whose codes give the directions (default: 512)"
    made.add_argument("--num", type=PositiveInt, default=512, help=num)
    hosts = (
        f"address to listen on: {LOOPBACK} (default) is this machine alone, 0.0.0.0 every network, without a password"
    )
    made.add_argument("--host", default=LOOPBACK, help=hosts)
    made.add_argument("--port", type=PositiveInt, help="port to listen on (default: the first free one from 7860)")
    made.add_argument("--classes", type=NonNegativeInt, metavar="K", help="class of all images that the page makes")
    made.add_argument("--device", help="torch's name of a device (default: cuda if there is one, else cpu)")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    settings = parser().parse_args(arguments)
    with user_errors(), tempfile.TemporaryDirectory() as uploads:
        # Gradio reads these as it is imported. Nothing on the page needs a network.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": uploads}
        needs("python -m trainer.demo", "demo", "gradio")
        from trainer.demo.model import Model
        from trainer.demo.page import build_page, serve

        with local_run(settings.checkpoint) as run:
            model = Model(run, settings.images, settings.num, settings.device, settings.classes)
        page = build_page(model, Path(uploads))
        address = serve(page, settings.host, settings.port)
        print(f"{address} shows {model.title}. Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
