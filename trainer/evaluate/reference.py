"""Statistics of real images, computed once and kept in an .npz file, which pytorch-fid and clean-fid can read too.

The members `mu` [D] and `sigma` [D, D], float64, are what other tools read; `n` is the number of images. `meta` (JSON)
names the images, the extractor and the preprocessing. KID and precision compare with `features`; `sharpness` is the
mean variance of the images' Laplacian.
"""

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from data.files import atomically, escaped, regular_file
from data.images import plain
from data.loader import Samples
from data.order import permutation
from trainer.config.settings import DataConfig
from trainer.evaluate.accumulators import ImagesByIndex, extract_statistics
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.ranks import EvaluationRanks, raise_on_all_ranks
from trainer.metrics.statistics import Gaussian, ReferenceStatistics

FORMAT = 2
MEMBERS = ("mu", "sigma", "n", "meta", "sharpness", "features")
MAX_BYTES = 2**33  # of a file's members, unpacked: features of a million images have fewer


def save(statistics: ReferenceStatistics, path: Path) -> None:
    """Write the .npz file atomically; raise OSError if the file cannot be written."""
    content: dict[str, Any] = {
        "mu": statistics.gaussian.mu.numpy(),
        "sigma": statistics.gaussian.sigma.numpy(),
        "n": np.int64(statistics.gaussian.n),
        "meta": np.array(json.dumps(statistics.meta, sort_keys=True)),
    }
    if statistics.sharpness is not None:
        content["sharpness"] = np.float64(statistics.sharpness)
    if statistics.features is not None:
        content["features"] = statistics.features.cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **content)


def preprocessing(extractor: Extractor, data: DataConfig) -> dict[str, Any]:
    """Return what statistics depend on besides the images, as plain data for `meta`."""
    return {
        "format": FORMAT,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "resize": extractor.resize,
        "size": plain(data.size),
        "channels": data.channels,
        **({"bits": data.bits} if data.bits != 8 else {}),  # which older files do not name
    }


def load_or_compute(
    real: Samples,
    images: ImagesByIndex,
    extractor: Extractor,
    data: DataConfig,
    kept: int,
    location: Path | None,
    ranks: EvaluationRanks,
) -> ReferenceStatistics:
    """Return the statistics of real images: from a file, or computed by all ranks and then written to that file.

    Args:
        real: the images; `images` reads some of them by their indices
        extractor, data: network that gives the features; image size and channels
        kept: number of images whose features are kept, chosen by a fixed permutation
        location: an .npz file, or a folder that has one file for each `meta`; None to keep nothing
        ranks: ranks of the evaluation

    Raises:
        ValueError: the file is damaged, or holds statistics of other images.
    """
    images_meta = {"images": real.fingerprint(), "count": len(real), "kept": min(kept, len(real))}
    meta = preprocessing(extractor, data) | images_meta
    path = location
    if path and path.suffix != ".npz":
        key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:12]
        path /= f"{extractor.name}-{key}.npz"
    # All must have the file, or all compute it: machines may have run folders of their own.
    if path and all(gather_object([path.exists()])):
        return raise_on_all_ranks(lambda: load(path, meta)).to(ranks.device)
    places = torch.full((len(real),), -1)
    chosen = np.sort(permutation(len(real), 0)[:kept]) if len(real) > kept else np.arange(len(real))
    places[torch.from_numpy(chosen)] = torch.arange(len(chosen))
    found = extract_statistics(extractor, images, places, ranks)
    statistics = ReferenceStatistics(found.gaussian, meta, found.sharpness, found.features)
    if path and ranks.accelerator.is_main_process:
        try:
            save(statistics, path)
        except OSError as error:
            print(f"statistics of the real images are not kept: {error}", file=sys.stderr, flush=True)
    return statistics


def load(path: Path, expected: dict[str, Any] | None) -> ReferenceStatistics:
    """Read statistics from a file.

    Args:
        path: the .npz file
        expected: the required `meta`; None accepts any file with mu and sigma, such as one of another tool

    Raises:
        ValueError: the file is damaged, or its `meta` differs; the message names every field that differs.
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
    except Exception as error:  # zipfile, zlib, NumPy and JSON raise many kinds of errors on other files
        reason = escaped(str(error)) or type(error).__name__
        raise ValueError(f"{path} holds no statistics of images (an .npz of mu and sigma): {reason}") from error
    dim = mu.numel()
    if (shapes := (tuple(mu.shape), tuple(sigma.shape))) != ((dim,), (dim, dim)):
        raise ValueError(
            f"{path} holds no statistics: its mu and sigma are {shapes[0]} and {shapes[1]}, expected [D] and [D, D]"
        )
    if expected is not None:
        check_meta(path, meta, expected)
    if features is not None and (features.dtype, features.dim(), features.shape[-1:]) != (torch.float32, 2, (dim,)):
        kind = f"{str(features.dtype).removeprefix('torch.')} {tuple(features.shape)}"
        raise ValueError(f"{path} is damaged: its features are {kind}, expected float32 [images, {dim}]")
    return ReferenceStatistics(gaussian, meta, sharpness, features)


def _members(path: Path) -> dict[str, np.ndarray]:
    """The known members of a file, unless they would unpack to too many bytes."""
    with zipfile.ZipFile(regular_file(path)) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > MAX_BYTES:
        raise ValueError(f"it unpacks to {size:,} bytes, expected at most {MAX_BYTES:,}")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in MEMBERS if name in file.files}


def check_meta(path: Path, meta: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that statistics are of the expected images, extractor and preprocessing.

    Raises:
        ValueError: names every field that differs.
    """
    differing = [
        escaped(f"{name}: {meta.get(name, 'missing')} in the file, {expected.get(name, 'missing')} here")
        for name in sorted(meta.keys() | expected.keys())
        if meta.get(name) != expected.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} holds statistics of other images, or of the same images read in another way:\n  "
            + "\n  ".join(differing)
            + "\nName another file, or remove this one if a run made it: it is then computed again"
        )
