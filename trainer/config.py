"""The configuration: one parser for system, data, trainer and evaluate settings; what a user's mistake looks like."""

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch.distributed
import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt, register_type

import models
from data.cache import Cache
from data.errors import DataError
from data.files import check_yaml, regular, shown
from data.images import LIMITS, Limits
from data.redact import redacted, redacted_all
from data.remote import is_remote
from data.shards import OnError, Shards
from models.load import import_paths, names, settings_types
from models.networks.perceptual import WeightsFile
from trainer.launcher import is_first_on_machine

ANSWER = 5  # seconds in which a process that is there answers
Answer = TypeVar("Answer")
Metric = Literal["fid", "is", "kid", "prdc"]
METRICS: tuple[Metric, ...] = ("fid", "is", "kid", "prdc")  # of samples; prdc: precision, recall, density, coverage

# Settings that may change between a run and its continuation: they leave what a step computes as it is. The training
# shards and a perceptual network's weights are compared by their content instead; scores measured in another way have
# no part in which checkpoint is best.
FREE = frozenset(
    [
        *(f"trainer.{name}" for name in ("steps", "run_dir", "micro_batch", "save_every", "log_every", "check_every")),
        *(f"trainer.{name}" for name in ("keep", "keep_every", "time_limit", "timeout", "deterministic", "grad_sync")),
        *("trainer.share_passes", "trainer.accept_new_data", "trainer.compile"),
        *("data.train", "data.test", "data.workers"),
        "system.init_args.perceptual_weights",
        *(f"data.{name}" for name in ("on_error", "max_skipped", "cache", "cache_gb")),
        *(f"data.max_{name}" for name in Limits._fields),
        *("data.lanes", "data.window"),  # by the order's fingerprint, too
        *(f"evaluate.{name}" for name in ("every", "num", "extractor", "weights", "metrics")),
        *(f"evaluate.{name}" for name in ("statistics", "lpips", "budget")),
    ]
)


DENIED = re.compile(r"Importing '(.*?)' is not allowed, denied by .*? to allow it\.")  # jsonargparse's words


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do. Its last checkpoint is intact."""


class DivergedError(RunError):
    """A loss or gradient is not finite: started again as it is, the run would come to the same step."""


def _bounded(text: str) -> Any:
    """YAML of a recipe or a setting, within bounds, as jsonargparse reads it."""
    check_yaml(text)
    return _yaml(text)


_yaml = get_loader("yaml")
set_loader("yaml", _bounded, (yaml.YAMLError,))


class Location(str):
    """A URL, or an absolute path: relative to the YAML file that has it, on the command line to the working folder."""


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


# jsonargparse works inside a YAML file's folder while it reads that file, so abspath means what the file means.
for _kind in (Location, WeightsFile):
    register_type(_kind, str, lambda value, kind=_kind: kind(value if is_remote(value) else _absolute(value)))


@dataclass
class Data:
    """Data.

    Args:
        train: folder of WebDataset shards to learn from, an index.json of such, or a URL of either (s3, gs, hf, http
            ...); a list of two for CycleGAN
        test: held-out shards that evaluations compare with; as many as train
        size: pixels a side, 32 to 256: images are resized and cropped to it when read
        channels: 1 (grey) or 3 (colour)
        workers: processes a rank that decode ahead; 0 decodes in the training process
        crop: train on random crops that keep from so much to so much of an image, such as [0.5, 1]; unset: its centre
        flip: mirror half of the training images
        on_error: stop at shards and samples that are damaged, missing, empty or without an image; or skip them: damaged
            shards and samples without an image are left out, and the next good one stands in for a damaged image
        max_skipped: stop where more than this share of the images needed a stand-in
        window: samples among which a step's are chosen; a set no larger is shuffled whole. Unset: 2,048 times
            trainer.batch_size, at least 524,288
        lanes: places at once from which a step reads a larger set; each rank, and its cache, reads from its own. Unset:
            a quarter of trainer.batch_size, at least 64
        cache: folder for remote shards, on a disk of this machine
        cache_gb: gigabytes that it never passes
        max_pixels: of an image; one that has more is taken as damaged, for the memory it would take
        max_bytes: of an encoded image
        max_scans: of a JPEG, each of which takes time for all of its pixels
    """

    # The list first: as a Location, one would be written as a single text.
    train: list[Location] | Location
    test: list[Location] | Location | None = None
    size: int = 32
    channels: Literal[1, 3] = 3
    workers: NonNegativeInt = 2
    crop: tuple[float, float] | None = None
    flip: bool = False
    on_error: OnError = "stop"
    max_skipped: float = 0.01
    window: PositiveInt | None = None
    lanes: PositiveInt | None = None
    cache: Location | None = None
    cache_gb: PositiveFloat = 50.0
    max_pixels: PositiveInt = LIMITS.pixels
    max_bytes: PositiveInt = LIMITS.bytes
    max_scans: PositiveInt = LIMITS.scans

    def __post_init__(self) -> None:
        if self.crop and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"data.crop is {list(self.crop)}, expected two shares, such as [0.5, 1]")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"data.max_skipped is {self.max_skipped}, expected a share between 0 and 1")

    def open(self, sources: list[str], on_error: OnError = "stop", by_user: bool = True) -> list[Shards]:
        """Shards of training or of held-out images; `by_user`: as `Shards` has it.

        Raises:
            DataError: they are missing or damaged.
        """
        cache = Cache(self.cache, int(self.cache_gb * 1e9)) if self.cache else None
        limits = Limits(self.max_pixels, self.max_bytes, self.max_scans)
        return [Shards(source, on_error, cache, by_user, limits) for source in sources]

    @property
    def trains(self) -> list[str]:
        return [*self.train] if isinstance(self.train, list) else [self.train]

    @property
    def tests(self) -> list[str]:
        return [*self.test] if isinstance(self.test, list) else [self.test] if self.test else []


@dataclass
class Trainer:
    """Trainer.

    Args:
        steps: optimizer steps of the whole run
        batch_size: images a step, over all processes
        micro_batch: images a process takes through the networks at once, at most, to bound memory; unset: its whole
            share
        seed: of the weights, the order of the data and every draw
        run_dir: where all results go; the same command again goes on from there. Unset: runs/RECIPE
        precision: of passes; unset: the launcher's where that is bf16 or fp16, else bf16 on a GPU that has it
        overflows: updates in a row that fp16 may skip before the run has diverged
        grad_sync: average gradients between processes while they are made (ddp), or all at once after each player's
            last backward (flat), which can miss none and hides none of its time
        deterministic: take algorithms on a GPU that give the same bits each time, or fail where there is none
        save_every: steps between checkpoints; every evaluation and the last step save one, too
        log_every: steps between log lines
        check_every: steps between checks that all processes have the same weights; every save is one, too
        keep: newest checkpoints kept, besides the best by FID
        keep_every: keep the checkpoints of multiples of so many steps, too
        time_limit: "HH:MM:SS" or as else SLURM writes times: save and leave before the process is that old
        timeout: seconds that a process waits for the others before the run stops and names who is missing; more than a
            checkpoint takes to be written
        ema_half_life: of the averaged weights, in images
        ema_ramp: it is at most this share of the images seen
        compile: have torch.compile make encoders, decoders and generators faster, which takes it a minute or so;
            discriminators stay as they are, since a gradient penalty cannot go through compiled networks
        share_passes: make encoder and decoder passes once a step where possible; off saves memory, not the result
        accept_new_data: go on although images, their order or batch_size are others than those the run began with
    """

    steps: PositiveInt = 10_000
    batch_size: PositiveInt = 64
    micro_batch: PositiveInt | None = None
    seed: NonNegativeInt = 0
    run_dir: Location | None = None
    precision: Literal["no", "bf16", "fp16"] | None = None
    overflows: PositiveInt = 20
    grad_sync: Literal["ddp", "flat"] = "ddp"
    deterministic: bool = False
    save_every: PositiveInt = 1000
    log_every: PositiveInt = 50
    check_every: PositiveInt = 1000
    keep: PositiveInt = 2
    keep_every: PositiveInt | None = None
    time_limit: str | None = None
    timeout: PositiveInt = 600
    ema_half_life: PositiveInt = 10_000
    ema_ramp: PositiveFloat = 0.05
    compile: bool = False
    share_passes: bool = True
    accept_new_data: bool = False


@dataclass
class Evaluate:
    """Evaluation.

    Args:
        every: steps between evaluations (and after the last step); 0 is never
        num: samples drawn from the prior; the scores' names carry it
        extractor: inception (torch-fidelity's InceptionV3), demo-cnn (a small one trained on the labelled shards),
            demo-random (the same with random weights: needs no labels, and gives no inception score), file (one's own,
            as TorchScript or by torch.export), or one that torch-fidelity has registered, such as dinov2-vit-l-14
        weights: file of the extractor's weights; unset: TORCH_HOME's or downloaded (inception), or trained (demo-cnn)
        metrics: of samples: fid, is, kid, prdc (precision, recall, density and coverage)
        lpips: file of torchvision's vgg16 weights (a state_dict), for LPIPS of reconstructions; unset: no LPIPS
        statistics: folder where those of held-out images are kept, or one .npz file; unset: RUN_DIR/statistics
        budget: share of the run's time that evaluations may take: one that would take more is left out, but for the
            last step's. The training is the same whatever is left out
    """

    every: NonNegativeInt = 1000
    num: PositiveInt = 2000
    extractor: str = "inception"
    weights: Location | None = None
    metrics: list[Metric] = field(default_factory=lambda: [*METRICS])
    lpips: Location | None = None
    statistics: Location | None = None
    budget: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(f"evaluate.budget is {self.budget}, expected a share above 0 and up to 1")


@dataclass
class Config:
    """A parsed run: the settings as objects, the system yet to be built, and all of it as plain data.

    Args:
        dry_run: tell what the run would do on so many processes (0: on those that were launched), and do nothing
    """

    parser: ArgumentParser
    namespace: Namespace
    data: Data
    trainer: Trainer
    evaluate: Evaluate
    dry_run: int | None = None

    def system(self) -> models.System:
        """Build the system's networks from torch's seed.

        Raises:
            ValueError: a setting is out of its range.
        """
        return self.parser.instantiate(self.namespace).system

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain data without credentials: what is compared, and what a checkpoint keeps."""
        return redacted_all(yaml.safe_load(self.yaml()))

    def shown(self) -> str:
        """What `yaml` gives, without credentials."""
        text, resolved = self.yaml(), self.resolved()
        return text if yaml.safe_load(text) == resolved else yaml.safe_dump(resolved, sort_keys=False)

    def keep(self, path: Path) -> None:
        """Write the settings as a recipe; with credentials, only its owner may read it.

        Raises:
            OSError: it cannot be written.
        """
        text = self.yaml()
        if text == self.shown():
            path.write_text(text)
            return
        with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            os.fchmod(file.fileno(), 0o600)  # it may have been there
            file.write(text)

    def yaml(self) -> str:
        """Every setting as a recipe, credentials included."""
        return self.parser.dump(self.namespace, skip_link_targets=False, skip_unset=False)

    def settle_precision(self, precision: str) -> None:
        """Replace an unset precision by the launcher's, so that it is printed, saved and compared."""
        self.trainer.precision = self.namespace.trainer.precision = precision  # type: ignore[assignment]

    @property
    def run_dir(self) -> Path:
        assert self.trainer.run_dir is not None
        return Path(self.trainer.run_dir)


class Parser(ArgumentParser):
    """Says a user's mistake in one block and exits with code 2."""

    dry_run: int | None = None

    hint = "See python trainer/main.py --help, or --system.help NAME for a system's settings."

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a system's settings: the outer one speaks
            super().error(message, ex)
        refuse(f"{plain(message)}\n{self.hint}")


class DryRun(argparse.Action):
    """Leaves its value on the parser: it is no setting, and is neither printed, saved nor compared as one."""

    def __init__(self, option_strings: Sequence[str], dest: str, **others: Any):
        super().__init__(option_strings, dest, **others | {"default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        assert isinstance(parser, Parser)
        parser.dry_run = values


def _processes(word: object) -> int:
    if not (number := str(word)).isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"'{number}' is no number of processes: expected 1, 2, 3 ..., or nothing")
    return int(number)


def bound_imports() -> None:
    """Have jsonargparse import nothing that a command line or a file names but the known systems and their settings."""
    kinds = {part for kind in models.SYSTEMS for part in (kind, *settings_types(kind))}
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*chain(*map(import_paths, kinds))])


def parser() -> Parser:
    bound_imports()
    made = Parser(prog="main.py", description="Train a system of the VAE/GAN family on WebDataset shards.")
    made.add_argument("--config", action="config", help="a recipe: a YAML file of these settings")
    known = ", ".join(names())
    made.add_argument("--system", type=models.System, required=True, help=f"one of {known}, and its settings")
    made.add_argument(
        "--dry_run",
        action=DryRun,
        type=_processes,
        nargs="?",
        const=0,
        metavar="PROCESSES",
        help="tell what the run would do and take on so many processes, unset: on those launched, and do nothing",
    )
    for section, kind in {"data": Data, "trainer": Trainer, "evaluate": Evaluate}.items():
        made.add_class_arguments(kind, section)
    made.link_arguments("data.size", "system.init_args.image_size")
    made.link_arguments("data.channels", "system.init_args.channels")
    return made


def configure(arguments: Sequence[str] | None = None) -> Config:
    """The configuration of a command line, which overrides its recipe; a mistake in it ends the process with code 2."""
    made, words = parser(), in_order(sys.argv[1:] if arguments is None else arguments)
    for recipe in _recipes(words):
        try:
            regular(recipe)
        except FileNotFoundError:
            continue  # the parser says so
        except OSError as error:
            made.error(f"--config {recipe} cannot be read: {error.strerror}")
    namespace = made.parse_args(words)
    if "dry_run" in namespace:
        made.error("dry_run is no setting: give --dry_run on the command line, not in a file")
    recipes = namespace.pop("config") or []
    system = namespace.system.class_path.rpartition(".")[2]
    for recipe in recipes:
        _tell_dropped(Path(recipe.absolute), namespace)
    if namespace.trainer.run_dir is None:
        name = Path(recipes[-1].relative).stem if recipes else system.lower()
        namespace.trainer.run_dir = Location(os.path.abspath(os.path.join("runs", name)))
    with refusing():
        data, evaluate = Data(**namespace.data.as_dict()), Evaluate(**namespace.evaluate.as_dict())
    return Config(made, namespace, data, Trainer(**namespace.trainer.as_dict()), evaluate, made.dry_run)


def in_order(arguments: Sequence[str]) -> list[str]:
    """Recipes first, then the system's name, then the rest: the later wins, and the name is needed early."""
    first: dict[str, list[str]] = {"--config": [], "--system": []}
    rest, words = [], iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if name in first:
            first[name] += [word] if equals else [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            rest.append(word)
    return [*first["--config"], *first["--system"], *rest]


def _recipes(arguments: Sequence[str]) -> list[str]:
    """The files that --config names."""
    named = [after for word, after in pairwise(arguments) if word == "--config"]
    return named + [word.partition("=")[2] for word in arguments if word.startswith("--config=")]


def _tell_dropped(recipe: Path, namespace: Namespace) -> None:
    """A system named over a recipe's keeps the settings that both have: say which others are gone."""
    stated = (yaml.safe_load(recipe.read_text()) or {}).get("system")
    settings = stated.get("init_args", {}) if isinstance(stated, dict) else {}
    dropped = sorted(set(settings) - set(namespace.system.init_args.as_dict()))
    if dropped and is_first_on_machine():
        system = namespace.system.class_path.rpartition(".")[2]
        print(f"{system} has no {', '.join(dropped)}: dropped from {recipe.name}", file=sys.stderr)


def differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "", free: frozenset[str] = FREE) -> list[str]:
    """The settings in which two resolved configurations differ, one line each, but for the free ones."""
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.", free)
        elif old != new and f"{prefix}{key}" not in free:
            lines.append(f"{prefix}{key}: {old} in the checkpoint, {new} now")
    return [line.replace("init_args.", "") for line in lines]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their names on the command line."""
    named: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        named |= flat(value, f"{name}.") if isinstance(value, dict) else {name.replace("init_args.", ""): value}
    return named


def _is_first_to_tell() -> bool:
    """Whether no other process has told of an error: all may meet the same one, or one alone its own."""
    if not torch.distributed.is_initialized():
        return is_first_on_machine()
    told = ask_store(lambda store: store.add("errors told", 1), ANSWER)
    return told is None or told == 1  # None: whoever else is left cannot be asked


def ask_store(question: Callable[[torch.distributed.Store], Answer], seconds: float) -> Answer | None:
    """What the processes' common store answers; None where its host, or the network to it, does not in some seconds.

    In a thread, for the store itself waits without end on a network that was cut.
    """
    answers: list[Answer] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the host is gone
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=seconds))
            answers.append(question(store))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def refuse(message: str, code: int = 2) -> NoReturn:
    """Say an error in one block, on one process alone, and exit."""
    if _is_first_to_tell():
        print(shown(f"error: {redacted(message)}", keep="\n"), file=sys.stderr, flush=True)
        if torch.distributed.is_initialized():
            time.sleep(1)  # this process may host the store in which others look whether it has been told
    raise SystemExit(code)


@contextmanager
def refusing() -> Iterator[None]:
    """Before any training: a setting or the data that cannot be is said without a traceback, exit code 2."""
    try:
        yield
    except (ValueError, DataError, OSError) as error:
        refuse(str(error))
    except RunError as error:  # a process is missing: the same command may do
        refuse(str(error), code=1)


@contextmanager
def stopping() -> Iterator[None]:
    """During training: why a run stopped is said without a traceback, exit code 1."""
    try:
        yield
    except (DataError, RunError, OSError) as error:
        refuse(str(error), code=1)


def plain(message: str) -> str:
    """jsonargparse's message on one line, without Python's class paths, naming settings and choices in full."""
    known = f"system is one of {', '.join(names())}"
    if "Expected a dot import path string" in message:
        message += f" ({known.replace('system is', 'expected')})"
    message = DENIED.sub(rf"class_path \1 is not imported: {known}, and no other setting names a class", message)
    if message.startswith('Parser key "system":'):
        for nested in ('Parser key "', "Option '", "arguments: --"):
            head, found, tail = message.rpartition(nested)
            if head:
                message = f"{head}{found}system.{tail}"
    message = message.replace('Parser key "system":', "")
    for old, new in {"Parser key": "setting", "a typing.Literal": "one of ", "<class ": "", "'>": "'"}.items():
        message = message.replace(old, new)
    noise = ("Given value type", "Subtypes:", "Does not validate", "Errors:", "- Expected a 'NoneType'", "Problem with")
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise))
