"""`python -m trainer.export`: write an export, step by step."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from data.dataset import FEW
from data.images import MODES, channels_in_words
from data.redact import printable
from models.diffusers import WEIGHTS_FILE
from models.manifest import checkpoints
from trainer.checkpoint.files import read_scores
from trainer.distributed.exit import user_errors
from trainer.export import folder, hub, images
from trainer.export.arguments import parser
from trainer.export.card import card, score_rows, tags
from trainer.export.programs import Kind, write_programs
from trainer.latents import LatentStatistics
from trainer.log.health import few_images
from trainer.log.pictures import below_originals, grid, panel_size
from trainer.run_place import local_run

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
        try:
            print(export(settings))
        except RecursionError as error:  # of settings in a stranger's manifest
            raise ValueError(f"the settings in {settings.run} are nested too deeply") from error


def export(settings: argparse.Namespace) -> str:
    """Write the export that a command line asks for and return what the user is told.

    Raises:
        ValueError, DataError, OSError: it cannot be written; the message says what to change.
    """
    out: Path = settings.out
    folder.check_out(out, settings.overwrite)
    if settings.push:
        hub.check_push(settings.push)
    with local_run(settings.run) as run:
        return _export(settings, run)


def _export(settings: argparse.Namespace, run: Path) -> str:
    out: Path = settings.out
    kinds: list[Kind] = [kind for kind in ("onnx", "torch_export") if getattr(settings, kind)]
    source = folder.TrainedCheckpoint.open(run, settings.ema_length)
    measured, shown = images.open_sets(source, settings.images, settings.num)
    with folder.new_folder(out, settings.overwrite) as unfinished:
        if settings.full:  # first: a run that is still training removes its old checkpoints
            folder.copy_training(source, unfinished / folder.TRAINING)
        write_programs(source.system, source.image_shape, unfinished, kinds)
        latents = images.measure(source, measured, settings.num, settings.device)
        made = images.pictures(source, shown, settings.device)
        folder.write_weights(source, unfinished, latents)
        if made:
            row, _ = panel_size(source.system.classes, source.image_shape)
            grid(below_originals(made, row), row).save(unfinished / "pictures.png")
        text = card_of(source, settings, unfinished, list(made), latents)
        (unfinished / "README.md").write_text(text, encoding="utf-8")
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    said = f"{out}: step {source.saved.step:,} of a {type(source.system).__name__} as {files}"
    licence = "" if settings.license else "\nthe model card names no licence, which --license NAME adds"
    pushed = f"\n{hub.push(out, settings.push, settings.private)}" if settings.push else ""
    if not source.scores and settings.ema_length is None:
        print(printable(f"warning: {unscored(source.path, settings.run)}"), file=sys.stderr)
    return f"{said}{licence}{pushed}"


def unscored(checkpoint: Path, run: Path | str) -> str:
    """Return that a checkpoint has no scores, and how to get some."""
    others = [path for path in checkpoints(checkpoint.parent) if read_scores(path)]
    place = run if isinstance(run, str) else str(checkpoint)  # the copy of a URL's is gone soon
    instead = f", or export {others[0]}, the newest that has some" if others else ""
    return (
        f"{checkpoint.name} has no scores, and so the model card has none: no evaluation was due when it was saved, by "
        f"Ctrl-C for example. Get them by `python -m trainer.evaluate {shlex.quote(place)}`{instead}"
    )


def card_of(
    source: folder.TrainedCheckpoint,
    settings: argparse.Namespace,
    out: Path,
    shown: list[str],
    latents: LatentStatistics | None,
) -> str:
    """Return the model card of the files in `out`."""
    system, diffusers = source.system, (out / WEIGHTS_FILE).exists()
    name = settings.push or settings.out.resolve().name
    scores, evaluation = source.scores or ({}, {})
    held_out = evaluation.get("held_out_images")
    few = few_images(held_out) if isinstance(held_out, int) and held_out < FEW else None
    channels, height, width = source.image_shape
    return card(
        system,
        tags(system, "diffusers" if diffusers else "vaegan-trainer", settings.license),
        source.configuration,
        title=name,
        place=json.dumps(name),
        command_place=shlex.quote(printable(name, keep="")),
        command_folder=shlex.quote(printable(Path(name).name, keep="")),
        pushed=bool(settings.push),
        diffusers=diffusers,
        step=source.saved.step,
        ema_length=source.ema_length,
        height=height,
        width=width,
        channels=channels,
        colours=channels_in_words(channels),
        mode=MODES.get(channels) if source.data_config.bits == 8 else None,
        pictures=", ".join(shown),
        latents=latents,
        scored=bool(scores),
        scores=score_rows(scores, few is not None),
        held_out=f"{held_out:,}" if isinstance(held_out, int) else None,
        few=few,
        data=source.training_sets(),
        files={path.name: FILES.get(path.name) or FILES[path.suffix] for path in sorted(out.iterdir())},
    )
