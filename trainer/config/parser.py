"""The configuration: one parser of the system, data, trainer and evaluate settings, and its errors."""

import argparse
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

import models
from data.dataset import splits_of
from data.files import check_yaml, regular_file
from data.images import one_size
from data.redact import redacted_all
from data.shards.remote import is_remote
from models.load import find_system, import_paths, settings_types, system_names
from trainer import schemas
from trainer.config.messages import OF_COMPARISONS, SECTIONS, group_message, meant, other_recipes, plain_message
from trainer.config.resume import flatten
from trainer.config.settings import DataConfig, EvaluateConfig, Location, TrainerConfig
from trainer.config.words import LINKED, HelpFormatter, type_in_words
from trainer.distributed.exit import exit_with_error, user_errors
from trainer.distributed.launcher import is_local_main
from trainer.weights import FREE_SETTINGS, HUB, implied_recipe, implied_settings

SAMPLES = 2000  # that are scored, if evaluate.num does not say how many
PLAYER_HELP = re.compile(r"--system\.(\w+)\.help")


def _load_bounded_yaml(text: str) -> Any:
    check_yaml(text)
    return _load_yaml(text)


_load_yaml = get_loader("yaml")
set_loader("yaml", _load_bounded_yaml, (yaml.YAMLError,))


@dataclass
class Config:
    """A parsed run: its settings as objects, and as plain data.

    Args:
        parser: parsed the settings
        namespace: all settings
        data, trainer, evaluate: settings as objects; `system` builds the system
        dry_run: number of processes to print the resolved run for; 0: those that were launched; None: train
    """

    parser: ArgumentParser
    namespace: Namespace
    data: DataConfig
    trainer: TrainerConfig
    evaluate: EvaluateConfig
    dry_run: int | None = None

    def system(self) -> models.System:
        """Build the system's networks from torch's seed, and replace an unset evaluate.num by what it is for them.

        Raises:
            ValueError: a setting is out of its range, or evaluate.best a score that the system does not get.
        """
        system: models.System = self.parser.instantiate(self.namespace).system
        name, best = type(system).__name__, self.evaluate.best
        if best == "rfid" and not system.can("reconstruct"):
            raise ValueError(f"evaluate.best is rfid, but {name} makes no reconstructions: leave it out")
        if self.evaluate.num is None:
            self.evaluate.num = self.namespace.evaluate.num = SAMPLES if "fid" in (system.judged_by, best) else 0
            self._forget()
        system.judged_by = best or system.judged_by
        if self.evaluate.every and not self.evaluate.num and system.can("sample") and system.judged_by == "fid":
            raise ValueError(
                f"evaluate.num is 0, but {name} is judged by the FID of its samples: expected at least 2, or "
                + ("evaluate.best rfid" if system.can("reconstruct") else "evaluate.every 0")
            )
        return system

    @cached_property
    def yaml(self) -> str:
        """All settings as a recipe, credentials included."""
        return _recipe(self.parser, self.namespace)

    @cached_property
    def _plain(self) -> dict[str, Any]:
        return yaml.load(self.yaml, yaml.CSafeLoader)

    def resolved(self) -> dict[str, Any]:
        """Return all settings as plain data without credentials, as checkpoints keep and compare them."""
        return redacted_all(self._plain)

    def redacted_yaml(self) -> str:
        """Return all settings as a recipe without credentials."""
        resolved = self.resolved()
        return self.yaml if resolved == self._plain else yaml.safe_dump(resolved, sort_keys=False)

    def write(self, path: Path) -> None:
        """Write all settings as a recipe; only its owner can read it if it has credentials."""
        text = self.yaml
        if text != self.redacted_yaml():
            path.touch(0o600)
            path.chmod(0o600)  # the file may have existed
        path.write_text(text)

    def stated(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, by their names on the command line."""
        now = self.resolved()
        class_path, given = now["system"]["class_path"], now["system"]["init_args"]
        settings = inspect.signature(find_system(class_path)).parameters.values()
        needed = [one.name for one in settings if one.default is one.empty and one.name in given.keys() - {*LINKED}]
        system = {"class_path": class_path, "init_args": {name: given[name] for name in needed}}
        bare = self.parser.parse_object({"system": system, "data": {"train": "/nowhere"}})
        defaults = flatten(yaml.safe_load(_recipe(self.parser, bare)))
        return {name: value for name, value in flatten(now).items() if value != defaults.get(name)}

    def settle_extractor(self, extractor: str) -> None:
        """Replace an unset extractor by the one that the run has, so that it is saved."""
        self.evaluate.extractor = self.namespace.evaluate.extractor = extractor
        self._forget()

    def settle_precision(self, precision: str) -> None:
        """Replace an unset precision by the launcher's, so that it is printed, saved and compared."""
        self.trainer.precision = self.namespace.trainer.precision = precision  # type: ignore[assignment]
        self._forget()

    def _forget(self) -> None:
        for name in ("yaml", "_plain"):
            vars(self).pop(name, None)

    @property
    def run_dir(self) -> Path:
        """The run's folder on this machine, also if trainer.run_dir is a URL."""
        return _run_folder(self.trainer)


def _recipe(parser: ArgumentParser, namespace: Namespace) -> str:
    """Return all settings as a recipe; they were validated as they were parsed, which takes most of the time."""
    text: str = parser.dump(namespace, skip_link_targets=False, skip_unset=False, skip_validation=True)
    return text


class Parser(ArgumentParser):
    """Prints a user's mistake in one block and exits with code 2."""

    dry_run: int | None = None
    hint = "See python trainer/main.py --help, or --system.help NAME for a system's settings."

    def __init__(self, *given: Any, usage: str = "main.py --system NAME [--system.SETTING VALUE ...]", **named: Any):
        super().__init__(*given, usage=usage, formatter_class=HelpFormatter, **named)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a system's settings: the outer one prints the error
            super().error(message, ex)
        plain = plain_message(message)
        exit_with_error(f"{plain}{meant(plain)}\n{self.hint}")


class DryRun(argparse.Action):
    """Sets an attribute of the parser, since it is no setting: it is not printed, saved or compared as one."""

    def __init__(self, option_strings: Sequence[str], dest: str, **others: Any):
        super().__init__(option_strings, dest, **others | {"default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        assert isinstance(parser, Parser)
        if values is not None and not (values.isdecimal() and int(values)):
            parser.error(f"--dry_run must be a number of processes, at least 1; got {values!r}")
        parser.dry_run = int(values or 0)


def bound_imports() -> None:
    """Let jsonargparse import nothing but the known systems and their settings, whatever a file names."""
    kinds = {part for kind in models.SYSTEMS for part in (kind, *settings_types(kind))}
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*chain(*map(import_paths, kinds))])


def parser() -> Parser:
    """Return the parser of trainer/main.py."""
    bound_imports()
    made = Parser(
        prog="main.py",
        usage="main.py [--config RECIPE] [--system NAME] [--SECTION.SETTING VALUE ...]",
        description="Train a system of the VAE/GAN family on WebDataset shards.",
        allow_abbrev=False,  # --trainer.step would set trainer.steps
    )
    made.add_argument(
        "--config",
        action="config",
        metavar="RECIPE",
        help="A YAML file of these settings. Settings on the command line override it.",
    )
    known = ", ".join(system_names())
    made.add_argument("--system", type=models.System, required=True, help=f"The system to train: one of {known}.")
    made.add_argument(
        "--dry_run",
        action=DryRun,
        nargs="?",
        metavar="N",
        help="Print the resolved run for N processes and exit. Without N, for the processes that were launched.",
    )
    for section, kind in {"data": DataConfig, "trainer": TrainerConfig, "evaluate": EvaluateConfig}.items():
        made.add_class_arguments(kind, section)
    made.link_arguments("data.size", "system.init_args.image_size", compute_fn=one_size)
    made.link_arguments("data.channels", "system.init_args.channels")
    return made


def configure(arguments: Sequence[str] | None = None) -> Config:
    """Return the configuration of a command line and its recipes; a mistake in it exits with code 2."""
    made, words = parser(), in_order(sys.argv[1:] if arguments is None else arguments)
    if player := next(filter(None, map(PLAYER_HELP.fullmatch, words)), None):
        words = _player_help(made, words, player)
    for recipe in _recipes(words):
        if Path(recipe).name.startswith(OF_COMPARISONS):
            made.error(f"--config {recipe} is of a comparison: python -m trainer.compare --config {recipe} trains it")
        try:
            regular_file(os.path.expanduser(recipe))
        except OSError as error:
            others = other_recipes(Path(recipe).expanduser()) if isinstance(error, FileNotFoundError) else ""
            made.error(f"--config {recipe} cannot be read: {error.strerror}{others}")
    namespace = _parse(made, words)
    recipes = [recipe for recipe in namespace.config or [] if recipe]
    for recipe in recipes:
        _print_dropped(Path(recipe.absolute), namespace)
    with user_errors():
        implied: dict[str, Any] = {}
        if namespace.trainer.init_from is not None:
            init_from, implied = _start(namespace)
            namespace = _parse(made, ["--config", yaml.safe_dump(implied), *words])
            namespace.trainer.init_from = init_from
        namespace.pop("config")
        name_splits(namespace.data, bool(namespace.evaluate.every))
        config = Config(
            made,
            namespace,
            DataConfig(**namespace.data.as_dict()),
            TrainerConfig(**namespace.trainer.as_dict()),
            EvaluateConfig(**namespace.evaluate.as_dict()),
            made.dry_run,
        )
        if implied:
            _check_implied(config, implied)
        return config


def _player_help(made: Parser, words: Sequence[str], player: re.Match[str]) -> list[str]:
    """Return the words for which jsonargparse prints help about a player's settings.

    It does so for `--system.help NAME --system.PLAYER.help` if the player may be left out, and else among all settings
    of the system.
    """
    named = [after for word, after in pairwise(words) if word in ("--system", "--system.help")]
    named += [word.partition("=")[2] for word in words if word.startswith("--system=")]
    if not named:
        made.error(f"{player[0]} needs the system's name: --system NAME {player[0]}")
    if named[-1] not in system_names():
        return ["--system.help", named[-1]]
    hints = get_type_hints(find_system(named[-1]).__init__)
    with_settings = {name: hint for name, hint in hints.items() if any(map(is_dataclass, (hint, *get_args(hint))))}
    if player[1] not in with_settings:
        made.error(f"{player[0]}: {named[-1]} has no {player[1]}; it has {', '.join(with_settings)}")
    return ["--system.help", named[-1], *[player[0]] * (not is_dataclass(with_settings[player[1]]))]


def _parse(made: Parser, words: Sequence[str]) -> Namespace:
    """Return the settings of a command line, with a folder for the run."""
    namespace = made.parse_args(words)
    if "dry_run" in namespace:
        made.error("--dry_run is an option of the command line, and cannot be in a recipe")
    for group in SECTIONS:
        if namespace[group] is None:
            made.error(group_message(group, "null"))
    kinds: dict[str, type] = {"system.init_args": find_system(namespace.system.class_path), **SECTIONS}
    for name, hint in chain.from_iterable(_not_null(kind, section) for section, kind in kinds.items()):
        if name in namespace and namespace[name] is None:  # jsonargparse takes null for any setting
            made.error(f"{name.replace('.init_args', '')} is null, expected {type_in_words(hint)}")
    if namespace.trainer.run_dir is None:
        recipes = [recipe for recipe in namespace.config or [] if recipe]
        name = Path(recipes[-1].relative).stem if recipes else _system_name(namespace).lower()
        namespace.trainer.run_dir = Location(os.path.abspath(os.path.join("runs", name)))
    namespace.data.size = one_size(namespace.data.size)
    if isinstance(namespace.trainer.train_only, str):
        namespace.trainer.train_only = [namespace.trainer.train_only]
    return namespace


def _not_null(kind: Any, section: str) -> Iterator[tuple[str, Any]]:
    """Yield the names and types of a class's settings that cannot be null, nested ones included."""
    for name, hint in get_type_hints(kind.__init__).items():
        if name in (*LINKED, "return"):
            continue
        if type(None) not in get_args(hint):
            yield f"{section}.{name}", hint
        for part in (hint, *get_args(hint)):
            if is_dataclass(part):
                yield from _not_null(part, f"{section}.{name}")


def name_splits(data: Namespace | DataConfig, evaluated: bool) -> None:
    """Let data.train be a folder of data.prepare, and an unset data.test its held-out split if evaluations need it."""
    several = isinstance(data.train, list)
    trains = data.train if isinstance(data.train, list) else [data.train]
    splits = [splits_of(source) for source in trains]
    named = [Location(found.get("train", source)) for found, source in zip(splits, trains, strict=True)]
    data.train = named if several else named[0]
    if data.test is None and evaluated and all("test" in found for found in splits):
        tests = [Location(found["test"]) for found in splits]
        data.test = tests if several else tests[0]


def _run_folder(settings: TrainerConfig | Namespace) -> Path:
    url = str(settings.run_dir)
    if not is_remote(url):
        return Path(url)
    name = f"{url.rstrip('/').rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    return Path(settings.scratch or Path.home() / ".cache" / "vaegan-trainer" / "runs") / name


def _start(namespace: Namespace) -> tuple[str, dict[str, Any]]:
    """Return where a run's first weights are, and the settings that they imply, as a recipe.

    A run that has checkpoints takes both from the newest, since the weights may be gone.

    Raises:
        ValueError: there are no weights, or their settings are not understood.
    """
    settings, class_path, implied = namespace.trainer, namespace.system.class_path, dict[str, Any]()
    kind = find_system(class_path)
    if saved := schemas.newest_start(_run_folder(settings) / "checkpoints"):
        source = saved.configuration.trainer.init_from
        if saved.initial:
            implied = implied_recipe(kind, saved.initial.settings.data, saved.initial.settings.system.init_args)
        # While it was there, its path was not taken for a name of the hub.
        same = source == os.path.abspath(settings.init_from.removeprefix(HUB))
        source = source if same and source is not None else settings.init_from
    else:
        source = settings.init_from
        implied = implied_settings(source, settings.init_averages, kind)
    implied.get("system", {})["class_path"] = class_path
    return source, implied


def _check_implied(config: Config, implied: dict[str, Any]) -> None:
    """Raise a ValueError that names the settings that contradict the weights to start from."""
    now, expected = flatten(config.resolved()), flatten(implied)
    wrong = [
        f"{name} is {now.get(name)}, and {value} in the weights"
        for name, value in expected.items()
        if name not in FREE_SETTINGS and name in now and now[name] != value and name != "system.class_path"
    ]
    if wrong:
        raise ValueError(
            f"trainer.init_from {config.trainer.init_from} has weights of networks with other settings:\n  "
            + "\n  ".join(wrong)
            + "\nLeave these settings unset"
        )


def in_order(arguments: Sequence[str]) -> list[str]:
    """Return recipes first, then the system's name, then the rest: later ones win, and the name is needed early."""
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
    named = [after for word, after in pairwise(arguments) if word == "--config"]
    return named + [word.partition("=")[2] for word in arguments if word.startswith("--config=")]


def _system_name(namespace: Namespace) -> str:
    return namespace.system.class_path.rpartition(".")[2]


def _print_dropped(recipe: Path, namespace: Namespace) -> None:
    """Print which of a recipe's settings the system does not have that the command line names instead."""
    stated = (yaml.safe_load(recipe.read_text()) or {}).get("system")
    settings = stated.get("init_args", {}) if isinstance(stated, dict) else {}
    dropped = sorted(set(settings) - set(namespace.system.init_args.as_dict()))
    if dropped and is_local_main():
        print(f"{_system_name(namespace)} has no {', '.join(dropped)}: dropped from {recipe.name}", file=sys.stderr)
