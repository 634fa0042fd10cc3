"""The configuration: one parser for system, data, trainer and evaluate settings; what a user's mistake looks like."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

import models
from data.files import check_yaml, regular_file
from data.redact import redacted_all
from models.load import import_paths, settings_types, system_names
from trainer.config.messages import plain_message
from trainer.config.settings import DataConfig, EvaluateConfig, Location, TrainerConfig
from trainer.distributed.exit import exit_with_error, user_errors
from trainer.distributed.launcher import is_local_main


def _bounded(text: str) -> Any:
    """YAML of a recipe or a setting, within bounds, as jsonargparse reads it."""
    check_yaml(text)
    return _yaml(text)


_yaml = get_loader("yaml")
set_loader("yaml", _bounded, (yaml.YAMLError,))


@dataclass
class Config:
    """A parsed run: the settings as objects, the system yet to be built, and all of it as plain data.

    Args:
        dry_run: tell what the run would do on so many processes (0: on those that were launched), and do nothing
    """

    parser: ArgumentParser
    namespace: Namespace
    data: DataConfig
    trainer: TrainerConfig
    evaluate: EvaluateConfig
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

    def redacted_yaml(self) -> str:
        """What `yaml` gives, without credentials."""
        text, resolved = self.yaml(), self.resolved()
        return text if yaml.safe_load(text) == resolved else yaml.safe_dump(resolved, sort_keys=False)

    def write(self, path: Path) -> None:
        """Write the settings as a recipe; with credentials, only its owner may read it.

        Raises:
            OSError: it cannot be written.
        """
        text = self.yaml()
        if text == self.redacted_yaml():
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
        exit_with_error(f"{plain_message(message)}\n{self.hint}")


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
    known = ", ".join(system_names())
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
    for section, kind in {"data": DataConfig, "trainer": TrainerConfig, "evaluate": EvaluateConfig}.items():
        made.add_class_arguments(kind, section)
    made.link_arguments("data.size", "system.init_args.image_size")
    made.link_arguments("data.channels", "system.init_args.channels")
    return made


def configure(arguments: Sequence[str] | None = None) -> Config:
    """The configuration of a command line, which overrides its recipe; a mistake in it ends the process with code 2."""
    made, words = parser(), in_order(sys.argv[1:] if arguments is None else arguments)
    for recipe in _recipes(words):
        try:
            regular_file(recipe)
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
    with user_errors():
        data, evaluate = DataConfig(**namespace.data.as_dict()), EvaluateConfig(**namespace.evaluate.as_dict())
        trainer = TrainerConfig(**namespace.trainer.as_dict())
    return Config(made, namespace, data, trainer, evaluate, made.dry_run)


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
    if dropped and is_local_main():
        system = namespace.system.class_path.rpartition(".")[2]
        print(f"{system} has no {', '.join(dropped)}: dropped from {recipe.name}", file=sys.stderr)
