"""The weights that a run starts from (`trainer.init_from`): where they are, which settings they imply, and what fits.

They are safetensors in a folder of diffusers, in a checkpoint of a run or an export, or in one file a network. A
pickle, which may run code, is refused.
"""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import safetensors.torch
from torch import Tensor, nn

from data.files import parse, read, regular_file
from models import NetworkConfig, System, diffusers, manifest
from models.load import SystemManifest, checkpoint_of, find_system
from trainer.extras import needs
from trainer.posthoc import POWER

HUB = "hf://"
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
CONVERT = (
    "Convert it where you trust it, with diffusers: AutoencoderKL.from_single_file(FILE), or .from_pretrained(FOLDER, "
    "use_safetensors=False), then .save_pretrained(NEW), and name the folder NEW"
)
FATES = ("loaded", "missing, so drawn from the seed", "of another shape, so drawn from the seed", "not used")
SHOWN = 20  # names of tensors in a line
# Settings that weights imply where the user leaves them unset, but that may differ: networks that are no part of the
# trained model, and image sizes, which maps of codes do not depend on.
FREE_SETTINGS = frozenset({"data.size", "system.networks.patches"})

Tensors = dict[str, dict[str, Tensor]]  # by network and name


class Found(NamedTuple):
    """Tensors by network and name, the sha256 of the files that they are from, and networks that were not read."""

    tensors: Tensors
    sha256: dict[str, str]
    others: list[str]


class Weights(Protocol):
    def settings(self, kind: type[System]) -> dict[str, Any]:
        """Return the settings that the weights imply for a kind of system, as a recipe has them."""

    def read(self, networks: Collection[str]) -> Found:
        """Return the weights of those networks, by name, that are there."""


@dataclass(frozen=True)
class DiffusersFolder:
    """A folder with the config.json of an AutoencoderKL and its weights."""

    folder: Path

    def settings(self, kind: type[System]) -> dict[str, Any]:
        config = parse(read(self.folder / diffusers.CONFIG_FILE, 2**20), dict)
        implied = diffusers.settings_of(config)
        return implied_recipe(kind, implied, implied)

    def read(self, networks: Collection[str]) -> Found:
        whole = self.folder / diffusers.WEIGHTS_FILE
        stem, suffix = whole.stem, whole.suffix
        parts = sorted(self.folder.glob(f"{stem}-*-of-*{suffix}")) or sorted(self.folder.glob(f"*{suffix}"))
        files = [whole] if whole.exists() else parts
        if not files or (len(files) > 1 and not files[0].name.startswith(f"{stem}-0")):
            raise ValueError(_nothing(self.folder, f"a file {whole.name}"))
        read_files = {file.name: _read_file(file) for file in files}
        tensors = {name: value for part, _ in read_files.values() for name, value in part.items()}
        split, digests = diffusers.split(tensors), {name: digest for name, (_, digest) in read_files.items()}
        return Found(split, digests, [])


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, or an export; with `averages` its averaged weights, where there are any."""

    folder: Path
    averages: bool

    def settings(self, kind: type[System]) -> dict[str, Any]:
        saved = msgspec.convert(manifest.read(self.folder), SystemManifest).configuration.system
        stated = dict(saved.init_args)
        names = {"size": "image_size", "channels": "channels"}
        data = {ours: stated[name] for ours, name in names.items() if name in stated}
        architecture = {name: stated[name] for name in find_system(saved.class_path).architecture if name in stated}
        if "networks" in architecture:  # checked here, so that an error names the checkpoint
            networks = asdict(msgspec.convert(architecture["networks"], NetworkConfig))
            architecture["networks"] = {name: value for name, value in networks.items() if value is not None}
        # JSON has lists alone, as the settings that these are compared with.
        return msgspec.json.decode(msgspec.json.encode(implied_recipe(kind, data, architecture)))

    def read(self, networks: Collection[str]) -> Found:
        saved = manifest.read(self.folder)
        files = {file.removesuffix(".safetensors") for file in saved["files"]}
        whole = Path(diffusers.WEIGHTS_FILE)  # of an export
        tensors, digests = {}, {}
        if whole.stem in files:
            tensors = diffusers.split(manifest.tensors(self.folder, saved, whole.name))
            digests[whole.name] = saved["files"][whole.name]
        there = {file.removeprefix("ema.") for file in files if not file.startswith(("optimizer.", POWER))}
        there -= {"statistics", whole.stem}
        for network in sorted(there & {*networks}):
            averaged = f"ema.{network}" in files and (self.averages or network not in files)
            file = f"ema.{network}.safetensors" if averaged else f"{network}.safetensors"
            tensors[network] = manifest.tensors(self.folder, saved, file)
            digests[file] = saved["files"][file]
        return Found(tensors, digests, sorted(there - {*networks}))


@dataclass(frozen=True)
class NetworkFiles:
    """A folder of files such as encoder.safetensors."""

    folder: Path

    def settings(self, kind: type[System]) -> dict[str, Any]:
        return {}

    def read(self, networks: Collection[str]) -> Found:
        there = {file.stem: file for file in sorted(self.folder.glob("*.safetensors"))}
        found = {name: _read_file(file) for name, file in there.items() if name in networks}
        digests = {f"{name}.safetensors": digest for name, (_, digest) in found.items()}
        others = [name for name in there if name not in networks]
        return Found({name: tensors for name, (tensors, _) in found.items()}, digests, others)


def open_weights(name: str, averages: bool = True) -> Weights:
    """Return the weights that trainer.init_from names: a folder, or `hf://ORG/NAME` of the Hugging Face hub.

    Args:
        name: the folder or the name
        averages: of a checkpoint take the averaged weights

    Raises:
        ValueError: there are none, or they are of a kind that is not read; says what to do.
    """
    path = _download(name) if name.startswith(HUB) else Path(name)
    if path.is_file():
        raise ValueError(_refused(path))
    if not path.is_dir():
        raise ValueError(
            f"it is no folder: name one with {diffusers.CONFIG_FILE}, manifest.json, checkpoints/ or "
            f"NETWORK.safetensors, or {HUB}ORG/NAME of the Hugging Face hub"
        )
    if (path / "manifest.json").exists() or (path / "checkpoints").is_dir():
        return Checkpoint(checkpoint_of(path), averages)
    if not averages:
        raise ValueError("it is no checkpoint with averages: leave trainer.init_averages unset")
    if (path / diffusers.CONFIG_FILE).exists():
        return DiffusersFolder(path)
    if (path / "model_index.json").exists():
        raise ValueError(f"it is a pipeline of diffusers: name its autoencoder, such as {name.rstrip('/')}/vae")
    if not any(path.glob("*.safetensors")):
        raise ValueError(_nothing(path, f"{diffusers.CONFIG_FILE}, manifest.json or NETWORK.safetensors"))
    return NetworkFiles(path)


def compare(own: Tensors, found: Found) -> dict[str, dict[str, list[str]]]:
    """Return the names of tensors by what becomes of them, one of `FATES`, and by network.

    Raises:
        ValueError: none fits.
    """
    fates: dict[str, dict[str, list[str]]] = {fate: {} for fate in FATES}
    for network in dict.fromkeys([*own, *found.tensors]):
        here, there = own.get(network, {}), found.tensors.get(network, {})
        both = {name: here[name].shape == there[name].shape for name in here if name in there}
        parts = [
            [name for name, same in both.items() if same],
            [name for name in here if name not in there],
            [
                f"{name} {[*there[name].shape]}, expected {[*here[name].shape]}"
                for name, same in both.items()
                if not same
            ],
            [name for name in there if name not in here],
        ]
        for fate, names in zip(FATES, parts, strict=True):
            fates[fate] |= {network: names} if names else {}
    fates["not used"] |= {name: [] for name in found.others}
    if not fates["loaded"]:
        lists = [f"{fate}: {'; '.join(_listed(*part, {}) for part in fates[fate].items())}" for fate in FATES[2:]]
        raise ValueError(f"no tensor fits {', '.join(own)} by name and shape. {'. '.join(lists)}")
    return fates


@dataclass(frozen=True)
class Initial:
    """Weights that a run starts from.

    Args:
        record: the manifests' `initial`: sha256 of the files, and the settings that they implied
        lines: what was loaded and what was not, for the user
    """

    record: dict[str, Any]
    lines: list[str]


def start_from(
    name: str, averages: bool, networks: dict[str, nn.Module], kind: type[System], copy: bool = True
) -> Initial:
    """Load the weights that trainer.init_from names into a system's networks, or only compare them.

    Raises:
        ValueError: there are none, or none fits; names the setting.
    """
    with naming(name):
        weights = open_weights(name, averages)
        own, found = {key: network.state_dict() for key, network in networks.items()}, weights.read(networks)
        fates = compare(own, found)
        for network, names in fates["loaded"].items() if copy else ():
            for tensor in names:
                own[network][tensor].copy_(found.tensors[network][tensor])
        sizes = {network: len(part) for network, part in own.items()}
        lines = [
            f"{fate}: {'; '.join(_listed(network, names, sizes) for network, names in parts.items())}"
            for fate, parts in fates.items()
            if parts
        ]
        files = ", ".join(f"{file} (sha256 {digest[:16]})" for file, digest in found.sha256.items())
        record = {"sha256": found.sha256, "settings": weights.settings(kind)}
        return Initial(record, [f"weights of {name}: {files}", *lines])


def implied_settings(name: str, averages: bool, kind: type[System]) -> dict[str, Any]:
    """Return the settings that the weights of trainer.init_from imply for a kind of system, as a recipe has them.

    Raises:
        ValueError: there are none, or their settings are not understood; names the setting.
    """
    with naming(name):
        return open_weights(name, averages).settings(kind)


def implied_recipe(kind: type[System], data: dict[str, Any], system: dict[str, Any]) -> dict[str, Any]:
    """Return those of some settings that weights may imply, as a recipe; others, in a stranger's file, are left out."""
    parts = ((data, ("size", "channels")), (system, kind.architecture))
    images, arguments = ({name: given[name] for name in names if name in given} for given, names in parts)
    return {"data": images, "system": {"init_args": arguments}}


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name trainer.init_from in errors of reading it."""
    try:
        yield
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"trainer.init_from {name}: {error}") from error


def _listed(network: str, names: list[str], sizes: dict[str, int]) -> str:
    """A network with its tensors, which are not named one by one if they are all of them."""
    if not names or len(names) == sizes.get(network):
        return f"{network} ({len(names)} tensors)" if names else network
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return f"{network}: {', '.join([*names[:SHOWN], *more])}" if network else ", ".join([*names[:SHOWN], *more])


def _read_file(path: Path) -> tuple[dict[str, Tensor], str]:
    content = regular_file(path).read_bytes()
    return safetensors.torch.load(content), hashlib.sha256(content).hexdigest()


def _download(name: str) -> Path:
    """Return the folder of a model of the Hugging Face hub, which is downloaded unless it has been before."""
    hub = needs(f"trainer.init_from {name}", "hub", "huggingface_hub")
    owner, _, rest = name.removeprefix(HUB).partition("/")
    model, _, folder = rest.partition("/")
    within = f"{folder}/" if folder else ""
    unwanted = [f"{within}*/*", "*.fp16.safetensors", "*.non_ema.safetensors"]
    download = partial(hub.snapshot_download, f"{owner}/{model}", ignore_patterns=unwanted)
    try:
        path = Path(download(allow_patterns=f"{within}*.json"), folder)
        if not (path / "model_index.json").exists():  # that of a pipeline, whose weights are not wanted
            download(allow_patterns=f"{within}*.safetensors")
    except Exception as error:  # of many types, for names, permissions and networks
        local = name.removeprefix(HUB)
        absent = "" if Path(local).exists() else f", and there is no folder {local} here"
        raise ValueError(
            f"it cannot be had from the Hugging Face hub ({str(error).strip().splitlines()[0]}){absent}: download it "
            "where there is a network, and name its folder"
        ) from error
    return path


def _nothing(folder: Path, expected: str) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    how = f", and {pickles[0]} is a pickle, which may run code. {CONVERT}" if pickles else ""
    return f"it has no {expected}{how}"


def _refused(file: Path) -> str:
    if file.suffix in PICKLES:
        return f"it is a pickle, which may run code. {CONVERT}"
    return f"it is a file, expected a folder. {CONVERT}"
