"""A trained system from a run's folder, in two lines: `system = models.load("runs/digits-vae")`."""

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
from models.systems import AE, GAN, GANVAE, VAE, VAEGAN, CycleGAN

# The systems that a name in a file or on a command line may stand for: nothing else is imported by its name. A system
# of one's own is added here, or by code: models.SYSTEMS.append(Mine).
SYSTEMS: list[type[System]] = [AE, CycleGAN, GAN, GANVAE, VAE, VAEGAN]
PERCEPTUAL = ("perceptual", "perceptual_weight", "perceptual_weights")  # a training loss, needed no more


class Stated(msgspec.Struct, forbid_unknown_fields=True):
    """A system in a manifest's configuration."""

    class_path: str
    init_args: dict[str, Any]


class Configuration(msgspec.Struct):
    system: Stated


class Trained(msgspec.Struct):
    """The part of a manifest that a system is built of."""

    configuration: Configuration


def checkpoint_of(path: str | Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run's folder.

    Raises:
        ValueError: there is none.
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
    """The system of a checkpoint, or of a run's newest one, in eval mode on the CPU, its averaged weights in place.

    Every file that is read is compared with its checksum in the manifest. Nothing that a file names is imported.

    Raises:
        ValueError: there is no checkpoint, its files are damaged, or it is of a system that is not in `SYSTEMS`.
    """
    path = checkpoint_of(path)
    try:
        saved = manifest.read(path)
        stated = msgspec.convert(saved, Trained).configuration.system
        kind, settings = find_system(stated.class_path), dict(stated.init_args)
        for name in PERCEPTUAL:
            settings.pop(name, None)
        given = _settings(kind, settings)
        with torch.device("meta"):  # without memory: a file may say any size, and its tensors' sizes are those it has
            shapes = _tensors(kind(**given))
        found = {}
        for name, expected in shapes.items():
            averaged = f"ema.{name}.safetensors"
            file = averaged if averaged in saved["files"] else f"{name}.safetensors"
            found[name] = manifest.tensors(path, saved, file)
            manifest.check_tensors(file, found[name], expected)
        system = kind(**given)
        with torch.no_grad():
            for name, own in _tensors(system).items():
                for key, value in own.items():
                    value.copy_(found[name][key])
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # torch adds its own stack
        raise ValueError(f"checkpoint {path} cannot be loaded: {reason}") from error
    return system.eval().requires_grad_(False)


def find_system(class_path: str) -> type[System]:
    """The system that a name stands for, such as `VAE` or `models.VAE`; nothing is imported.

    Raises:
        ValueError: there is none of that name.
    """
    for kind in SYSTEMS:
        if class_path in (kind.__name__, *import_paths(kind)):
            return kind
    raise ValueError(f"system.class_path is {class_path!r}, expected one of {', '.join(system_names())}")


def system_names() -> list[str]:
    """The known systems' names."""
    return sorted(kind.__name__ for kind in SYSTEMS)


def import_paths(kind: type) -> list[str]:
    """The names that a class may be written by: of its module, and of the packages that hold that module."""
    parts = kind.__module__.split(".")
    return [".".join([*parts[:count], kind.__qualname__]) for count in range(1, len(parts) + 1)]


def settings_types(kind: type[System]) -> list[type]:
    """The dataclasses among a system's settings."""
    hints = typing.get_type_hints(kind.__init__).values()
    flat = [part for hint in hints for part in (hint, *typing.get_args(hint))]
    return [part for part in flat if isinstance(part, type) and dataclasses.is_dataclass(part)]


def _settings(kind: type[System], stated: dict[str, Any]) -> dict[str, Any]:
    """The typed arguments of a system's `__init__` from plain data.

    Raises:
        ValueError: a setting is unknown, missing, or of another type.
    """
    hints, fields = typing.get_type_hints(kind.__init__), []
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        required = parameter.default is parameter.empty
        fields.append((name, hints[name]) if required else (name, hints[name], parameter.default))
    struct = msgspec.defstruct(kind.__name__, fields, kw_only=True, forbid_unknown_fields=True)
    try:
        made = msgspec.convert(stated, struct)
    except ValueError as error:
        raise ValueError(f"system.init_args: {error}") from error
    for name, value in stated.items():  # within dataclasses msgspec lets unknown fields pass
        taken = getattr(made, name)
        known = {field.name for field in dataclasses.fields(taken)} if dataclasses.is_dataclass(taken) else set()
        if known and (unknown := value.keys() - known):
            raise ValueError(f"system.init_args.{name} has unknown settings: {', '.join(sorted(unknown))}")
    return {name: getattr(made, name) for name in struct.__struct_fields__}


def _tensors(system: System) -> dict[str, dict[str, torch.Tensor]]:
    """A system's tensors, by the files that they are kept in."""
    parts = {name: network.state_dict() for name, network in system.networks().items()}
    if own := dict(system.named_buffers(recurse=False)):
        parts["statistics"] = own
    return parts
