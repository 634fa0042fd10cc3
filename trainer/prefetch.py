"""Download the weights of feature extractors, for machines without a network: `python -m trainer.prefetch NAME ...`.

NAME is inception, lpips (torchvision's VGG16, for --evaluate.lpips), or an extractor of torch-fidelity, such as
dinov2-vit-l-14. The weights are stored in TORCH_HOME (now %(home)s), where runs look for them. Set it to a folder that
the compute nodes can read, both here and in their jobs.
"""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()

import argparse
import hashlib
from pathlib import Path

import torch

from trainer.distributed.exit import CommandParser, user_errors
from trainer.evaluate.extractors.extractor import weights_sha256
from trainer.evaluate.extractors.inception import inception
from trainer.evaluate.extractors.registered import registered


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(
        prog="python -m trainer.prefetch",
        description=(__doc__ or "") % {"home": torch.hub.get_dir()},
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="name of an extractor, or lpips")
    for name in parser.parse_args(arguments).names:
        with user_errors():
            print(f"{name}: {fetch(name)}", flush=True)


def fetch(name: str) -> str:
    """Download an extractor's weights into TORCH_HOME if they are missing; return their place and checksum.

    Raises:
        ValueError: the name is unknown, the download failed, or the file in TORCH_HOME is damaged.
    """
    if name == "inception":
        extractor = inception(None)
        if extractor.name != "inception-v3":
            raise ValueError(
                f"{extractor.path} is not the published InceptionV3: its sha256 is {extractor.sha256}. Remove it"
            )
        return f"{extractor.path}, sha256 {extractor.sha256}"
    if name == "lpips":
        return _vgg16()
    return f"in {torch.hub.get_dir()}, weights of sha256 {weights_sha256(registered(name).network)}"


def _vgg16() -> str:
    from torchvision.models import VGG16_Weights

    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"torchvision's VGG16 could not be downloaded from {weights.url}: {error}") from error
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    return f"{path}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}: --evaluate.lpips {path}"


if __name__ == "__main__":
    run_command(main)
