"""`python -m trainer.export`: write an export, step by step."""

import argparse
import json
from pathlib import Path

import torch

from data.errors import DataError
from data.images import LIMITS
from data.loader import Samples
from models.diffusers import WEIGHTS_FILE
from trainer.batch import to_uint8
from trainer.checkpoint.files import read_scores
from trainer.distributed.exit import user_errors
from trainer.evaluate.target import open_images
from trainer.export import folder, hub
from trainer.export.arguments import parser
from trainer.export.card import card, score_rows, tags
from trainer.export.programs import Kind, write_programs
from trainer.latents import LatentEncoder, LatentStatistics, latent_statistics
from trainer.log.pictures import Panels, grid, grid_inputs, panels

FILES = {
    "config.json": "sizes, and the mean and deviation of the latents",
    "manifest.json": "all settings, the fingerprint of the data, and the checksums of the weights",
    ".safetensors": "averaged weights",
    ".onnx": "a program for ONNX runtimes, for any number of images at once",
    ".pt2": "the same for `torch.export.load`",
    "pictures.png": "the picture above",
    "scores.json": "the scores and how they were measured",
    "training": "a run's folder with which training goes on: networks, averages, statistics and optimizers",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    made = parser()
    settings = made.parse_args(arguments)
    if settings.private and not settings.push:
        made.error("--private has no effect without --push")
    with user_errors():
        print(export(settings))


def export(settings: argparse.Namespace) -> str:
    """Write the export that a command line asks for and return what the user is told.

    Raises:
        ValueError, DataError, OSError: it cannot be written; the message says what to change.
    """
    out: Path = settings.out
    folder.check_out(out, settings.overwrite)
    if settings.push:
        hub.check_push(settings.push)
    kinds: list[Kind] = [kind for kind in ("onnx", "torch_export") if getattr(settings, kind)]
    source = folder.Source.open(settings.run)
    measured, shown = open_sets(settings, source)
    with folder.new_folder(out, settings.overwrite) as unfinished:
        if settings.full:  # first: a run that is still training removes its old checkpoints
            folder.copy_training(source, unfinished / folder.TRAINING)
        write_programs(source.system, source.image_shape, unfinished, kinds)
        latents = measure(source, measured, settings)
        folder.write_weights(source, unfinished, latents)
        if made := pictures(source, shown):
            grid(made).save(unfinished / "pictures.png")
        text = card_of(source, settings, unfinished, list(made), latents)
        (unfinished / "README.md").write_text(text, encoding="utf-8")
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    said = f"{out}: step {source.saved.step:,} of a {type(source.system).__name__} as {files}"
    return f"{said}\n{hub.push(out, settings.push, settings.private)}" if settings.push else said


def measure(source: folder.Source, sets: list[Samples], settings: argparse.Namespace) -> LatentStatistics | None:
    """Return the statistics of the latents of images; None without images or without an encoder."""
    if not sets or not source.system.can("posterior"):
        return None
    channels, size, _ = source.image_shape
    encoder = LatentEncoder(source.system, size, channels, settings.device)
    found = latent_statistics(encoder, sets, settings.num)
    source.system.cpu()
    return found


def open_sets(settings: argparse.Namespace, source: folder.Source) -> tuple[list[Samples], list[Samples]]:
    """Return the images to measure latents on, and those to show; none if the command line asks for none.

    Raises:
        ValueError, DataError: they cannot be read; says how to name others.
    """
    if not settings.num:
        if settings.images:
            raise ValueError("--images has no effect with --num 0, which reads no images: leave one out")
        return [], []
    if settings.images:
        if source.system.domains > 1:
            raise ValueError(
                f"--images names one set of images, but {type(source.system).__name__} has two: leave it out"
            )
        named = [open_images(settings.images, LIMITS)]
        return [*named], [*named]
    data = source.data_config
    try:
        measured, shown = (data.open(places, by_user=False) for places in (data.trains, data.tests or data.trains))
    except DataError as error:
        raise DataError(
            f"the run's images cannot be read: {error}. Name a folder of images or shards with --images, or export "
            "without the latents' statistics and without real images by --num 0"
        ) from error
    return [*measured], [*shown]


def pictures(source: folder.Source, shown: list[Samples]) -> Panels:
    """Return images and what the system makes of them; without images, samples alone.

    Raises:
        ValueError: an image is not finite.
    """
    system, seed = source.system, source.saved.configuration.trainer.seed
    inputs = grid_inputs(shown, source.data_config, seed, system, torch.device("cpu"))
    try:
        if shown:
            return panels(system, *inputs)
        return {"generated": to_uint8(system.sample(inputs[1]))} if system.can("sample") else {}
    except FloatingPointError as error:
        raise ValueError(f"{error}: the run has diverged, choose an earlier checkpoint") from error


def card_of(
    source: folder.Source, settings: argparse.Namespace, out: Path, shown: list[str], latents: LatentStatistics | None
) -> str:
    """Return the model card of the files in `out`."""
    system, diffusers = source.system, (out / WEIGHTS_FILE).exists()
    name = settings.push or settings.out.resolve().name
    scores, evaluation = read_scores(source.path) or ({}, {})
    held_out = evaluation.get("held_out_images")
    channels, size, _ = source.image_shape
    return card(
        system,
        tags(system, "diffusers" if diffusers else "vaegan-trainer", settings.license),
        source.configuration,
        title=name,
        place=json.dumps(name),
        pushed=bool(settings.push),
        diffusers=diffusers,
        step=source.saved.step,
        size=size,
        channels=channels,
        pictures=", ".join(shown),
        latents=latents,
        scores=score_rows(scores),
        held_out=f"{held_out:,}" if isinstance(held_out, int) else None,
        data=source.training_sets(),
        files={path.name: FILES.get(path.name) or FILES[path.suffix] for path in sorted(out.iterdir())},
    )
