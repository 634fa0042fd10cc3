"""What `python -m trainer.evaluate` scores: a checkpoint or images, and the real images it is compared with."""

import argparse
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

import models
from data.dataset import class_names, held_out_of
from data.errors import DataError
from data.files import near
from data.images import Limits, Size, header, one_size
from data.loader import Samples, read
from data.order import permutation
from data.shards.reader import OnError, Shards
from data.shards.remote import is_remote
from data.sources import BOUNDS, Listed, open_source
from data.sources.listed import check_shape
from models.load import checkpoint_of
from trainer import schemas
from trainer.classes import check_class_names
from trainer.config.settings import DataConfig, EvaluateConfig, Location
from trainer.distributed.ranks import Ranks, code_checksum, run_on_main
from trainer.evaluate import reference
from trainer.evaluate.accumulators import ImagesByIndex
from trainer.evaluate.evaluator import KEPT, Evaluator
from trainer.evaluate.extractors.build import build_extractor
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.extractors.lpips import LPIPS
from trainer.metrics import METRICS, OF_SUMS
from trainer.metrics.statistics import ReferenceStatistics
from trainer.networks import set_memory_format
from trainer.run_folder import refuse_links
from trainer.run_place import is_run, local_run, run_place
from trainer.samplers import open_sampler

TIMEOUT = timedelta(hours=2)  # for ranks that wait while one trains a demo-cnn or downloads weights
OF_SAMPLES = ("metrics", "num", "out", "sampler", "truncation", "audit")
# Options that have an effect on a checkpoint only.
OF_A_SYSTEM = ("seed", "lpips", "cache", "cache_gb", "sampler", "truncation", "components", "train", "train_num")
MAX_KEPT = 50_000  # real images whose features are kept for KID and precision
Real = Samples | ReferenceStatistics


@dataclass
class Target:
    """What is scored, and how."""

    evaluator: Evaluator
    score: Callable[[], dict[str, float]]
    images: ImagesByIndex | None  # gives the scored images by their indices; None if the system draws no samples
    real: Real
    facts: dict[str, Any]  # what is scored, for the line of JSON


def open_target(settings: argparse.Namespace, accelerator: Accelerator, stack: ExitStack) -> Target:
    """Return what the command line names; the stack removes the copy of a run at a URL.

    Raises:
        ValueError, DataError, OSError: it cannot be scored; the message says what to change.
    """
    remote = "://" in settings.what and run_on_main(accelerator, lambda: not settings.against or is_run(settings.what))
    if settings.audit and (settings.against or "").endswith(".npz"):
        raise ValueError("--audit needs real images, but --against names statistics")

    def find() -> Path | None:
        path = stack.enter_context(local_run(run_place(settings.what))) if remote else Path(settings.what)
        is_run = (path / "manifest.json").exists() or (path / "checkpoints").is_dir()
        return checkpoint_of(path) if is_run else None

    # One rank looks for all: a run that is still training may save another checkpoint at any time.
    if checkpoint := run_on_main(accelerator, find):
        target = _checkpoint(settings, accelerator, checkpoint)
        return replace(target, facts=target.facts | {"checkpoint": settings.what}) if remote else target
    return _images(settings, accelerator)


def _checkpoint(settings: argparse.Namespace, accelerator: Accelerator, path: Path) -> Target:
    saved, run = schemas.checkpoint(path), _run_of(path)
    if settings.size or settings.channels:
        raise ValueError("--size and --channels apply to images; a checkpoint has its own")
    data = _data(settings, saved.configuration.data)
    system = models.load(path).to(accelerator.device)
    set_memory_format(system)  # as in training: in another one convolutions round otherwise
    config = _extractor_config(settings, saved.configuration.evaluate, run)
    real = _real_images(settings, system, path, data)
    train = _training_images(config, data)
    identities = [_identity(settings, images) for images in (*real, *train)]
    _check_same(settings, accelerator, checkpoint=saved.sha256, images=identities)
    held_out = [images for images in real if not isinstance(images, ReferenceStatistics)]
    extractor = build_extractor(config, data, run or Path(), train, held_out, accelerator, prefix="--")
    _check_options(settings, system, extractor)
    seed = saved.configuration.trainer.seed if settings.seed is None else settings.seed
    # An option about samples asks for some, also of a system that its run scores by reconstructions alone.
    draws = saved.configuration.evaluate.num != 0 or any(getattr(settings, option) for option in OF_SAMPLES)
    num = settings.num or (10_000 if draws or isinstance(real[0], ReferenceStatistics) else 0)
    sampler = run_on_main(accelerator, lambda: open_sampler(settings, system, data, str(accelerator.device)))
    evaluator = Evaluator(
        accelerator,
        extractor,
        [_check_statistics(settings, images, extractor, data) for images in real],
        data,
        num=num,
        seed=seed,
        system=system,
        metrics=settings.metrics or [*METRICS],
        statistics=settings.statistics or (run and run / "statistics"),
        lpips=LPIPS(settings.lpips, accelerator.device, "--lpips") if settings.lpips else None,
        kept=max(num, KEPT),
        sampler=sampler,
    )
    averages = "ema" if saved.ema_length is None else f"ema of length {saved.ema_length:g}"
    facts = {"checkpoint": str(path), "step": saved.step, "weights": averages, "seed": seed, **_option_facts(settings)}
    images = (lambda index: evaluator.samples.draw(system, index)) if system.can("sample") else None
    return Target(evaluator, lambda: evaluator(system), images, real[0], facts)


def _images(settings: argparse.Namespace, accelerator: Accelerator) -> Target:
    if not settings.against:
        missing = "" if Path(settings.what).exists() else f", and does not exist{near(Path(settings.what))}"
        raise ValueError(
            f"{settings.what} is not a run or a checkpoint{missing}. "
            "Name one, or for images also name real ones by --against"
        )
    _refuse(settings, (OF_A_SYSTEM, "images are scored, not a system"))
    fake = open_images(settings.what, _limits(settings))
    num = settings.num or len(fake)
    if num > len(fake):
        raise ValueError(f"--num is {num:,}, but {settings.what} holds {len(fake):,} images")
    if num < 2:
        raise ValueError(f"{settings.what} holds {num} image, and scores need at least 2 (a grid is one)")
    size, channels = _size_and_channels(fake, settings)
    data = DataConfig(Location(""), None, size, channels)
    real = _real(settings, size, channels)
    beside = f"the first image of {settings.what}"
    if isinstance(real, Listed):
        real.beside = beside
    if isinstance(real, Shards):
        size_of_all, channels_of_all = None if settings.size else size, None if settings.channels else channels
        try:
            check_shape(real.image(0), real.limits, size_of_all, channels_of_all, beside)
        except ValueError as error:
            raise DataError(f"{real.name(0)}: {error}") from error
    _check_same(settings, accelerator, images=[fake.fingerprint(), _identity(settings, real)])
    config = _extractor_config(settings, None, None)
    if config.extractor == "demo-random" and isinstance(real, ReferenceStatistics):
        raise ValueError("--extractor demo-random is made from the real images, but --against names statistics")
    real_images = [] if isinstance(real, ReferenceStatistics) else [real]
    with tempfile.TemporaryDirectory() as unused:
        extractor = build_extractor(config, data, Path(unused), real_images, real_images, accelerator, prefix="--")
    _check_options(settings, None, extractor)
    if config.extractor == "demo-random":  # of other images than a run's, whose scores have the plain name
        extractor.name += f"-{extractor.sha256[:8]}"
    evaluator = Evaluator(
        accelerator,
        extractor,
        [_check_statistics(settings, real, extractor, data)],
        data,
        num=num,
        seed=0,
        metrics=settings.metrics or [*METRICS],
        statistics=settings.statistics,
        kept=max([num, *(min(len(images), MAX_KEPT) for images in real_images)]),
    )
    positions = np.arange(len(fake)) if num == len(fake) else np.sort(permutation(len(fake), 0)[:num])

    def images(index: Tensor) -> Tensor:
        return read(fake, positions[index.numpy()], size, channels).image.to(accelerator.device)

    facts = {"images": held_out_of(settings.what), "fingerprint": fake.fingerprint(), **_option_facts(settings)}
    return Target(evaluator, lambda: evaluator.score(images), images, real, facts)


def _check_same(settings: argparse.Namespace, accelerator: Accelerator, **own: Any) -> None:
    """All ranks must score the same images by the same program, or their sums would mean nothing."""
    options = {name: str(value) for name, value in vars(settings).items()}
    Ranks(accelerator, int(TIMEOUT.total_seconds())).check_same({"code": code_checksum(), **options, **own})


def _refuse(settings: argparse.Namespace, *unused: tuple[Sequence[str], str]) -> None:
    """Raise a ValueError that names all options that were given, of pairs of options and why they have no effect."""
    reasons = []
    for options, why in unused:
        given = {name: getattr(settings, name) for name in options}
        if idle := [f"--{name}" for name, value in given.items() if value is not None and value is not False]:
            reasons.append(f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: {why}. ")
    if reasons:
        raise ValueError(f"{''.join(reasons)}Leave out what has no effect")


def _check_options(settings: argparse.Namespace, system: models.System | None, extractor: Extractor) -> None:
    """Options without an effect are refused."""
    kind = type(system).__name__
    statistics = (settings.against or "").endswith(".npz")
    samples, reconstructions = (system is None or system.can(use) for use in ("sample", "reconstruct"))
    unused = (
        (OF_SAMPLES, samples, f"{kind} draws no samples"),
        (("lpips",), reconstructions, f"{kind} makes no reconstructions"),
        (("lpips",), not statistics, "--against names statistics, and reconstructions need images"),
        (("statistics",), not statistics, "--against names statistics already"),
        (("unverified",), statistics, "--against names no statistics"),
    )
    _refuse(settings, *((options, why) for options, effective, why in unused if not effective))
    if "is" in (settings.metrics or []) and not extractor.classes:
        raise ValueError(
            f"--metrics is: the inception score needs classes, and {extractor.name} has none: leave is out, or "
            "name a classifier, such as --extractor inception"
        )


def _option_facts(settings: argparse.Namespace) -> dict[str, Any]:
    against = {"against": held_out_of(settings.against)} if settings.against else {}
    return against | ({"unverified": True} if settings.unverified else {})


# ---- a run's folder, which may be a stranger's


def _run_of(checkpoint: Path) -> Path | None:
    """The run's folder; None for a checkpoint that was copied elsewhere."""
    home = checkpoint.resolve().parent
    if home.name != "checkpoints":
        return None
    refuse_links(home.parent)  # statistics are kept there
    return home.parent


def _data(settings: argparse.Namespace, saved: schemas.ManifestData) -> DataConfig:
    cache = Location(os.path.abspath(settings.cache)) if settings.cache else None
    cache_gb = settings.cache_gb or saved.cache_gb
    limits = {f"max_{name}": limit for name, limit in _limits(settings)._asdict().items()}
    return DataConfig.of_manifest(saved, cache=cache, cache_gb=cache_gb, **limits)


def _extractor_config(
    settings: argparse.Namespace, saved: schemas.ManifestEvaluate | None, run: Path | None
) -> EvaluateConfig:
    """The extractor of the command line, or else the run's.

    A file of weights is opened only if the command line names it: a run's folder may be a stranger's, and the file
    code. The demo-cnn in the run's folder is safe to open.
    """
    kind = settings.extractor or (saved and saved.extractor) or "inception"
    weights = settings.weights
    if saved and kind == saved.extractor:
        is_code = kind == "file"
        if (is_code and not settings.extractor) or (saved.weights and not weights):
            warning = ". It is code that runs on this machine: name no file that you do not trust" if is_code else ""
            raise ValueError(
                f"the run was scored by extractor {kind} with the file {saved.weights!r}. A file that a run's folder "
                f"names is not opened: name it with --extractor {kind} --weights FILE{warning}"
            )
    if kind == "demo-cnn" and not weights:
        if run is None:
            raise ValueError("--extractor demo-cnn belongs to a run: name its file with --weights")
        kept = run / "demo-cnn-v1.safetensors"
        weights = str(kept) if kept.exists() else None
    return EvaluateConfig(extractor=kind, weights=Location(weights) if weights else None)


def _training_images(config: EvaluateConfig, data: DataConfig) -> list[Shards]:
    """Training shards, for an extractor that is made from them."""
    needed = config.extractor == "demo-random" or (config.extractor == "demo-cnn" and not config.weights)
    return _open_shards("data.train", data, data.trains, data.on_error) if needed else []


def _open_shards(setting: str, data: DataConfig, sources: list[str], on_error: OnError = "stop") -> list[Shards]:
    try:
        return data.open(sources, on_error, by_user=False)  # the checkpoint's manifest names them
    except DataError as error:
        raise DataError(f"the run's {setting}: {error}. Name images elsewhere with --against") from error


# ---- images


def _real_images(settings: argparse.Namespace, system: models.System, path: Path, data: DataConfig) -> list[Real]:
    """The images that a checkpoint is compared with: one set, or one for each domain of its translations."""
    if settings.against and system.can("translate"):
        raise ValueError("--against names one set of images, but translations are scored against two; leave it out")
    if settings.against:
        real = _real(settings, None)
        if system.classes and isinstance(real, Shards | Listed) and not is_remote(data.trains[0]):
            check_class_names(real.classes, class_names(Path(data.trains[0])), f"--against {settings.against}")
        return [real]
    if not data.tests:
        raise ValueError(f"{path} was trained without held-out images (data.test): name some with --against")
    return [*_open_shards("data.test", data, data.tests)]


def _real(settings: argparse.Namespace, size: Size | None, channels: int | None = None) -> Real:
    if settings.against.endswith(".npz"):
        return reference.load(Path(settings.against), None)
    size, channels = None if settings.size else size, None if settings.channels else channels
    return open_images(settings.against, _limits(settings), size, channels)


def _limits(settings: argparse.Namespace) -> Limits:
    return Limits(settings.max_pixels, settings.max_bytes, settings.max_scans)


def open_images(name: str, limits: Limits, size: Size | None = None, channels: int | None = None) -> Shards | Listed:
    """Return images by position: shards, or any other source, all of the given size and channels if there are any.

    A folder that data.prepare wrote stands for its held-out images.
    """
    name = held_out_of(name)
    path = Path(name)
    if (path / "index.json").exists() or path.suffix == ".json" or (path.is_dir() and any(path.glob("*.tar"))):
        return Shards(name, limits=limits)
    unpacked = tempfile.TemporaryDirectory()  # each rank unpacks a compressed archive for itself, and removes it
    bounds = BOUNDS._replace(image=limits)
    source = open_source(name, Path(unpacked.name, "images"), Path("datasets/torchvision"), splits=False, bounds=bounds)
    listed = Listed(source, name, size, channels)
    listed.limits = limits
    listed.unpacked = unpacked
    return listed


def _size_and_channels(images: Shards | Listed, settings: argparse.Namespace) -> tuple[Size, Any]:
    """The size and channels of the command line, or of the first image, which all images must then have."""
    (content,), _ = images.images(np.array([0]))
    try:
        (width, height), channels = header(content, images.limits)
    except ValueError as error:
        raise DataError(f"{images.name(0)}: {error}") from error
    own = one_size((height, width))
    if isinstance(images, Listed):
        images.size, images.channels = None if settings.size else own, None if settings.channels else channels
    return settings.size or own, settings.channels or channels


def _identity(settings: argparse.Namespace, real: Real) -> str:
    """A fingerprint of the images, or a checksum of the file of their statistics."""
    if isinstance(real, ReferenceStatistics):
        return hashlib.sha256(Path(settings.against).read_bytes()).hexdigest()
    return real.fingerprint()


def _check_statistics(settings: argparse.Namespace, real: Real, extractor: Extractor, data: DataConfig) -> Real:
    """Statistics must be of the same extractor, size and channels."""
    if not isinstance(real, ReferenceStatistics):
        return real
    path, dim = Path(settings.against), len(real.gaussian.mu)
    if dim != extractor.dim:
        raise ValueError(f"{path} holds statistics of {dim} features, but {extractor.name} gives {extractor.dim}")
    if not real.meta and not settings.unverified:
        raise ValueError(
            f"{path} does not say which images it describes, as files of other tools. If it holds {extractor.name}'s "
            f"features of images of {data.shape[1]} x {data.shape[2]} pixels, accept it with --unverified"
        )
    if real.meta:
        expected = reference.preprocessing(extractor, data)
        reference.check_meta(path, {name: real.meta.get(name) for name in expected}, expected)
    if real.features is None and {*(settings.metrics or METRICS)} - OF_SUMS:
        raise ValueError(f"{path} holds only mu and sigma, but KID and precision need features: use --metrics fid,is")
    return real
