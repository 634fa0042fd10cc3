"""Load a trained system from a run's folder: `system = models.load("runs/digits-vae")`."""

import dataclasses
import difflib
import inspect
import typing
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import torch

from models import diffusers, manifest
from models.settings import WeightsFile
from models.system import System
from models.systems import SYSTEMS

Tensors = dict[str, dict[str, torch.Tensor]]  # by file and name
PERCEPTUAL = ("perceptual", "perceptual_weight", "perceptual_weights")  # of a loss that is used in training only


class SavedSystem(msgspec.Struct, forbid_unknown_fields=True):
    class_path: str
    init_args: dict[str, Any]


class SavedConfiguration(msgspec.Struct):
    system: SavedSystem


class SystemManifest(msgspec.Struct):
    configuration: SavedConfiguration


def checkpoint_of(path: str | Path) -> Path:
    """Return the path itself if it is a checkpoint, else the newest checkpoint of the run in that folder."""
    path = Path(path)
    if not path.exists():
        there = [one.name for one in path.parent.glob("*")]
        close = difflib.get_close_matches(path.name, there, 1)
        meant = f": did you mean {path.with_name(close[0])}?" if close else ""
        raise ValueError(f"{path} does not exist (expected a checkpoint, or a run's folder with one){meant}")
    if (path / "manifest.json").exists():
        return path
    if not (found := manifest.checkpoints(path / "checkpoints")):
        raise ValueError(
            f"{path} is neither a checkpoint nor a run's folder with one (expected manifest.json or checkpoints/step_*)"
        )
    return found[0]


def load(path: str | Path) -> System:
    """Return the trained system of a checkpoint, or of a run's newest one, with its averaged weights.

    It is on the CPU, in eval mode and frozen. An export holds no discriminators, and its system has none. No class is
    imported by a name in a file.

    Raises:
        ValueError: there is no checkpoint, a file does not match its checksum, or the system is not in `SYSTEMS`.
    """
    path = checkpoint_of(path)
    try:
        saved = manifest.read(path)
        entry = msgspec.convert(saved, SystemManifest).configuration.system
        kind = find_system(entry.class_path)
        arguments = _arguments(kind, {k: v for k, v in entry.init_args.items() if k not in PERCEPTUAL})
        with torch.device("meta"):  # takes no memory, so a manifest may state any size before it is compared with files
            found = _read(path, saved, kind, _tensors(kind(**arguments)))
        system = kind(**arguments).requires_grad_(False)
        for name, own in _tensors(system).items():
            if name in found:
                for key, value in own.items():
                    value.copy_(found[name][key])
            elif name in system.networks():
                delattr(system, name)
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # torch adds its own stack
        raise ValueError(f"checkpoint {path} cannot be loaded: {reason}") from error
    return system.eval()


def find_system(class_path: str) -> type[System]:
    """Return the class in `SYSTEMS` with a name such as `VAE` or `models.VAE`."""
    for kind in SYSTEMS:
        if class_path in (kind.__name__, *import_paths(kind)):
            return kind
    raise ValueError(f"system.class_path is {class_path!r}, expected one of {', '.join(system_names())}")


def system_names() -> list[str]:
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
    for name, parameter in inspect.signature(kind).parameters.items():
        required = parameter.default is parameter.empty
        fields.append((name, hints[name]) if required else (name, hints[name], parameter.default))
    struct = msgspec.defstruct(kind.__name__, fields, kw_only=True, forbid_unknown_fields=True)
    try:
        made = msgspec.convert(settings, struct, dec_hook=_without_weights)
    except ValueError as error:
        raise ValueError(f"system.init_args: {error}") from error
    for name, value in settings.items():  # msgspec ignores unknown fields of dataclasses
        taken = getattr(made, name)
        if dataclasses.is_dataclass(taken) and (unknown := value.keys() - vars(taken).keys()):
            raise ValueError(f"system.init_args.{name} has unknown settings: {', '.join(sorted(unknown))}")
    return {name: getattr(made, name) for name in struct.__struct_fields__}


def _without_weights(kind: type, value: Any) -> Any:
    """Leave out files of frozen networks, which training alone needs."""
    if kind is not WeightsFile or not isinstance(value, str):
        raise NotImplementedError
    return WeightsFile()


def _read(path: Path, saved: dict[str, Any], kind: type[System], shapes: Tensors) -> Tensors:
    """Return the tensors of a checkpoint's files: averages where there are any; discriminators may be missing."""
    files, whole, found = saved["files"], diffusers.WEIGHTS_FILE, {}
    parts = diffusers.split(manifest.tensors(path, saved, whole)) if whole in files else {}
    for name, expected in shapes.items():
        averaged, file = f"ema.{name}.safetensors", f"{name}.safetensors"
        file = averaged if averaged in files else file
        if file not in files and name in parts:  # of an export
            found[name], file = parts[name], whole
        elif file in files or name in kind.averaged:
            found[name] = manifest.tensors(path, saved, file)
        else:
            continue
        manifest.check_tensors(file, found[name], expected)
    return found


def _tensors(system: System) -> Tensors:
    """A system's tensors by the name of their file."""
    parts = {name: network.state_dict() for name, network in system.networks().items()}
    return parts | ({"statistics": statistics} if (statistics := system.statistics()) else {})
