"""What each command shows: in blocks, the names of pictures and the panels that form each picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from trainer.batch import normalize
from trainer.draws import prior
from trainer.generate.generator import Generator
from trainer.generate.images import decode_file, open_images
from trainer.log.pictures import Panels
from trainer.log.pictures import interpolate as path_between

Blocks = Iterator[tuple[Sequence[str], Panels]]


def sample(generator: Generator, num: int, seed: int) -> Blocks:
    """Yield images from draws of the prior."""
    for rows in generator.blocks(num):
        z = prior(seed, torch.tensor(rows), generator.system.latent_shape)
        yield [f"{i:06d}" for i in rows], {"generated": generator.images(generator.system.sample, z)}


def compare(generator: Generator, folder: Path, num: int | None, direction: Literal["a2b", "b2a"] | None) -> Blocks:
    """Yield images beside their translations, or beside their reconstructions if there is no direction."""
    system = generator.system
    names, images = open_images(folder, generator.size, generator.channels)
    title = f"translated {direction}" if direction else "reconstructed"
    for rows in generator.blocks(min(num or len(names), len(names))):
        given = images(rows)
        made = generator.images(
            lambda image: system.translate(image, direction) if direction else system.reconstruct(image),
            normalize(given),
        )
        yield names[rows.start : rows.stop], {"original": given, title: made}


def interpolate(generator: Generator, between: Sequence[str], steps: int, seed: int) -> Blocks:
    """Yield one strip, between the codes of two image files or between two draws of the prior."""
    system = generator.system
    drawn = all(end.isdecimal() for end in between)
    if drawn:
        a, b = prior(seed, torch.tensor([int(end) for end in between]), system.latent_shape)
    elif system.can("posterior"):
        given = torch.stack([decode_file(Path(end), generator.size, generator.channels) for end in between])
        a, b = generator.padded(lambda image: system.posterior(image)[0], normalize(given))
    else:
        raise ValueError(
            f"{type(system).__name__} has no encoder, so --between needs the numbers of two samples, such as "
            f"0 1; got {' '.join(between)}"
        )
    codes = path_between(a.double(), b.double(), steps, prior=drawn).float()  # float64 keeps the ends to the bit
    images = torch.cat([generator.images(system.sample, z) for z in codes.split(generator.block)])
    yield ["_to_".join(Path(end).stem for end in between)], {str(i): image[None] for i, image in enumerate(images)}
