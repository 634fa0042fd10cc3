"""`python -m trainer.generate`: make pictures and write them."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from trainer.distributed.exit import exit_with_error, user_errors
from trainer.files import write_atomically
from trainer.generate import panels
from trainer.generate.arguments import parser
from trainer.generate.edit import Codes, attribute_vector, edit
from trainer.generate.generator import Generator
from trainer.generate.neighbours import find_neighbours, report, show
from trainer.generate.panels import Pictures
from trainer.generate.whole import check_tile
from trainer.generate.writers import write, write_films, write_grid, write_shards, write_strips
from trainer.run_place import local_run
from trainer.samplers import Sampler, open_sampler, training_images

SAMPLES, DRAWN = 10_000, 64  # that are drawn unless --num says so: by sample, and by other commands or in a grid
NAMED = 3  # images at most that a message names
STRIPS, ROWS = ("edit", "neighbours"), 16  # commands whose grids have a row for each image, and how many then


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    settings = parser().parse_args(arguments)
    out, command, left_out = settings.out, settings.command, list[str]()
    with user_errors(), ExitStack() as stack:
        _check(settings)
        run = stack.enter_context(local_run(settings.checkpoint))
        generator = Generator(run, command, settings.device, getattr(settings, "classes", None))
        _check_classes(generator, settings)
        _check_sizes(generator, settings)
        pictures = _pictures(generator, settings, left_out)
        if getattr(settings, "shards", False):
            print(f"{out}: {write_shards(pictures, out):,} images written")
            return
        kind = getattr(settings, "format", "png")
        if kind != "png":
            written = write_films(pictures, out, kind, settings.fps or 24)
        elif command == "interpolate":
            written = write_strips(pictures, out)
        elif getattr(settings, "grid", False):
            written = write_grid(pictures, out / f"{command}.png", strips=command in STRIPS)
        else:
            written = write(pictures, out)
    # The copy of a URL's run is gone by now.
    by = f"{generator.checkpoint.name} of {settings.checkpoint}"
    _report(out, written, str(generator.checkpoint) if generator.checkpoint.exists() else by)
    if left_out:
        more = f"; and {len(left_out) - NAMED} more" * (len(left_out) > NAMED)
        exit_with_error(
            f"{len(left_out)} of the images of --images {settings.images} could not be read, and the others were used: "
            f"{'; '.join(left_out[:NAMED])}{more}",
            code=1,
        )


def _check(settings: argparse.Namespace) -> None:
    out, images = settings.out, getattr(settings, "images", None)
    given = getattr(settings, "latents", images)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder, new or existing")
    if given and out.resolve().is_relative_to(given.resolve()):
        raise ValueError(f"--out {out} lies in {'--images' if images else 'LATENTS'} {given}: name a folder outside it")
    if getattr(settings, "shards", False):
        if settings.grid:
            raise ValueError("--grid has no effect on --shards; leave one of them out")
        if not out.name or (out.exists() and any(out.iterdir())):
            why = "exists and is not empty" if out.name else "is the working directory"
            raise ValueError(f"--out {out} {why}: name a new folder for --shards")
    if getattr(settings, "fps", None) and settings.format == "png":
        raise ValueError("--fps has no effect on a strip: add --format gif or mp4, or leave it out")
    for option in ("sampler", "truncation", "components") if images else ():
        if getattr(settings, option, None):
            raise ValueError(f"--{option} has no effect on --images; leave one of them out")


def _check_classes(generator: Generator, settings: argparse.Namespace) -> None:
    """Nobody knows the classes of the images of --images, and a strip is of one."""
    command, images = settings.command, getattr(settings, "images", None)
    if command == "neighbours" and images and settings.classes:
        raise ValueError("--classes has no effect on --images; leave it out")
    needed = command == "interpolate" or (images and command != "neighbours")
    if generator.system.classes and needed and not settings.classes:
        raise ValueError(
            f"{command} needs --classes, as the system was trained with system.classes {generator.system.classes}: "
            "name the class of the images, such as --classes 1"
        )
    if command == "interpolate" and len(settings.classes or ()) > 1:
        raise ValueError(f"--classes names {len(settings.classes)} classes, and a strip is of one: name one")


def _check_sizes(generator: Generator, settings: argparse.Namespace) -> None:
    """Say at once all that speaks against images of their own sizes."""
    if not (getattr(settings, "whole", False) or getattr(settings, "tile", None)):
        return
    found = []
    try:
        check_tile(generator, settings.tile)
    except ValueError as error:
        found.append(str(error))
    if settings.grid:
        found.append("--grid shows images of one size, and --whole and --tile keep their own: leave one of them out")
    if found:
        raise ValueError("; ".join(found))


def _pictures(generator: Generator, settings: argparse.Namespace, left_out: list[str]) -> Pictures:
    """What the command shows; `left_out` gets a message for each image of --images that cannot be read."""
    if settings.command in STRIPS:
        images = training_images(settings.train, generator.data)
        if settings.command == "edit":
            direction = attribute_vector(generator, images, settings.with_, settings.without, settings.train_num)
            return edit(generator, _codes(generator, settings, left_out), direction, settings.strengths)
        queries = _images(generator, settings, left_out)
        found = find_neighbours(generator, queries, images, settings.train_num, settings.nearest)
        settings.out.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.out / "neighbours.jsonl", report(found, images))
        return show(generator, found, images, "given" if settings.images else "sample")
    if settings.command == "interpolate":
        steps = settings.steps or (9 if settings.format == "png" else 49)
        return panels.interpolate(generator, settings.between, steps, settings.seed)
    if settings.command == "sample":
        num = settings.num or (_drawn(settings) if settings.grid else SAMPLES)
        return panels.sample(generator, num, settings.seed, _sampler(generator, settings))
    if settings.command == "decode":
        return panels.decode(generator, settings.latents, _num(settings))
    towards = getattr(settings, "direction", None)
    if settings.whole or settings.tile:
        return panels.whole(generator, settings.images, settings.num, towards, settings.tile, left_out)
    return panels.compare(generator, settings.images, _num(settings), towards, left_out)


def _num(settings: argparse.Namespace) -> int | None:
    """The number of images of --images or LATENTS; None for all."""
    return settings.num or (_drawn(settings) if settings.grid else None)


def _drawn(settings: argparse.Namespace) -> int:
    """The number of images that are drawn, or shown in a grid, unless --num says so."""
    return ROWS if settings.grid and settings.command in STRIPS else DRAWN


def _sampler(generator: Generator, settings: argparse.Namespace) -> Sampler:
    return open_sampler(settings, generator.system, generator.data, generator.device, settings.command != "sample")


def _codes(generator: Generator, settings: argparse.Namespace, left_out: list[str]) -> Codes:
    """The codes that are edited: of the images of --images, or draws."""
    if settings.images:
        for names, images, numbers in panels.given(generator, settings.images, _num(settings), left_out):
            yield names, numbers, {"original": images}, generator.encoder(images)[0]
    else:
        num = settings.num or _drawn(settings)
        for names, z in panels.draws(generator, num, settings.seed, _sampler(generator, settings)):
            yield names, [*map(int, names)], {}, z


def _images(
    generator: Generator, settings: argparse.Namespace, left_out: list[str]
) -> Iterator[tuple[Sequence[str], Tensor]]:
    """The images whose neighbours are sought: those of --images, or images that are drawn."""
    if settings.images:
        for names, images, _ in panels.given(generator, settings.images, _num(settings), left_out):
            yield names, images
    else:
        num = settings.num or _drawn(settings)
        for drawn, made in panels.sample(generator, num, settings.seed, _sampler(generator, settings)):
            yield drawn, made["generated"]


def _report(out: Path, written: set[Path], checkpoint: str) -> None:
    kind = min(written).suffix[1:]
    others = len({*out.rglob(f"*.{kind}")} - written)
    older = f", beside {others} older" * bool(others)
    several = len(written) > 1
    made = f"{len(written)} {kind.upper()}{'s' * several} written"
    print(f"{out if several else min(written)}: {made}{older}, by {checkpoint}")
