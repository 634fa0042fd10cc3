"""Statistics of real images' features in one .npz, computed once; pytorch-fid and clean-fid can read it, too.

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

from trainer.metrics import Gaussian, root

FORMAT = 2


@dataclass
class Statistics:
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

    def to(self, device: torch.device) -> "Statistics":
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


def load(path: Path, expected: dict[str, Any] | None) -> Statistics:
    """Read a file.

    Args:
        path: of the .npz
        expected: what its `meta` must say; None takes any file with mu and sigma, such as another tool's

    Raises:
        ValueError: it is no such file, or of other images or another extractor; names every field that differs.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if missing := [name for name in ("mu", "sigma") if name not in found]:
            raise ValueError(f"it lacks {' and '.join(missing)}, and holds {', '.join(found)}")
        mu, sigma = (torch.from_numpy(found[name].astype(np.float64)) for name in ("mu", "sigma"))
        gaussian = Gaussian(mu, sigma, int(found.get("n", 0)))
        meta = dict(json.loads(str(found["meta"]))) if "meta" in found else {}
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no statistics of images (an .npz of mu and sigma): {error}") from error
    dim = len(gaussian.mu)
    if gaussian.mu.shape != (dim,) or gaussian.sigma.shape != (dim, dim):
        shapes = f"{tuple(gaussian.mu.shape)} and {tuple(gaussian.sigma.shape)}"
        raise ValueError(f"{path} holds no statistics: its mu and sigma are {shapes}, expected [D] and [D, D]")
    if expected is not None:
        check(path, meta, expected)
    features = torch.from_numpy(found["features"]) if "features" in found else None
    if features is not None and (features.dim(), features.shape[-1]) != (2, dim):
        raise ValueError(f"{path} is damaged: its features are {tuple(features.shape)}, expected [images, {dim}]")
    return Statistics(gaussian, meta, float(found["sharpness"]) if "sharpness" in found else None, features)


def check(path: Path, meta: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse statistics of something else.

    Raises:
        ValueError: naming every field that differs.
    """
    differing = [
        f"{name}: {meta.get(name, 'not said')} in the file, {expected.get(name, 'not said')} here"
        for name in sorted(meta.keys() | expected.keys())
        if meta.get(name) != expected.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} holds statistics of other images, or of images seen in another way:\n  "
            + "\n  ".join(differing)
            + "\nName another file; one that a run made may be removed, and is made anew"
        )
