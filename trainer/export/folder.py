"""The folder of an export, which appears when it is complete."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

import models
from data.files import UNFINISHED, atomically, sha256
from data.images import plain
from data.redact import redacted, redacted_all
from models import System
from models import manifest as manifests
from models.diffusers import CONFIG_FILE, WEIGHTS_FILE, to_diffusers
from models.load import checkpoint_of
from trainer import schemas
from trainer.checkpoint.files import read_scores
from trainer.checkpoint.writer import write_files
from trainer.config.settings import DataConfig
from trainer.export.averages import set_average
from trainer.latents import LatentStatistics

AVERAGED = "averaged"  # what an export's manifest says of its weights
TRAINING = "training"  # the folder of --full
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # as diffusers names them
DEMO_CNN = "demo-cnn-v1.safetensors"


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A checkpoint that is exported."""

    path: Path  # its folder
    manifest: dict[str, Any]  # the content of its manifest
    saved: schemas.CheckpointManifest  # the same, checked
    data: list[schemas.TrainingSet]  # the training sets, as the manifest describes them
    system: System  # with its averaged weights
    scores: tuple[dict[str, float], dict[str, Any]] | None  # of these weights, and how they were measured
    ema_length: float | None = None  # of averages that were made after training

    @classmethod
    def open(cls, path: Path, ema_length: float | None = None) -> "TrainedCheckpoint":
        """Read a checkpoint, or the newest one of a run, with its averages or those of another length.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = checkpoint_of(path)  # only once: a run that is still training may save another one
        system, saved, manifest = models.load(path), schemas.checkpoint(path), manifests.read(path)
        data = schemas.checked(manifest.get("data", []), list[schemas.TrainingSet], f"data in {path / 'manifest.json'}")
        if ema_length is None:
            return cls(path, manifest, saved, data, system, read_scores(path), saved.ema_length)
        set_average(system, path, ema_length)
        return cls(path, manifest, saved, data, system, None, ema_length)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.data_config.shape

    @property
    def data_config(self) -> DataConfig:
        return DataConfig.of_manifest(self.saved.configuration.data)

    @property
    def configuration(self) -> dict[str, Any]:
        """The run's settings without credentials, and without the folder that it was written to."""
        settings = redacted_all(self.manifest["configuration"])
        return settings | {"trainer": settings["trainer"] | {"run_dir": None}}

    def training_sets(self) -> list[dict[str, Any]]:
        """Return the name, the numbers and the fingerprint of each training set, for people."""
        train = self.saved.configuration.data.train
        names = [Path(redacted(place)).parent.name for place in ([train] if isinstance(train, str) else train)]
        return [{"name": name, **msgspec.structs.asdict(one)} for name, one in zip(names, self.data, strict=False)]


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A context that yields an empty folder, which gets the name `out` at its end; an older export is replaced then."""
    out.parent.mkdir(parents=True, exist_ok=True)
    older = out.with_name(f"{UNFINISHED}{out.name}.older")
    with atomically(out) as unfinished:
        unfinished.mkdir()
        yield unfinished
        if overwrite and out.exists():
            shutil.rmtree(older, ignore_errors=True)
            out.rename(older)
    shutil.rmtree(older, ignore_errors=True)


def check_out(out: Path, overwrite: bool) -> None:
    """Raise a ValueError if there is something at `out`, but for an empty folder, or an older export to overwrite."""
    if not out.name:
        raise ValueError(f"OUT {out} is the working directory: name a new folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        is_export = manifests.read(out).get("weights") == AVERAGED
    except (OSError, ValueError):
        is_export = False
    if not is_export:
        raise ValueError(f"{out} exists and is no export: name a new folder")
    if (out / TRAINING / ".lock").exists():
        raise ValueError(
            f"{out / TRAINING} has been trained in, and is not replaced: move it elsewhere, or name a new folder"
        )
    if not overwrite:
        raise ValueError(f"{out} is an export already: replace it with --overwrite, or name a new folder")


def write_weights(source: TrainedCheckpoint, folder: Path, latents: LatentStatistics | None) -> None:
    """Write the averaged networks with their manifest, config.json and scores.json."""
    system, data = source.system, source.data_config
    measured = {name: getattr(latents, name) for name in STATISTICS} if latents else {}
    try:
        config, weights = to_diffusers(system, **measured)
        tensors = {WEIGHTS_FILE.removesuffix(".safetensors"): weights}
    except ValueError:  # it is of another family, or has no encoder of means and log-variances
        config = {"_class_name": type(system).__name__, "image_size": plain(data.size), "channels": data.channels}
        config |= {"latent_shape": [*system.latent_shape], **measured}
        tensors = {name: system.get_submodule(name).state_dict() for name in system.averaged}
    manifest = {"configuration": source.configuration, "data": source.manifest.get("data", []), "weights": AVERAGED}
    if source.ema_length is not None:
        manifest["ema_length"] = source.ema_length
    write_files(folder, source.saved.step, tensors, manifest)
    write_json(folder / CONFIG_FILE, config)
    if source.scores:
        write_json(folder / "scores.json", dict(zip(("scores", "evaluation"), source.scores, strict=True)))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def copy_training(source: TrainedCheckpoint, folder: Path) -> None:
    """Copy a checkpoint with all that training goes on from, as the folder of a run.

    Raises:
        ValueError: it has no optimizers, or a file is a link or damaged.
    """
    if source.manifest.get("weights") == AVERAGED:
        raise ValueError(f"--full: {source.path} is an export without optimizers: name the run that it was made from")
    checkpoint = folder / "checkpoints" / f"step_{source.saved.step:08d}"
    checkpoint.mkdir(parents=True)
    for name, digest in source.manifest["files"].items():
        manifests.check_digest(name, _copy(source.path / name, checkpoint / name), digest)
    for name in ("manifest.json", "scores.json"):
        if (source.path / name).exists():
            _copy(source.path / name, checkpoint / name)
    home = source.path.resolve().parent
    extractor = home.parent / DEMO_CNN  # scores of later steps compare with earlier ones
    if home.name == "checkpoints" and extractor.exists():
        _copy(extractor, folder / DEMO_CNN)
    (folder / "config.yaml").write_text(yaml.safe_dump(source.configuration, sort_keys=False))


def _copy(source: Path, target: Path) -> str:
    """Copy a file and return its sha256; a link in somebody else's folder may lead to any file of this machine."""
    if source.is_symlink() or not source.is_file():
        raise ValueError(f"--full: {source} is a link or another special file, and is not copied")
    shutil.copyfile(source, target, follow_symlinks=False)
    return sha256(target)
