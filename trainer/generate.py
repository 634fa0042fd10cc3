"""Pictures by a trained system, of its averaged weights: `python -m trainer.generate COMMAND CHECKPOINT --out FOLDER`.

CHECKPOINT is a checkpoint's folder, or a run's, whose newest one is taken. Image i is the same whatever --num is.
"""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

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
from trainer.batch import normalize, prior, strict_fp32, to_uint8
from trainer.distributed.exit import CommandParser, user_errors
from trainer.log.pictures import Panels, grid, interpolate

Use = Literal["sample", "reconstruct", "translate"]
NEEDS: dict[str, Use] = dict(sample="sample", reconstruct="reconstruct", interpolate="sample", translate="translate")
Blocks = Iterator[tuple[Sequence[str], Panels]]  # names of pictures, and the panels that each is laid out of


def parser() -> CommandParser:
    made = CommandParser(
        prog="python -m trainer.generate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    sample = commands.add_parser("sample", help="images of draws from the prior")
    reconstruct = commands.add_parser("reconstruct", help="images beside their reconstructions")
    interpolate = commands.add_parser("interpolate", help="a strip from one image to another")
    translate = commands.add_parser("translate", help="images beside their translations into the other domain")
    for one in (sample, reconstruct, interpolate, translate):
        one.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a checkpoint or of a run")
        one.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="for PNGs; replaces those so named")
        one.add_argument("--device", help="as torch names it; unset: cuda if there is one, else cpu")
    for one, usual in (sample, "10000"), (reconstruct, "all"), (translate, "all"):
        one.add_argument("--num", type=PositiveInt, help=f"of images; unset: {usual}, or 64 in a grid")
        one.add_argument("--grid", action="store_true", help="one PNG of them all")
    for one in (reconstruct, translate):
        one.add_argument("--images", metavar="FOLDER", type=Path, required=True, help="of images, or of shards")
    for one in (sample, interpolate):
        one.add_argument("--seed", type=NonNegativeInt, default=0, help="of the samples; evaluations take the run's")
    ends = "two image files, or the numbers of two samples"
    interpolate.add_argument("--between", metavar=("A", "B"), nargs=2, required=True, help=ends)
    interpolate.add_argument("--steps", type=PositiveInt, default=9, help="pictures in the strip")
    translate.add_argument("--direction", choices=["a2b", "b2a"], required=True, help="from which domain to which")
    return made


def main(arguments: list[str] | None = None) -> None:
    settings = parser().parse_args(arguments)
    out, command = settings.out, settings.command
    with user_errors():
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file: name a folder, new or not")
        maker = Maker(settings.checkpoint, command, settings.device)
        if command == "interpolate":
            written = write(maker.interpolate(settings.between, settings.steps, settings.seed), out)
        else:
            num = settings.num or (64 if settings.grid else None)
            if command == "sample":
                blocks = maker.sample(num or 10_000, settings.seed)
            elif out.resolve().is_relative_to(settings.images.resolve()):
                raise ValueError(f"--out {out} lies in --images {settings.images}: name a folder outside it")
            else:
                blocks = maker.beside(settings.images, num, getattr(settings, "direction", None))
            written = write_grid(blocks, out / f"{command}.png") if settings.grid else write(blocks, out)
    others = len({*out.rglob("*.png")} - written)
    print(f"{out}: {len(written)} PNG{'s' * (len(written) != 1)} written{f', beside {others} older' * bool(others)}")


class Maker:
    """What a checkpoint's system makes, in padded blocks: a convolution may round otherwise in a batch of another size.

    Args:
        path: of a checkpoint, or of a run
        command: what it must be able to do
        device: as torch names it

    Raises:
        ValueError: there is no such checkpoint or device, or the system cannot do it.
    """

    def __init__(self, path: Path, command: str, device: str | None = None):
        checkpoint = checkpoint_of(path)  # once: a run that goes on may save another one meanwhile
        self.system = models.load(checkpoint)
        able = [name for name, use in NEEDS.items() if self.system.can(use)]
        if command not in able:
            raise ValueError(f"{type(self.system).__name__} does not {command}: take {' or '.join(able)}")
        saved = schemas.checkpoint(checkpoint)
        self.size, self.channels = saved.configuration.data.size, saved.configuration.data.channels
        self.block = min(64, max(1, 64**3 // self.size**2))  # as evaluations, and less where padding would cost minutes
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.system.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device} cannot be used: {str(error).splitlines()[0]}") from error

    def sample(self, num: int, seed: int) -> Blocks:
        for rows in self._rows(num):
            z = prior(seed, torch.tensor(rows), self.system.latent_shape)
            yield [f"{i:06d}" for i in rows], {"generated": self._images(self.system.sample, z)}

    def beside(self, folder: Path, num: int | None, direction: Literal["a2b", "b2a"] | None) -> Blocks:
        """Images beside their translations, or without a direction their reconstructions."""
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
        """One strip, between the codes of two image files or between the draws of two samples."""
        drawn = all(end.isdecimal() for end in between)
        if drawn:
            a, b = prior(seed, torch.tensor([int(end) for end in between]), self.system.latent_shape)
        elif self.system.can("posterior"):
            given = torch.stack([_decode(Path(end), self.size, self.channels) for end in between])
            a, b = self._whole(lambda image: self.system.posterior(image)[0], normalize(given))
        else:
            raise ValueError(
                f"{type(self.system).__name__} has no encoder, and --between names {' and '.join(between)}: give the "
                "numbers of two samples, such as 0 1"
            )
        codes = interpolate(
            a.double(), b.double(), steps, prior=drawn
        ).float()  # so that the ends are theirs to the bit
        images = torch.cat([self._images(self.system.sample, z) for z in codes.split(self.block)])
        yield ["_to_".join(Path(end).stem for end in between)], {str(i): one[None] for i, one in enumerate(images)}

    def _rows(self, num: int) -> Iterable[range]:
        return tqdm([range(i, min(i + self.block, num)) for i in range(0, num, self.block)], disable=None)

    def _whole(self, use: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        padding = given.new_zeros(self.block - len(given), *given.shape[1:])
        with strict_fp32(torch.device(self.device)):
            return use(torch.cat([given, padding]).to(self.device))[: len(given)].cpu()

    def _images(self, use: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        try:
            return to_uint8(self._whole(use, given))
        except FloatingPointError as error:
            raise ValueError(f"{error}: the run has diverged, take an earlier checkpoint") from error

    def _open(self, folder: Path) -> tuple[list[str], Callable[[range], Tensor]]:
        """The names of a folder's images, in order, and what reads some of them as uint8."""
        if not folder.is_dir():
            raise ValueError(f"--images {folder} is no folder: expected one of images, or of WebDataset shards (*.tar)")
        if any(folder.glob("*.tar")):
            shards = Shards(folder)
            names = [f"{i:06d}" for i in range(len(shards))]
            return names, lambda rows: read(shards, np.array(rows), self.size, self.channels).image
        try:
            found = find(folder)
        except DataError as error:
            raise DataError(f"--images {error} and no shards (*.tar)") from error
        count = Counter(one.key for one in found)  # a.jpg gives a.png, or a.jpg.png where there is an a.png too
        names = [one.key if count[one.key] == 1 else str(one.path.relative_to(folder)) for one in found]
        return names, lambda rows: torch.stack([_decode(found[i].path, self.size, self.channels) for i in rows])


def _decode(path: Path, size: int, channels: int) -> Tensor:
    try:
        return torch.tensor(decode(read_file(path, LIMITS.bytes), size, channels)).permute(2, 0, 1)
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise DataError(f"cannot read the image {path}: {getattr(error, 'strerror', None) or error}") from error


def write(blocks: Blocks, out: Path) -> set[Path]:
    """A PNG a name, its panels side by side."""
    written = set()
    for names, panels in blocks:
        for name, *images in zip(names, *panels.values(), strict=True):
            pixels, path = torch.cat(images, dim=-1), out / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()).save(path)
            written.add(path)
    return written


def write_grid(blocks: Blocks, path: Path) -> set[Path]:
    """One PNG of all."""
    parts = [panels for _, panels in blocks]
    whole = {title: torch.cat([panels[title] for panels in parts]) for title in parts[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(whole, columns=math.ceil(math.sqrt(sum(len(next(iter(panels.values()))) for panels in parts)))).save(path)
    return {path}


if __name__ == "__main__":
    run_command(main)
