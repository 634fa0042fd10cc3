"""Load a trained system from a run's folder: `system = models.load("runs/digits-vae")`."""

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import torch

from models import manifest
from models.system import System
from models.systems import SYSTEMS

PERCEPTUAL = ("perceptual", "perceptual_weight", "perceptual_weights")  # of a loss that is used in training only


class SavedSystem(msgspec.Struct, forbid_unknown_fields=True):
    class_path: str
    init_args: dict[str, Any]


class SavedConfiguration(msgspec.Struct):
    system: SavedSystem


class SystemManifest(msgspec.Struct):
    """The part of a manifest from which a system is built."""

    configuration: SavedConfiguration


def checkpoint_of(path: str | Path) -> Path:
    """Return the path itself if it is a checkpoint, else the newest checkpoint of the run in that folder.

    Raises:
        ValueError: there is no checkpoint.
    """
    path = Path(path)
    if (path / "manifest.json").exists():
        return path
    found = manifest.checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(
            f"{path} is neither a checkpoint nor a run's folder with one (expected manifest.json or checkpoints/step_*)"
        )
    return found[0]


def load(path: str | Path) -> System:
    """Return the trained system of a checkpoint, or of a run's newest one, with its averaged weights.

    Every file is compared with its checksum in the manifest, and no class is imported by a name in a file.

    Args:
        path: a checkpoint or a run's folder

    Returns:
        The system on the CPU, in eval mode and frozen.

    Raises:
        ValueError: there is no checkpoint, a file is damaged, or the system is not in `SYSTEMS`.
    """
    path = checkpoint_of(path)
    try:
        saved = manifest.read(path)
        entry = msgspec.convert(saved, SystemManifest).configuration.system
        kind, settings = find_system(entry.class_path), dict(entry.init_args)
        for name in PERCEPTUAL:
            settings.pop(name, None)
        arguments = _arguments(kind, settings)
        with torch.device("meta"):  # takes no memory, so a manifest may state any size before it is compared with files
            shapes = _tensors(kind(**arguments))
        found = {}
        for name, expected in shapes.items():
            averaged = f"ema.{name}.safetensors"
            file = averaged if averaged in saved["files"] else f"{name}.safetensors"
            found[name] = manifest.tensors(path, saved, file)
            manifest.check_tensors(file, found[name], expected)
        system = kind(**arguments)
        with torch.no_grad():
            for name, own in _tensors(system).items():
                for key, value in own.items():
                    value.copy_(found[name][key])
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # torch adds its own stack
        raise ValueError(f"checkpoint {path} cannot be loaded: {reason}") from error
    return system.eval().requires_grad_(False)


def find_system(class_path: str) -> type[System]:
    """Return the class in `SYSTEMS` with a name such as `VAE` or `models.VAE`.

    Raises:
        ValueError: there is none.
    """
    for kind in SYSTEMS:
        if class_path in (kind.__name__, *import_paths(kind)):
            return kind
    raise ValueError(f"system.class_path is {class_path!r}, expected one of {', '.join(system_names())}")


def system_names() -> list[str]:
    """Return the names of `SYSTEMS`, sorted."""
    return sorted(kind.__name__ for kind in SYSTEMS)


def import_paths(kind: type) -> list[str]:
    """Return the paths by which a class may be named: in its module, and in each package that contains the module."""
    parts = kind.__module__.split(".")
    return [".".join([*parts[:count], kind.__qualname__]) for count in range(1, len(parts) + 1)]


def settings_types(kind: type[System]) -> list[type]:
    """Return the dataclasses among a system's settings."""
    hints = typing.get_type_hints(kind.__init__).values()
    flat = [part for hint in hints for part in (hint, *typing.get_args(hint))]
    return [part for part in flat if isinstance(part, type) and dataclasses.is_dataclass(part)]


def _arguments(kind: type[System], settings: dict[str, Any]) -> dict[str, Any]:
    """Convert plain data to the typed arguments of a system's `__init__`; a ValueError names what does not fit."""
    hints, fields = typing.get_type_hints(kind.__init__), []
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        required = parameter.default is parameter.empty
        fields.append((name, hints[name]) if required else (name, hints[name], parameter.default))
    struct = msgspec.defstruct(kind.__name__, fields, kw_only=True, forbid_unknown_fields=True)
    try:
        made = msgspec.convert(settings, struct)
    except ValueError as error:
        raise ValueError(f"system.init_args: {error}") from error
    for name, value in settings.items():  # msgspec ignores unknown fields of dataclasses
        taken = getattr(made, name)
        known = {field.name for field in dataclasses.fields(taken)} if dataclasses.is_dataclass(taken) else set()
        if known and (unknown := value.keys() - known):
            raise ValueError(f"system.init_args.{name} has unknown settings: {', '.join(sorted(unknown))}")
    return {name: getattr(made, name) for name in struct.__struct_fields__}


def _tensors(system: System) -> dict[str, dict[str, torch.Tensor]]:
    """A system's tensors by the name of their file."""
    parts = {name: network.state_dict() for name, network in system.networks().items()}
    if own := dict(system.named_buffers(recurse=False)):
        parts["statistics"] = own
    return parts
