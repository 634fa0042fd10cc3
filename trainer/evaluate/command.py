"""Score a checkpoint, or images, against real ones: `python -m trainer.evaluate WHAT`, on one process or many.

WHAT is a checkpoint's folder, or a run's, whose newest one is taken: it is scored as evaluations in training are,
against its held-out images, or --against others. Or it is images, scored --against others: a folder of them, an
archive, WebDataset shards. Many processes: `accelerate launch -m trainer.evaluate WHAT`.
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from PIL import Image
from torch import Tensor

import models
from data.errors import DataError
from data.images import Limits, header
from data.inspect import add_limits
from data.loader import Samples, read
from data.order import permutation
from data.redact import redacted_all
from data.shards.reader import Shards
from data.sources import BOUNDS, Listed, open_source
from models.load import checkpoint_of
from trainer import schemas
from trainer.config.settings import METRICS, DataConfig, EvaluateConfig, Location
from trainer.distributed.accelerator import keep_freed_memory
from trainer.distributed.exit import CommandParser, exit_with_error, user_errors
from trainer.distributed.ranks import Ranks, code_checksum, run_on_main
from trainer.distributed.rendezvous import INIT_METHOD
from trainer.evaluate import metrics, reference
from trainer.evaluate.audit import audit
from trainer.evaluate.evaluator import KEPT, Evaluator
from trainer.evaluate.extractors.build import build
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.extractors.lpips import LPIPS
from trainer.evaluate.metrics import Gaussian, Moments
from trainer.evaluate.ranks import raise_on_all_ranks
from trainer.evaluate.reference import ReferenceStatistics
from trainer.log.run_folder import refuse_links

TIMEOUT = timedelta(hours=2)  # for the others, where one process trains a demo-cnn or waits for a download
MOST_KEPT = 50_000  # real images whose features are compared one by one
WORDS = {  # of the trainer's settings, by the names that they have here
    ", or train without scores: --evaluate.every 0": "",
    "--evaluate.": "--",
    "--data.cache": "--cache",
    "data.cache": "--cache",
    "evaluate.": "--",
    "data.channels is": "the images' channels (--channels) are",
    "data.test holds": "--against holds",
    "SOURCE ": "",
}
SIDES = range(8, 4097)  # pixels to which images are brought
Pixels = Callable[[Tensor], Tensor]  # indices [n] to uint8 [n, c, h, w]


def parser() -> CommandParser:
    made = CommandParser(
        prog="python -m trainer.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("what", metavar="WHAT", help="a checkpoint, a run, or images")
    made.add_argument("--against", metavar="REAL", help="images, or an .npz of their statistics (mu and sigma)")
    made.add_argument(
        "--num", type=PositiveInt, help="samples of a checkpoint; unset: 10000. Of images: a fixed choice; unset: all"
    )
    made.add_argument("--metrics", help=f"some of {','.join(METRICS)}, unset: all; prdc: precision, recall, ...")
    made.add_argument("--extractor", help="inception, demo-cnn, ...; unset: the run's, or for images inception")
    made.add_argument("--weights", help="file of its weights")
    made.add_argument("--lpips", help="file of torchvision's vgg16 weights, for LPIPS of reconstructions")
    made.add_argument("--cache", metavar="FOLDER", help="for a run's remote shards, on a disk of this machine")
    made.add_argument("--cache_gb", type=PositiveFloat, help="gigabytes that it never passes; unset: the run's")
    made.add_argument("--statistics", type=Path, help="folder that keeps real statistics; unset: the run's, or none")
    made.add_argument("--unverified", action="store_true", help="take an .npz that does not say what it is of")
    made.add_argument("--size", type=_side, help="pixels a side that images are brought to; unset: they have one")
    made.add_argument("--channels", type=int, choices=[1, 3], help="of images; unset: the first one's")
    add_limits(made)
    made.add_argument("--seed", type=NonNegativeInt, help="of the samples; unset: the run's")
    made.add_argument("--out", metavar="FOLDER", type=Path, help="write the scored samples there as PNG")
    made.add_argument("--audit", action="store_true", help="recompute by torch-fidelity; fail where it disagrees")
    return made


def _side(word: str) -> int:
    if not word.isdecimal() or int(word) not in SIDES:
        raise argparse.ArgumentTypeError(f"'{word}' pixels: expected {SIDES[0]} to {SIDES[-1]}")
    return int(word)


@dataclass
class Job:
    """What is scored, by what, against what.

    Args:
        evaluator: knows the real images
        score: gives the scores
        images: what they are scores of; None where a system draws no samples
        num: of these
        real: the real images; None where there are only statistics of them
        facts: of WHAT, for the JSON line
    """

    evaluator: Evaluator
    score: Callable[[], dict[str, float]]
    images: Pixels | None
    num: int
    real: Samples | ReferenceStatistics
    facts: dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    settings = parser().parse_args(arguments)
    with user_errors(), _in_its_words():
        accelerator = _accelerator()
        job = _job(settings, accelerator)
        scores = _refusing_diverged(job.score)
        del scores["eval/seconds_share"]  # of a run's time
        main_process = accelerator.is_main_process
        if main_process:
            _tell(job, scores, accelerator.num_processes)
        if settings.out:
            raise_on_all_ranks(lambda: _write(job, settings.out))
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # an audit is one process's, and takes long
    if main_process and settings.audit:
        _audit(job, scores)


def _accelerator() -> Accelerator:
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=TIMEOUT)])
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes, but each would score alone: for CPU processes set "
            "ACCELERATE_USE_CPU=true before `accelerate launch --multi_gpu`"
        )
    return accelerator


@contextmanager
def _in_its_words() -> Iterator[None]:
    """What parts of the trainer exit_with_error, by the names that the settings have here."""
    try:
        yield
    except (ValueError, DataError) as error:
        text = str(error)
        for theirs, ours in WORDS.items():
            text = text.replace(theirs, ours)
        raise ValueError(text) from error


def _refusing_diverged(score: Callable[[], dict[str, float]]) -> dict[str, float]:
    try:
        return score()
    except FloatingPointError as error:
        raise ValueError(f"{error}: these images cannot be scored") from error


# ---- what is scored


def _job(settings: argparse.Namespace, accelerator: Accelerator) -> Job:
    wanted = [name for name in (settings.metrics or ",".join(METRICS)).split(",") if name]
    if unknown := [name for name in wanted if name not in METRICS]:
        raise ValueError(f"--metrics names {', '.join(unknown)}, expected some of {','.join(METRICS)}")
    out, path = settings.out, Path(settings.what)
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already, and not empty: name a new folder")
    if settings.audit and settings.against and settings.against.endswith(".npz"):
        raise ValueError("--audit needs images on both sides, and --against names statistics")
    if found := run_on_main(accelerator, lambda: _found(path)):  # a run that goes on may save another one meanwhile
        return _of_checkpoint(settings, accelerator, found, wanted)
    return _of_images(settings, accelerator, wanted)


def _found(path: Path) -> Path | None:
    """The checkpoint that a path names; None where it names no run."""
    return checkpoint_of(path) if (path / "manifest.json").exists() or (path / "checkpoints").is_dir() else None


def _check_alike(settings: argparse.Namespace, accelerator: Accelerator, **own: Any) -> None:
    """All processes must score the same by the same program, or they would add up what has no common meaning."""
    asked = {name: str(value) for name, value in vars(settings).items()}
    Ranks(accelerator, int(TIMEOUT.total_seconds())).check_same({"code": code_checksum(), **asked, **own})


def _identity(settings: argparse.Namespace, real: Samples | ReferenceStatistics) -> str:
    """A fingerprint of images, or of the file that statistics of some are in."""
    if isinstance(real, ReferenceStatistics):
        return hashlib.sha256(Path(settings.against).read_bytes()).hexdigest()
    return real.fingerprint()


def _of_checkpoint(settings: argparse.Namespace, accelerator: Accelerator, path: Path, wanted: list[str]) -> Job:
    saved = schemas.checkpoint(path)
    known, home = saved.configuration.data, path.resolve().parent
    run = home.parent if home.name == "checkpoints" else None  # a copy elsewhere has none
    if run:
        refuse_links(run)  # statistics are kept there
    if settings.size or settings.channels:
        raise ValueError("--size and --channels are of images; a checkpoint's are its own")
    data = _data(settings, known)
    system = models.load(path).to(accelerator.device)
    evaluate = _extractor_of(settings, saved.configuration.evaluate, run)
    if settings.against:
        tests = [_real(settings, None)]  # read as its own held-out images are
        if system.can("translate"):
            raise ValueError("--against names one set of images, and translations are scored against two: leave it")
    elif data.tests:
        tests = [*_opened("data.test", data, data.tests)]
    else:
        raise ValueError(f"{path} was trained without held-out images (data.test): name some with --against")
    shards = [test for test in tests if not isinstance(test, ReferenceStatistics)]
    trains = _trains(evaluate, data)
    identities = [_identity(settings, images) for images in (*tests, *trains)]
    _check_alike(settings, accelerator, checkpoint=saved.sha256, images=identities)
    extractor = build(evaluate, data, run or Path(), trains, shards, accelerator)
    _check_asked(settings, system, extractor)
    seed = saved.configuration.trainer.seed if settings.seed is None else settings.seed
    num = settings.num or 10_000
    evaluator = Evaluator(
        accelerator,
        extractor,
        [_verified(settings, test, extractor, data) for test in tests],
        data,
        num=num,
        seed=seed,
        system=system,
        metrics=wanted,
        statistics=settings.statistics or (run and run / "statistics"),
        distance=LPIPS(settings.lpips, accelerator.device) if settings.lpips else None,
        kept=max(num, KEPT),  # as in training, where there are no more
    )
    images: Pixels | None = None
    if system.can("sample"):
        images = lambda index: evaluator.samples(system, index)  # noqa: E731
    elif settings.audit or settings.out:
        raise ValueError(f"--audit and --out are of samples, and {type(system).__name__} draws none")
    facts = {"checkpoint": str(path), "step": saved.step, "weights": "ema", "seed": seed, **_asked(settings)}
    return Job(evaluator, lambda: evaluator(system), images, num, tests[0], facts)


def _of_images(settings: argparse.Namespace, accelerator: Accelerator, wanted: list[str]) -> Job:
    if not settings.against:
        missing = "" if Path(settings.what).exists() else ", for it does not exist"
        raise ValueError(
            f"{settings.what} is no run or checkpoint{missing}: name one, or for images also real ones with --against"
        )
    if settings.seed is not None or settings.lpips or settings.cache or settings.cache_gb:
        raise ValueError("--seed, --lpips, --cache and --cache_gb have no effect on images: leave them unset")
    fake = _listed(settings.what, _limits(settings))
    num = settings.num or len(fake)
    if num > len(fake):
        raise ValueError(f"--num is {num:,}, and {settings.what} holds {len(fake):,} images")
    size, channels = _look(fake, settings)
    data = DataConfig(Location(""), None, size, channels)
    real = _real(settings, size, channels)
    _check_alike(settings, accelerator, images=[fake.fingerprint(), _identity(settings, real)])
    evaluate = _extractor_of(settings, None, None)
    if evaluate.extractor == "demo-random" and isinstance(real, ReferenceStatistics):
        raise ValueError("--extractor demo-random is made of the real images, and --against names statistics")
    against = [] if isinstance(real, ReferenceStatistics) else [real]
    with tempfile.TemporaryDirectory() as nowhere:
        extractor = build(evaluate, data, Path(nowhere), against, against, accelerator)
    _check_asked(settings, None, extractor)
    positions = np.arange(len(fake)) if num == len(fake) else np.sort(permutation(len(fake), 0)[:num])
    evaluator = Evaluator(
        accelerator,
        extractor,
        [_verified(settings, real, extractor, data)],
        data,
        num=num,
        seed=0,
        metrics=wanted,
        statistics=settings.statistics,
        kept=num if isinstance(real, ReferenceStatistics) else max(num, min(len(real), MOST_KEPT)),
    )

    def images(index: Tensor) -> Tensor:
        return read(fake, positions[index.numpy()], size, channels).image.to(accelerator.device)

    facts = {"images": settings.what, "fingerprint": fake.fingerprint(), **_asked(settings)}
    return Job(evaluator, lambda: evaluator.score(images), images, num, real, facts)


def _check_asked(settings: argparse.Namespace, system: models.System | None, extractor: Extractor) -> None:
    """Refuse what would have no effect."""
    asked, kind = settings.metrics or "", type(system).__name__
    kept = bool(settings.against) and settings.against.endswith(".npz")
    samples, reconstructions = (system is None or system.can(use) for use in ("sample", "reconstruct"))
    for option, given, needs, has in (
        ("--metrics", settings.metrics, f"is of samples, and {kind} draws none", samples),
        ("--num", settings.num, f"is of samples, and {kind} draws none", samples),
        ("--lpips", settings.lpips, f"is of reconstructions, and {kind} makes none", reconstructions),
        ("--lpips", settings.lpips, "is of reconstructions, and --against names statistics of images", not kept),
        ("--statistics", settings.statistics, "keeps statistics, and --against names some", not kept),
        ("--unverified", settings.unverified, "is of an .npz of statistics, and --against names none", kept),
    ):
        if given and not has:
            raise ValueError(f"{option} {needs}: leave it unset")
    if "is" in asked.split(",") and not extractor.classes:
        raise ValueError(f"--metrics names is, and {extractor.name} knows no classes, which an inception score needs")


def _asked(settings: argparse.Namespace) -> dict[str, Any]:
    """For the JSON line: what was asked for that nothing else there tells."""
    return {name: value for name in ("against", "unverified") if (value := getattr(settings, name))}


def _data(settings: argparse.Namespace, known: schemas.Images) -> DataConfig:
    """A run's data settings, less those by which its folder would have something run or written on this machine."""
    train, test = (
        [*map(Location, [named] if isinstance(named, str) else named or [])] for named in (known.train, known.test)
    )
    cache = Location(os.path.abspath(settings.cache)) if settings.cache else None
    data = DataConfig(
        train, test, known.size, known.channels, cache=cache, cache_gb=settings.cache_gb or known.cache_gb
    )
    return replace(data, **{f"max_{name}": limit for name, limit in _limits(settings)._asdict().items()})


def _limits(settings: argparse.Namespace) -> Limits:
    return Limits(settings.max_pixels, settings.max_bytes, settings.max_scans)


def _extractor_of(settings: argparse.Namespace, known: schemas.Extractor | None, run: Path | None) -> EvaluateConfig:
    """The extractor of the command line, or else the run's, whose demo-cnn is taken as it was trained.

    A file is opened only if the command line names it: a run's folder may be a stranger's, and such a file code.
    """
    kind = settings.extractor or (known.extractor if known else "inception")
    weights = settings.weights
    if known and kind == known.extractor:
        code = kind == "file" and not settings.extractor
        if code or (known.weights and not weights):
            warning = ". It is code_checksum, which runs on this machine: name none that you do not trust" * (
                kind == "file"
            )
            raise ValueError(
                f"the run was scored by {kind}, of the file {known.weights!r}, and a file that a run's folder names is "
                f"not opened: name it with --extractor {kind} --weights FILE{warning}"
            )
    if kind == "demo-cnn" and not weights:
        if run is None:
            raise ValueError("--extractor demo-cnn is a run's own: name its file with --weights")
        kept = run / "demo-cnn-v1.safetensors"
        weights = str(kept) if kept.exists() else None
    return EvaluateConfig(extractor=kind, weights=Location(weights) if weights else None)


def _trains(evaluate: EvaluateConfig, data: DataConfig) -> list[Shards]:
    """Training shards, for an extractor that is made of them."""
    made = evaluate.extractor == "demo-random" or (evaluate.extractor == "demo-cnn" and not evaluate.weights)
    return _opened("data.train", data, data.trains) if made else []


def _opened(setting: str, data: DataConfig, sources: list[str]) -> list[Shards]:
    try:
        return data.open(sources, by_user=False)  # the checkpoint's manifest names them
    except DataError as error:
        raise DataError(f"the run's {setting}: {error}. Images elsewhere: --against") from error


def _real(settings: argparse.Namespace, size: int | None, channels: int | None = None) -> Samples | ReferenceStatistics:
    if settings.against.endswith(".npz"):
        return reference.load(Path(settings.against), None)
    size, channels = None if settings.size else size, None if settings.channels else channels
    return _listed(settings.against, _limits(settings), size, channels)


def _listed(name: str, limits: Limits, size: int | None = None, channels: int | None = None) -> Shards | Listed:
    """Images by position: shards as a run reads them, or others, which must all have the size and channels given."""
    path = Path(name)
    if (path / "index.json").exists() or path.suffix == ".json" or (path.is_dir() and any(path.glob("*.tar"))):
        return Shards(name, limits=limits)
    unpacked = tempfile.TemporaryDirectory()  # of a compressed archive: this process's own, removed with it
    bounds = BOUNDS._replace(image=limits)
    source = open_source(name, Path(unpacked.name, "images"), Path("datasets/torchvision"), splits=False, bounds=bounds)
    listed = Listed(source, name, size, channels)
    listed.limits = limits
    listed.unpacked = unpacked
    return listed


def _look(images: Shards | Listed, settings: argparse.Namespace) -> tuple[int, Any]:
    """Size and channels: those asked for, or the first image's, which then all must have."""
    (content,), _ = images.images(np.array([0]))
    try:
        size, channels = header(content, images.limits)
    except ValueError as error:
        raise DataError(f"{images.name(0)}: {error}") from error
    if not settings.size and size[0] != size[1]:
        raise ValueError(f"{images.name(0)} has {size[0]}x{size[1]} pixels: say with --size what to crop and resize to")
    if isinstance(images, Listed):
        images.size, images.channels = None if settings.size else size[0], None if settings.channels else channels
    return settings.size or size[0], settings.channels or channels


def _verified(
    settings: argparse.Namespace, real: Samples | ReferenceStatistics, extractor: Extractor, data: DataConfig
) -> Samples | ReferenceStatistics:
    """ReferenceStatistics must be of the same extractor, of images seen in the same way."""
    if not isinstance(real, ReferenceStatistics):
        return real
    path, dim = Path(settings.against), len(real.gaussian.mu)
    if dim != extractor.dim:
        raise ValueError(f"{path} holds statistics of {dim} features, and {extractor.name} gives {extractor.dim}")
    if not real.meta and not settings.unverified:
        raise ValueError(
            f"{path} does not say what it holds statistics of (another tool's files do not): if it is of "
            f"{extractor.name}'s features of images of {data.size} pixels, take it by --unverified"
        )
    if real.meta:
        expected = {
            "format": reference.FORMAT,
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            "resize": extractor.resize,
            "size": data.size,
            "channels": data.channels,
        }
        reference.check_meta(path, {name: real.meta.get(name) for name in expected}, expected)
    if real.features is None and {"kid", "prdc"} & {*(settings.metrics or "kid").split(",")}:
        raise ValueError(f"{path} holds mu and sigma alone, and KID and precision need features: take --metrics fid,is")
    return real


# ---- what is told


def _tell(job: Job, scores: dict[str, float], processes: int) -> None:
    """A table, the floor, and one JSON line."""
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name:{width}}  {value:.6g}")
    floor = floors(job.evaluator.references[0])
    if floor:
        n, fid = floor
        print(f"floor: two halves of the real images, {n:,} against {n:,}, have FID {fid:.4g}; of more it is lower")
    facts = {**job.facts, **job.evaluator.facts, **job.evaluator.recipe, "world_size": processes}
    print(json.dumps(redacted_all({**scores, **({"eval/floor": floor[1]} if floor else {}), **facts})), flush=True)


def floors(reference: ReferenceStatistics) -> tuple[int, float] | None:
    """FID between two halves of the real images whose features are kept, and how many each has."""
    features = reference.features
    if features is None or len(features) < 4:
        return None
    half = len(features) // 2
    order = permutation(len(features), 0)

    def gaussian(chosen: np.ndarray) -> Gaussian:
        moments = Moments(features.shape[1], torch.device("cpu"))
        for part in features[torch.from_numpy(chosen).to(features.device)].cpu().split(1024):
            moments.update(part)
        return Moments.gaussian(moments.parts)

    return half, metrics.frechet(gaussian(order[:half]), gaussian(order[half : 2 * half]))


def _write(job: Job, out: Path) -> None:
    """The scored images as PNG, this process's blocks of them."""
    assert job.images is not None
    out.mkdir(parents=True, exist_ok=True)
    for index in job.evaluator.ranks.blocks(job.num):
        for i, pixels in zip(index.tolist(), job.images(index).cpu(), strict=True):
            image = (pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()
            Image.fromarray(image).save(out / f"{i:06d}.png")


def _audit(job: Job, scores: dict[str, float]) -> None:
    assert job.images is not None
    assert not isinstance(job.real, ReferenceStatistics)
    real, data = job.real, job.evaluator.data

    def pixels(index: Tensor) -> Tensor:
        return read(real, index.numpy(), data.size, data.channels).image

    if len(real) > job.evaluator.kept:
        print(f"audit: KID and precision are of {job.evaluator.kept:,} of the real images, and are not audited")
        scores = {name: value for name, value in scores.items() if name.startswith(("eval/fid", "eval/is"))}
    device = job.evaluator.accelerator.device
    lines = audit(job.evaluator.extractor, job.images, job.num, pixels, len(real), scores, device)
    for line in lines:
        print(line, flush=True)
    if wrong := [line for line in lines if not line.agrees]:
        exit_with_error(f"the audit disagrees: {'; '.join(map(str, wrong))}", code=1)
    print(f"audit: torch-fidelity agrees in {len(lines)} scores", flush=True)
