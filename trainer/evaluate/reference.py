"""ReferenceStatistics of real images' features in one .npz, computed once; pytorch-fid and clean-fid can read it, too.

`mu` [D] and `sigma` [D, D], float64, are what other tools read, and `n` is the number of images. `meta`, JSON, says of
what images, seen how, by which extractor; KID and precision compare with `features`; `sharpness` is the images' own.
"""

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.files import escaped, regular_file
from trainer.evaluate.metrics import Gaussian, root

FORMAT = 2
MEMBERS = ("mu", "sigma", "n", "meta", "sharpness", "features")
MAX_BYTES = 2**33  # of a file's members, unpacked: features of a million images have fewer


@dataclass
class ReferenceStatistics:
    """Of the features of a set of real images.

    Args:
        gaussian: of all of them
        meta: what they are features of; plain data
        sharpness: mean variance of the images' Laplacian, None where it is not known
        features: float32 [kept, D], None where none were kept
        radii: float64 [kept, 2], as `metrics.radii` gives them for these; None until they are needed
    """

    gaussian: Gaussian
    meta: dict[str, Any]
    sharpness: float | None = None
    features: Tensor | None = None
    radii: Tensor | None = None
    _root: Tensor | None = None

    @property
    def root(self) -> Tensor:
        """The covariance's square root, computed once."""
        if self._root is None:
            self._root = root(self.gaussian.sigma)
        return self._root

    def to(self, device: torch.device) -> "ReferenceStatistics":
        """These, with features on a device; the Gaussian's arithmetic is the host's."""
        return replace(self, features=None if self.features is None else self.features.to(device))

    def save(self, path: Path) -> None:
        """Write the file, there as a whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        content: dict[str, Any] = {
            "mu": self.gaussian.mu.numpy(),
            "sigma": self.gaussian.sigma.numpy(),
            "n": np.int64(self.gaussian.n),
            "meta": np.array(json.dumps(self.meta, sort_keys=True)),
        }
        if self.sharpness is not None:
            content["sharpness"] = np.float64(self.sharpness)
        if self.features is not None:
            content["features"] = self.features.cpu().numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        try:
            with open(unfinished, "wb") as file:
                np.savez(file, **content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def key(meta: dict[str, Any]) -> str:
    """A name for what `meta` describes."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:12]


def load(path: Path, expected: dict[str, Any] | None) -> ReferenceStatistics:
    """Read a file.

    Args:
        path: of the .npz
        expected: what its `meta` must say; None takes any file with mu and sigma, such as another tool's

    Raises:
        ValueError: it is no such file, or of other images or another extractor; names every field that differs.
    """
    try:
        found = _members(path)
        if missing := [name for name in ("mu", "sigma") if name not in found]:
            raise ValueError(f"it lacks {' and '.join(missing)}")
        mu, sigma = (torch.from_numpy(found[name].astype(np.float64)) for name in ("mu", "sigma"))
        gaussian = Gaussian(mu, sigma, int(found.get("n", 0)))
        meta = dict(json.loads(str(found["meta"]))) if "meta" in found else {}
        features = torch.from_numpy(found["features"]) if "features" in found else None
        sharpness = float(found["sharpness"]) if "sharpness" in found else None
    except Exception as error:  # zipfile's, zlib's, NumPy's and JSON's many ways to say that a file is another one
        reason = escaped(str(error)) or type(error).__name__
        raise ValueError(f"{path} holds no statistics of images (an .npz of mu and sigma): {reason}") from error
    shapes = tuple(gaussian.mu.shape), tuple(gaussian.sigma.shape)
    dim = gaussian.mu.numel()
    if shapes != ((dim,), (dim, dim)):
        raise ValueError(
            f"{path} holds no statistics: its mu and sigma are {shapes[0]} and {shapes[1]}, expected [D] and [D, D]"
        )
    if expected is not None:
        check(path, meta, expected)
    if features is not None and (features.dtype, features.dim(), features.shape[-1:]) != (torch.float32, 2, (dim,)):
        kind = f"{str(features.dtype).removeprefix('torch.')} {tuple(features.shape)}"
        raise ValueError(f"{path} is damaged: its features are {kind}, expected float32 [images, {dim}]")
    return ReferenceStatistics(gaussian, meta, sharpness, features)


def _members(path: Path) -> dict[str, np.ndarray]:
    """What a file holds of the known names, if all of it may be unpacked."""
    with zipfile.ZipFile(regular_file(path)) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > MAX_BYTES:
        raise ValueError(f"it unpacks to {size:,} bytes, expected at most {MAX_BYTES:,}")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in MEMBERS if name in file.files}


def check(path: Path, meta: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse statistics of something else.

    Raises:
        ValueError: naming every field that differs.
    """
    differing = [
        escaped(f"{name}: {meta.get(name, 'not said')} in the file, {expected.get(name, 'not said')} here")
        for name in sorted(meta.keys() | expected.keys())
        if meta.get(name) != expected.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} holds statistics of other images, or of images seen in another way:\n  "
            + "\n  ".join(differing)
            + "\nName another file; one that a run made may be removed, and is made anew"
        )
