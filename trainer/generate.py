"""Make pictures with a trained system: `python -m trainer.generate COMMAND CHECKPOINT --out FOLDER`.

CHECKPOINT is the folder of a checkpoint, or of a run, whose newest checkpoint is used. The averaged weights (EMA) make
the pictures. Picture i is the same whatever --num is.
"""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import models
from data.errors import DataError
from data.files import read as read_file
from data.images import LIMITS, decode
from data.loader import read
from data.shards.reader import Shards
from data.sources import find
from models.load import checkpoint_of
from trainer import schemas
from trainer.batch import normalize, to_uint8
from trainer.distributed.exit import CommandParser, user_errors
from trainer.draws import prior
from trainer.log.pictures import Panels, grid, interpolate
from trainer.precision import strict_fp32

Ability = Literal["sample", "reconstruct", "translate"]
# The ability that a system needs for each command.
NEEDS: dict[str, Ability] = dict(
    sample="sample", reconstruct="reconstruct", interpolate="sample", translate="translate"
)
Blocks = Iterator[tuple[Sequence[str], Panels]]  # names of pictures, and the panels that form each picture


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


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    settings = parser().parse_args(arguments)
    out, command = settings.out, settings.command
    with user_errors():
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file: name a folder, new or existing")
        generator = Generator(settings.checkpoint, command, settings.device)
        if command == "interpolate":
            written = write(generator.interpolate(settings.between, settings.steps, settings.seed), out)
        else:
            num = settings.num or (64 if settings.grid else None)
            if command == "sample":
                blocks = generator.sample(num or 10_000, settings.seed)
            elif out.resolve().is_relative_to(settings.images.resolve()):
                raise ValueError(f"--out {out} lies in --images {settings.images}: name a folder outside it")
            else:
                blocks = generator.compare(settings.images, num, getattr(settings, "direction", None))
            written = write_grid(blocks, out / f"{command}.png") if settings.grid else write(blocks, out)
    others = len({*out.rglob("*.png")} - written)
    print(f"{out}: {len(written)} PNG{'s' * (len(written) != 1)} written{f', beside {others} older' * bool(others)}")


class Generator:
    """Makes a system's images in blocks padded to one size, since a convolution may round differently in another.

    Args:
        path: folder of a checkpoint or of a run
        command: the command that the system must be able to do, of NEEDS
        device: torch's name of a device

    Raises:
        ValueError: there is no such checkpoint or device, or the system cannot do this.
    """

    def __init__(self, path: Path, command: str, device: str | None = None):
        checkpoint = checkpoint_of(path)  # only once: a run that is still training may save another one
        self.system = models.load(checkpoint)
        able = [name for name, ability in NEEDS.items() if self.system.can(ability)]
        if command not in able:
            raise ValueError(f"{type(self.system).__name__} cannot {command}: choose {' or '.join(able)}")
        saved = schemas.checkpoint(checkpoint)
        self.size, self.channels = saved.configuration.data.size, saved.configuration.data.channels
        self.block = min(64, max(1, 64**3 // self.size**2))  # as evaluations; fewer if padding would take minutes
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.system.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device} cannot be used: {str(error).splitlines()[0]}") from error

    def sample(self, num: int, seed: int) -> Blocks:
        """Yield images from draws of the prior."""
        for rows in self._rows(num):
            z = prior(seed, torch.tensor(rows), self.system.latent_shape)
            yield [f"{i:06d}" for i in rows], {"generated": self._images(self.system.sample, z)}

    def compare(self, folder: Path, num: int | None, direction: Literal["a2b", "b2a"] | None) -> Blocks:
        """Yield images beside their translations, or beside their reconstructions if there is no direction."""
        names, images = self._open(folder)
        for rows in self._rows(min(num or len(names), len(names))):
            given = images(rows)
            if direction:
                made = self._images(lambda image: self.system.translate(image, direction), normalize(given))
                panels = {"original": given, f"translated {direction}": made}
            else:
                panels = {"original": given, "reconstructed": self._images(self.system.reconstruct, normalize(given))}
            yield names[rows.start : rows.stop], panels

    def interpolate(self, between: Sequence[str], steps: int, seed: int) -> Blocks:
        """Yield one strip, between the codes of two image files or between two draws of the prior."""
        drawn = all(end.isdecimal() for end in between)
        if drawn:
            a, b = prior(seed, torch.tensor([int(end) for end in between]), self.system.latent_shape)
        elif self.system.can("posterior"):
            given = torch.stack([_decode(Path(end), self.size, self.channels) for end in between])
            a, b = self._whole(lambda image: self.system.posterior(image)[0], normalize(given))
        else:
            raise ValueError(
                f"{type(self.system).__name__} has no encoder, so --between needs the numbers of two samples, such as "
                f"0 1; got {' '.join(between)}"
            )
        codes = interpolate(a.double(), b.double(), steps, prior=drawn).float()  # float64 keeps the ends to the bit
        images = torch.cat([self._images(self.system.sample, z) for z in codes.split(self.block)])
        yield ["_to_".join(Path(end).stem for end in between)], {str(i): image[None] for i, image in enumerate(images)}

    def _rows(self, num: int) -> Iterable[range]:
        return tqdm([range(i, min(i + self.block, num)) for i in range(0, num, self.block)], disable=None)

    def _whole(self, use: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """The result of a padded block, without the padding."""
        padding = given.new_zeros(self.block - len(given), *given.shape[1:])
        with strict_fp32(torch.device(self.device)):
            return use(torch.cat([given, padding]).to(self.device))[: len(given)].cpu()

    def _images(self, use: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        try:
            return to_uint8(self._whole(use, given))
        except FloatingPointError as error:
            raise ValueError(f"{error}: the run has diverged, choose an earlier checkpoint") from error

    def _open(self, folder: Path) -> tuple[list[str], Callable[[range], Tensor]]:
        """The names of a folder's images, in order, and a function that reads some of them as uint8."""
        if not folder.is_dir():
            raise ValueError(f"--images {folder} is not a folder; expected one of images or WebDataset shards (*.tar)")
        if any(folder.glob("*.tar")):
            shards = Shards(folder)
            names = [f"{i:06d}" for i in range(len(shards))]
            return names, lambda rows: read(shards, np.array(rows), self.size, self.channels).image
        try:
            found = find(folder)
        except DataError as error:
            raise DataError(f"--images {error} and no shards (*.tar)") from error
        count = Counter(image.key for image in found)  # a.jpg gives a.png, or a.jpg.png if there is an a.png too
        names = [image.key if count[image.key] == 1 else image.name for image in found]
        return names, lambda rows: torch.stack(
            [_decode(folder / found[i].name, self.size, self.channels) for i in rows]
        )


def _decode(path: Path, size: int, channels: int) -> Tensor:
    try:
        return torch.tensor(decode(read_file(path, LIMITS.bytes), size, channels)).permute(2, 0, 1)
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise DataError(f"cannot read the image {path}: {getattr(error, 'strerror', None) or error}") from error


def write(blocks: Blocks, out: Path) -> set[Path]:
    """Write a PNG for each name, with its panels side by side; return the paths."""
    written = set()
    for names, panels in blocks:
        for name, *images in zip(names, *panels.values(), strict=True):
            pixels, path = torch.cat(images, dim=-1), out / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()).save(path)
            written.add(path)
    return written


def write_grid(blocks: Blocks, path: Path) -> set[Path]:
    """Write a single PNG that shows all images; return its path."""
    parts = [panels for _, panels in blocks]
    whole = {title: torch.cat([panels[title] for panels in parts]) for title in parts[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(whole, columns=math.ceil(math.sqrt(len(next(iter(whole.values())))))).save(path)
    return {path}


if __name__ == "__main__":
    run_command(main)
