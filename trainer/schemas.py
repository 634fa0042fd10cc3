"""The shapes of what is read from a run's folder: checked once, as it is read, so that whoever uses it need not."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from models import manifest

Shape = TypeVar("Shape")
Natural = Annotated[int, Meta(ge=0, le=10**18)]
Positive = Annotated[float, Meta(gt=0)]


class Images(Struct):
    """The data settings of a checkpoint that is used without its run."""

    size: Annotated[int, Meta(ge=32, le=256)]
    channels: Literal[1, 3]
    train: str | list[str]
    test: str | list[str] | None
    cache_gb: Positive


class Seeded(Struct):
    seed: Natural


class Extractor(Struct):
    extractor: str
    weights: str | None


class Sized(Struct):
    """The settings of a system that its images must have, too."""

    image_size: int
    channels: int


class System(Struct):
    init_args: Sized


class Used(Struct):
    """The configuration of a checkpoint that is used without its run."""

    system: System
    data: Images
    trainer: Seeded
    evaluate: Extractor


class Checkpoint(Struct):
    """A manifest, as trainer.generate and trainer.evaluate need it."""

    step: Natural
    configuration: Used
    sha256: str


class Source(Struct):
    """What a step sees of a training set."""

    images: Natural
    shards: Natural
    fingerprint: str
    order: str


class Window(Struct):
    """What a process had not logged yet."""

    terms: dict[str, tuple[float, float]]
    sample_checksum: Natural
    replaced: list[str]


class Scaler(Struct, rename={"growth_tracker": "_growth_tracker"}):
    """The state of a player's loss scaler."""

    scale: Positive
    growth_factor: Positive
    backoff_factor: Positive
    growth_interval: Natural
    growth_tracker: Natural
    overflows: Natural


class Kept(Struct):
    """A manifest, as a run goes on from it."""

    step: Natural
    configuration: dict[str, Any]
    data: list[Source]
    frozen: dict[str, str]
    scalers: dict[str, Scaler]
    evaluation_pending: bool
    replaced: Natural
    code: str
    windows: Annotated[list[Window], Meta(min_length=1)]


class Scores(Struct):
    """A checkpoint's scores.json."""

    scores: dict[str, float]
    evaluation: dict[str, Any]


class Evaluated(Struct):
    """What a line of metrics.jsonl says besides its scores, if it is an evaluation's."""

    extractor: str
    extractor_sha256: str
    held_out: str
    held_out_images: Natural


class Logged(Struct):
    """What every line of metrics.jsonl has; names with a slash are of numbers."""

    step: Natural


def checked(found: object, shape: type[Shape], what: str) -> Shape:
    """Plain data in the shape that is expected of it.

    Raises:
        ValueError: it has another; names `what` and the part that differs.
    """
    try:
        return msgspec.convert(found, shape)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{what} has another shape than a run writes ({error}): it is damaged or of another version, take another"
        ) from error


def checkpoint(path: Path) -> Checkpoint:
    """The manifest of a checkpoint that is used without its run.

    Raises:
        OSError, ValueError: there is none, it is damaged, or it has another shape.
    """
    found = checked(manifest.read(path), Checkpoint, f"{path / 'manifest.json'}")
    images, system = found.configuration.data, found.configuration.system.init_args
    if (images.size, images.channels) != (system.image_size, system.channels):
        raise ValueError(
            f"{path / 'manifest.json'} contradicts itself: its images have {images.size} pixels a side and "
            f"{images.channels} channels, and its system's {system.image_size} and {system.channels}"
        )
    return found
