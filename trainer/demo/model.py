"""What the page shows of a trained system, as functions of images and codes."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from data.errors import DataError
from data.images import MODES
from data.loader import read
from data.order import permutation
from models.load import checkpoint_of
from trainer import schemas
from trainer.batch import normalize, visible_pixels
from trainer.draws import prior
from trainer.generate import panels
from trainer.generate.generator import Generator
from trainer.generate.images import decode_file, open_folder
from trainer.log.pictures import grid, picture
from trainer.samplers import Sampler

AXES = 8  # directions at most
REACH = 3.0  # standard deviations to which a slider goes
PIXELS = 320  # smaller pictures are enlarged to this side at least
Direction = Literal["a2b", "b2a"]


class Axes(NamedTuple):
    """Leading directions of codes, flat: centre [d], orthonormal axes [k, d], and standard deviations [k]."""

    centre: Tensor
    axes: Tensor
    scale: Tensor

    def coordinates(self, code: Tensor) -> Tensor:
        """Return where a code lies on the axes [k], in standard deviations from the centre."""
        return self.axes @ (code.flatten().double() - self.centre) / self.scale

    def move(self, code: Tensor, to: Tensor) -> Tensor:
        """Return the code with other coordinates on the axes; the rest of it stays."""
        change = (to - self.coordinates(code)) * self.scale @ self.axes
        return (code.flatten().double() + change).float().view_as(code)


class Model:
    """A trained system, its held-out images, and the leading directions of its codes.

    Args:
        path: folder of a checkpoint or of a run
        images: folder of images or shards; None takes the run's held-out images
        num: number of images or samples that give the directions
        device: torch's name of a device
        label: class of all images that are made; a system with classes needs one

    Raises:
        ValueError, DataError: there is no such checkpoint, device, class or image.
    """

    def __init__(
        self,
        path: Path,
        images: Path | None = None,
        num: int = 512,
        device: str | None = None,
        label: int | None = None,
    ):
        checkpoint = checkpoint_of(path)
        self.generator = Generator(checkpoint, None, device, None if label is None else [label])
        self.system = self.generator.system
        if (channels := self.generator.format.channels) not in MODES:
            raise ValueError(
                f"the page shows images of 1, 3 or 4 channels, and the system has {channels}: use trainer.generate"
            )
        if self.system.classes and label is None:
            raise ValueError(
                f"the system was trained with system.classes {self.system.classes}: choose the class that the page "
                "shows, such as --classes 1"
            )
        saved = schemas.checkpoint(checkpoint)
        self.title = f"{type(self.system).__name__} of {path.resolve().name}, step {saved.step:,}"
        needed = self.can("reconstruct") or self.can("translate")
        self.images = self._read(images, num) if needed or images else []
        self.axes = self._axes(num) if self.can("sample") else None

    def can(self, use: Literal["sample", "reconstruct", "posterior", "translate"]) -> bool:
        return self.system.can(use)

    def open(self, path: str) -> Tensor:
        """Return an image file as the system takes it, uint8 [channels, height, width].

        Raises:
            DataError: it is damaged, or no image, or larger than an image may be.
        """
        try:
            return decode_file(Path(path), *self.generator.format)
        except DataError as error:
            raise DataError(str(error).replace(f"{path}: ", ": ").replace(" the image :", " this image:")) from error

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.generator.images(self.system.reconstruct, normalize(image[None]), *self.generator.told([0]))[0]

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        return self.generator.images(lambda one: self.system.translate(one, direction), normalize(image[None]))[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Return the images of codes [n, *latent_shape], uint8."""
        blocks = codes.split(self.generator.block)
        made = [self.generator.images(self.system.sample, one, *self.generator.told([0] * len(one))) for one in blocks]
        return torch.cat(made)

    def draw(self, seed: int, number: int = 0) -> Tensor:
        """Return the prior's draw of a sample, as `trainer.generate sample` numbers them."""
        return prior(seed, torch.tensor([number]), self.system.latent_shape)[0]

    def samples(self, seed: int, num: int, truncation: float) -> Image.Image:
        """Return a grid of samples, as `trainer.generate sample` makes them."""
        sampler = Sampler("prior", self.system.latent_shape, truncation)
        blocks = panels.sample(self.generator, num, seed, sampler)
        return grid({"generated": torch.cat([panel["generated"] for _, panel in blocks])}, columns=int(num**0.5))

    def interpolate(self, between: list[str], steps: int, seed: int) -> Image.Image:
        """Return a strip between two image files, or between two numbers of samples."""
        ((_, strip),) = panels.interpolate(self.generator, between, steps, seed)
        return grid({"": torch.cat([*strip.values()])}, columns=steps, pixels=96)

    def sweep(self, code: Tensor) -> Image.Image:
        """Return a row for each axis, along which the code moves from -REACH to REACH."""
        assert self.axes is not None
        own, stops = self.axes.coordinates(code), torch.linspace(-REACH, REACH, 7, dtype=torch.float64)
        codes = [
            self.axes.move(code, own.where(torch.arange(len(own)) != axis, stop))
            for axis in range(len(own))
            for stop in stops
        ]
        images = self.decode(torch.stack(codes)).unflatten(0, (len(own), len(stops)))
        rows = {f"direction {axis + 1}": row for axis, row in enumerate(images)}
        headed = {"": images[0, :0], **rows}  # an empty panel leaves a line to the headings
        return grid(headed, len(stops), pixels=64, headings=[f"{stop:g}" for stop in stops.tolist()])

    def _read(self, folder: Path | None, num: int) -> list[Tensor]:
        """Return some images of each data set, always the same, uint8."""
        form = self.generator.format
        if folder:
            names, images = open_folder(folder, *form)
            return [torch.cat([images(range(i, i + 1)) for i in permutation(len(names), 0)[:num]])]
        data = self.generator.data
        try:
            sets = data.open(data.tests or data.trains, by_user=False)  # the checkpoint's manifest names them
            return [read(one, permutation(len(one), 0)[:num], *form).image for one in sets]
        except DataError as error:
            raise DataError(f"the run's images: {error}. Name others with --images FOLDER") from error

    def _axes(self, num: int) -> Axes:
        """Return the leading directions of the codes.

        With an encoder these are the principal components of the codes of the images. Without one, all directions of
        N(0, I) are alike, so they are those that change the images most: singular vectors of the generator's mean
        Jacobian, which for z ~ N(0, I) is E[G(z) z^T] (Stein's lemma).
        """
        if self.can("posterior"):
            codes = self.generator.encoder(self.images[0])[0].flatten(1).double()
            centre = codes.mean(0)
            _, scale, axes = torch.linalg.svd(codes - centre, full_matrices=False)
            scale = scale / max(1, len(codes) - 1) ** 0.5
        else:
            z = prior(0, torch.arange(num), self.system.latent_shape)
            images, flat = self.decode(z).flatten(1).double(), z.flatten(1).double()
            jacobian = (images - images.mean(0)).T @ flat / num
            _, axes = torch.linalg.eigh(jacobian.T @ jacobian)
            axes, centre, scale = axes.T.flip(0), flat.new_zeros(flat.shape[1]), flat.new_ones(flat.shape[1])
        used = int((scale[:AXES] > 1e-6 * scale[0]).sum())
        signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # of the largest entry, so as to be unique
        return Axes(centre, (axes * signs)[:used], scale[:used])


def enlarged(pixels: Tensor) -> Image.Image:
    """Return uint8 pixels [channels, height, width] as a picture of at least PIXELS a side, each pixel a square."""
    made = picture(pixels)
    scale = max(1, -(-PIXELS // made.width))
    return made.resize((made.width * scale, made.height * scale), Image.Resampling.NEAREST)


def error_map(image: Tensor, other: Tensor) -> tuple[Image.Image, str]:
    """Return where two images differ, as colours from black (equal) to bright (the largest error), and in words."""
    image, other = visible_pixels(image[None])[0], visible_pixels(other[None])[0]
    difference = (image.float() - other.float()).abs().mean(0)
    largest, mse = difference.max().item(), (image.float() - other.float()).square().mean().item()
    colours = colormaps["inferno"](np.asarray(difference / max(largest, 1)), bytes=True)[..., :3]
    psnr: Any = f"{10 * np.log10(255**2 / mse):.1f} dB" if mse else "infinite"
    text = f"PSNR {psnr}. The brightest spot of the map is an error of {largest:.0f} of 255."
    return enlarged(torch.tensor(colours).permute(2, 0, 1)), text
