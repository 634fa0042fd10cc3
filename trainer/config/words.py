"""Settings in plain words: their types and values, as --help and the docs' reference write them."""

import re
from argparse import Action
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

LINKED = ("image_size", "channels")  # settings of a system that are those of data
TYPES = {
    "int": "whole number",
    "NonNegativeInt": "whole number, 0 or more",
    "PositiveInt": "whole number above 0",
    "float": "number",
    "PositiveFloat": "number above 0",
    "bool": "true or false",
    "str": "text",
    "Location": "path or URL",
    "WeightsFile": "path",
    "WeightsSource": "path or name on the hub",
    "MetricName": "fid, is, kid or prdc",
    "Schedule": "schedule",
    "System": "name",
    "NoneType": "null",
}


def type_in_words(hint: Any) -> str:
    """Return a type as a reader would say it: `whole number above 0`, `real or not_own`."""
    args, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple and Ellipsis not in args:
        return f"[{', '.join(map(type_in_words, args))}]"
    if origin in (list, tuple):
        return f"[{type_in_words(args[0])}, ...]"
    if origin is dict:
        return "mapping"
    if args:
        parts = [type_in_words(arg) for arg in args]
        return (", or " if any(" " in part for part in parts) else " or ").join(parts)
    name = getattr(hint, "__name__", str(hint))
    return "settings" if is_dataclass(hint) and name not in TYPES else TYPES.get(name, name)


def wanted_in_words(hint: Any) -> str:
    """Return a type as an error message ends: `a whole number, or [number, number]`, `a list of whole numbers`."""
    args, origin, words = get_args(hint), get_origin(hint), type_in_words(hint)
    if origin in (Union, UnionType):
        return ", or ".join(map(wanted_in_words, args))
    if origin is list or Ellipsis in args:
        each = type_in_words(args[0])
        return f"a list of {each.replace(' or ', ', ') if ' or ' in each else f'{each}s'}"
    return f"a {words}" if words.startswith(("whole", "number")) else words


def value_in_words(value: Any) -> str:
    """Return a setting's value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_in_words, value))}]"
    return str(value)


class HelpFormatter(DefaultHelpFormatter):
    """Prints settings with their types and defaults in plain words."""

    def add_argument(self, action: Action) -> None:
        if action.dest not in {f"system.{name}" for name in LINKED}:
            super().add_argument(action)

    def _get_type_str(self, action: Action) -> str | None:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.dest.endswith(".help"):
            return None
        optional = type(None) in get_args(hint) and any(map(is_dataclass, get_args(hint)))
        return f"settings, which --{action.dest}.help lists" if optional else type_in_words(hint)

    def _get_help_string(self, action: Action) -> str:
        text = re.sub(r", known subclasses: [^)]*", "", super()._get_help_string(action))
        default = f"default: {value_in_words(action.default)}"
        return text.replace("type: %(type)s", "%(type)s").replace(", default: %(default)s", f"; {default}")
