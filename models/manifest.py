"""A checkpoint's manifest, which is checked as it is read, and the files that it lists with their checksums."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors.torch
from msgspec import Meta
from torch import Tensor

FORMAT = 3  # of checkpoints
LARGEST = 64 << 20  # bytes of a manifest
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\.safetensors$")]  # of the folder itself


class Manifest(msgspec.Struct):
    """What every manifest has; the trainer's own fields are described in trainer/schemas.py."""

    format: int
    step: Annotated[int, Meta(ge=0, le=10**18)]
    files: dict[FileName, Digest]
    sha256: Digest  # of the rest


class FormatError(ValueError):
    """A checkpoint was written in another format than this version reads."""


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's `checkpoints` folder, newest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_[0-9]{8,18}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def read(path: Path) -> dict[str, Any]:
    """Return the manifest in a checkpoint's folder; raise a FormatError or another ValueError if it is not one."""
    file = path / "manifest.json"
    check_regular(file)
    if file.stat().st_size > LARGEST:
        raise ValueError(f"its manifest has more than {LARGEST:,} bytes")
    content = file.read_bytes()
    try:
        manifest = json.loads(content)
        if not isinstance(manifest, dict):
            raise ValueError("expected an object")
        whole = content == sealed({key: value for key, value in manifest.items() if key != "sha256"})
        found = manifest.get("format", FORMAT - 1 if whole else None)  # an older one has no format number
        if whole and isinstance(found, int) and found != FORMAT:
            raise FormatError(f"it has format {found}, and this version reads format {FORMAT}")
        msgspec.convert(manifest, Manifest)
    except RecursionError as error:
        raise ValueError("its manifest is nested too deeply") from error
    except FormatError:
        raise
    except ValueError as error:
        raise ValueError(f"its manifest is not one: {error}") from error
    if not whole:
        raise ValueError("its manifest does not match its checksum")
    return manifest


def sealed(manifest: dict[str, Any]) -> bytes:
    """Return a manifest with the checksum of its own content."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": digest}, indent=1).encode()


def tensors(path: Path, manifest: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Return the tensors in the file `name` of a checkpoint's folder, whose checksum must be the manifest's."""
    if name not in manifest["files"]:
        raise ValueError(f"its manifest lists no {name}")
    check_regular(path / name)
    content = (path / name).read_bytes()
    check_digest(name, hashlib.sha256(content).hexdigest(), manifest["files"][name])
    return safetensors.torch.load(content)


def check_regular(path: Path) -> None:
    """Raise a ValueError if the path is something other than a regular file, such as a pipe, which might never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no regular file")


def check_digest(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{name} does not match its checksum")


def check_tensors(name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise a ValueError that names the first tensor whose name, shape or type differs from what is expected."""
    here, there = ({key: _kind(value) for key, value in tensors.items()} for tensors in (expected, found))
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            raise ValueError(
                f"{name} does not fit the system's settings: {key} is {there.get(key, 'missing')} in the file, "
                f"expected {here.get(key, 'none of that name')}"
            )


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
