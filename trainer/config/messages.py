"""jsonargparse's error messages in plain words, with what was perhaps meant."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
from models.load import system_names
from trainer.config.settings import DataConfig, EvaluateConfig, TrainerConfig
from trainer.config.words import wanted_in_words

DENIED = re.compile(r"Importing '(.*?)' is not allowed, denied by .*? to allow it\.")
NOISE = ("Given value type", "Subtypes:", "Does not validate", "Errors:", "- Expected a 'NoneType'", "Problem with")
VALUE = re.compile(  # a value that a number's type refuses, in the words of jsonargparse and of Python
    r"(?:(?<=: )(\S+) does not conform to restriction \S+"
    r"|does not conform to restriction \S+ Given value: (.+)"
    r"|(?:invalid literal for int\(\) with base 10|could not convert string to float): '(.*)')"
)
WRONG = re.compile(
    r'setting "([\w.]+)": (?=Not|Expected)(?:Not of type (\w+): )?(?:Expected (.+?)\.? )?(?:Got|Given) value: (.*)'
)
# Of a player that may be left out: the player's name, and a complaint about one of its settings.
OPTIONAL = re.compile(
    r"""Parser key "(\w+)":\n\s+Does not validate .*\n\s+Subtypes: .*\n\s+Errors:\n"""
    r"""\s+- Problem with given class_path .*\n\s+(Parser key "|Option ')([\s\S]*?)\n"""
    r"""\s+- Expected a <class 'NoneType'>\n\s+Given value type: .*\n\s+Given value: .*$"""
)
VARYING = re.compile(r"(?:Not of type|Expected)(?:(?!setting).)*? Not of type Schedule: (?=Expected)")
UNKNOWN = re.compile(r"(?:Group '(\w+)' does not accept option '|Option '|unrecognized arguments: --)([\w.]+)")
# A group of settings that was given a value: one that holds no settings, or settings of which one is wrong.
GROUP = re.compile(r"""Parser key "(\w+)":\nUnable to load config (['"])(.*)\2\n\s+- (?=(Parser key "\1")?)""")
WHOLE = " Given value: "  # comes before the whole value, after that of the part that is refused
OF_COMPARISONS = "compare-"  # how the names of trainer.compare's files begin, which are no recipes of runs
SECTIONS = {"data": DataConfig, "trainer": TrainerConfig, "evaluate": EvaluateConfig}
TYPES = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number of at least 0",
    "PositiveFloat": "a number above 0",
    "a 'int'": "a whole number",
    "a 'float'": "a number (float)",
    "a 'bool'": "true or false",
}


def plain_message(message: str) -> str:
    """Return jsonargparse's message on one line, without Python's class paths, with settings as they are typed."""
    systems, raw = ", ".join(system_names()), message
    if "Expected a dot import path string" in message:
        given = message.rpartition(": ")[2].split()[0]
        close = difflib.get_close_matches(given, system_names(), 1)
        return f"system must be one of {systems}; got {given}" + (f": did you mean {close[0]}?" if close else "")
    if (group := GROUP.match(message)) and group[4]:
        return group_message(group[1], group[3])
    message = message[group.end() :] if group else message
    message = DENIED.sub(
        rf"class_path \1 is not imported: system is one of {systems}, and no other setting names a class", message
    )
    message = OPTIONAL.sub(r"\2\1.\3", message)
    if message.startswith('Parser key "system":'):
        for nested in ('Parser key "', "Option '", "arguments: --"):
            head, found, tail = message.rpartition(nested)
            if head:
                message = f"{head}{found}system.{tail}"
        message = message.replace('Parser key "system":', "")
    for old, new in {"Parser key": "setting", "a typing.Literal": "one of ", "<class ": "", "'>": "'"}.items():
        message = message.replace(old, new)
    lines = [line.strip() for line in message.splitlines()]
    text = " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(NOISE))
    text = VARYING.sub("", text)  # the second of two complaints says what a setting that may vary can be
    if wrong := WRONG.search(VALUE.sub(lambda found: f"Got value: {found[found.lastindex or 0]}", text)):
        setting, kind, expected, value = wrong.groups()
        hint, value = _hint(setting, raw), "null" if value == "None" else value.rpartition(WHOLE)[2]
        if any(typing.get_origin(part) in (list, tuple) for part in (hint, *typing.get_args(hint))):
            return f"{setting} must be {wanted_in_words(hint)}; got {value}"
        return f"{setting} must be {TYPES.get(expected or kind, expected or kind)}; got {value}"
    return text


def _hint(setting: str, message: str) -> Any:
    """Return the type of a setting as it is typed, of the system that jsonargparse's message names; None if unknown."""
    systems = [("system", kind) for kind in models.SYSTEMS if f".{kind.__name__}'" in message]
    return dict(pair for section, kind in [*SECTIONS.items(), *systems] for pair in _hints(kind, section)).get(setting)


def group_message(group: str, value: str) -> str:
    """Return the message about a group of settings that was given a value."""
    names = ", ".join(f"{group}.{field.name}" for field in dataclasses.fields(SECTIONS[group]))
    return f"{group} is a group of settings; got {value}. Set one of {names}"


def meant(message: str) -> str:
    """Return what follows a plain message about a setting that there is not: whose it is, or what it is like."""
    if not (unknown := UNKNOWN.search(message)):
        return ""
    name = ".".join(filter(None, unknown.groups()))
    of = {kind.__name__: dict(_hints(kind, "system")) for kind in models.SYSTEMS}
    if owners := [system for system, names in of.items() if name in names]:
        return f": it is a setting of {', '.join(owners)}"
    known = {"config", "system", "dry_run"}.union(
        *of.values(), *(dict(_hints(kind, of)) for of, kind in SECTIONS.items())
    )
    group, _, last = name.rpartition(".")
    in_group = [one.rpartition(".")[2] for one in sorted(known) if one.rpartition(".")[0] == group]
    if in_group:
        close = [f"{group}.{one}".lstrip(".") for one in difflib.get_close_matches(last, in_group, 1)]
    else:
        close = difflib.get_close_matches(name, sorted(known), 1, cutoff=0.85)
    if not close:  # it may be in another group: that of the run, before those of a player
        same = [one for one in known if difflib.get_close_matches(last, [one.rpartition(".")[2]], cutoff=0.75)]
        close = sorted(same, key=lambda one: (one.count("."), one))[:1]
    if not close and in_group and "." in group:
        return f": {group} has {', '.join(in_group)}"
    return f": did you mean {close[0]}?" if close else ""


def _hints(kind: Any, section: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a class as they are typed, nested ones included, and their types."""
    for name, hint in typing.get_type_hints(kind.__init__).items():
        if name != "return":
            yield f"{section}.{name}", hint
            for part in (hint, *typing.get_args(hint)):
                if isinstance(part, type) and dataclasses.is_dataclass(part):
                    yield from _hints(part, f"{section}.{name}")


def other_recipes(missing: Path) -> str:
    """Return what follows a message about a recipe that is not there: those of its folder, the most alike first."""
    files = missing.parent.glob("*.yaml")
    there = sorted(path.stem for path in files if not path.stem.startswith(OF_COMPARISONS))
    close = difflib.get_close_matches(missing.stem, there, 3)
    hint = f". Did you mean {' or '.join(close)}?" if close else "."
    return f"{hint} {missing.parent} has {', '.join(there[:50])}" if there else hint
