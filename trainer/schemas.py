"""The shapes of a run's files, checked as they are read: manifest.json, scores.json and metrics.jsonl."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from data.images import MAX_CHANNELS
from models import manifest

Shape = TypeVar("Shape")
Natural = Annotated[int, Meta(ge=0, le=10**18)]
Positive = Annotated[float, Meta(gt=0)]


# ---- manifest.json of a checkpoint that is used without its run


class ManifestData(Struct):
    size: int | tuple[int, int]  # in the range of its system, as that checks
    channels: Annotated[int, Meta(ge=1, le=MAX_CHANNELS)]
    train: str | list[str]
    test: str | list[str] | None
    cache_gb: Positive
    bits: Literal[8, 16] = 8  # older runs do not name it
    on_error: Literal["stop", "skip"] = "stop"


class ManifestTrainer(Struct):
    seed: Annotated[int, Meta(ge=0)]  # of any size, as trainer.seed


class ManifestEvaluate(Struct):
    extractor: str | None
    weights: str | None
    num: Natural | None = None


class ManifestSystemArguments(Struct):
    image_size: int | tuple[int, int]
    channels: int


class ManifestSystem(Struct):
    init_args: ManifestSystemArguments


class ManifestConfiguration(Struct):
    system: ManifestSystem
    data: ManifestData
    trainer: ManifestTrainer
    evaluate: ManifestEvaluate


class CheckpointManifest(Struct):
    step: Natural
    configuration: ManifestConfiguration
    sha256: str
    ema_length: Positive | None = None  # of an export's averages that were made after training


# ---- manifest.json of a checkpoint that a run resumes from


class TrainingSet(Struct):
    images: Natural
    shards: Natural
    fingerprint: str
    order: str


class LogWindowState(Struct):
    """What a process had not logged yet."""

    terms: dict[str, tuple[float, float]]
    sample_checksum: Natural
    replaced: list[str]


class ScalerState(Struct, rename={"growth_tracker": "_growth_tracker"}):
    """The state of a player's loss scaler."""

    scale: Positive
    growth_factor: Positive
    backoff_factor: Positive
    growth_interval: Natural
    growth_tracker: Natural
    overflows: Natural


class ImpliedSystem(Struct):
    init_args: dict[str, Any] = {}


class ImpliedSettings(Struct):
    """Settings as a recipe has them."""

    data: dict[str, Any] = {}
    system: ImpliedSystem = msgspec.field(default_factory=ImpliedSystem)


class InitialWeights(Struct):
    """The weights that a run started from: sha256 of their files, and the settings that they implied."""

    sha256: dict[str, manifest.Digest]
    settings: ImpliedSettings


class ResumeManifest(Struct):
    step: Natural
    configuration: dict[str, Any]
    data: list[TrainingSet]
    frozen: dict[str, str]
    scalers: dict[str, ScalerState]
    evaluation_pending: bool
    replaced: Natural
    code: str
    windows: Annotated[list[LogWindowState], Meta(min_length=1)]
    initial: InitialWeights | None = None


class StartTrainer(Struct):
    init_from: str | None = None


class StartEvaluate(Struct):
    extractor: str | None = None


class StartConfiguration(Struct):
    trainer: StartTrainer
    evaluate: StartEvaluate = msgspec.field(default_factory=StartEvaluate)


class StartManifest(Struct):
    """What a run started from."""

    configuration: StartConfiguration
    initial: InitialWeights | None = None
    data: list[TrainingSet] = []


def newest_start(folder: Path) -> StartManifest | None:
    """Return what the newest checkpoint that can be read says of the run's start, or None without checkpoints."""
    for path in manifest.checkpoints(folder):
        with suppress(OSError, ValueError):
            return msgspec.convert(manifest.read(path), StartManifest)
    return None


# ---- other files


class ScoresFile(Struct):
    """scores.json of a checkpoint."""

    scores: dict[str, float]
    evaluation: dict[str, Any]


class MetricsLine(Struct):
    """A line of metrics.jsonl; all of its names with a slash have numbers."""

    step: Natural


class EvaluationLine(Struct):
    """A line of metrics.jsonl with an evaluation's scores."""

    extractor: str
    extractor_sha256: str
    held_out: str
    held_out_images: Natural
    num: Natural | None = None  # samples


def checked(found: object, shape: type[Shape], what: str) -> Shape:
    """Return plain data as an object of the expected shape.

    Args:
        found: the data
        shape: the expected type
        what: names the data in the message

    Raises:
        ValueError: the data has another shape; names the part that differs.
    """
    try:
        return msgspec.convert(found, shape)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{what} has another shape than a run writes ({error}): it is damaged, or of another version"
        ) from error


def checkpoint(path: Path) -> CheckpointManifest:
    """Return the manifest of a checkpoint that is used without its run.

    Raises:
        OSError, ValueError: it is missing or damaged, or has another format or shape.
    """
    file = path / "manifest.json"
    try:
        content = manifest.read(path)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    found = checked(content, CheckpointManifest, str(file))
    images, system = found.configuration.data, found.configuration.system.init_args
    if (images.size, images.channels) != (system.image_size, system.channels):
        raise ValueError(
            f"{file} contradicts itself: its images have {images.size} pixels a side and {images.channels} channels, "
            f"and its system's {system.image_size} and {system.channels}"
        )
    return found
