"""A small CNN, trained on labelled images or random, for scores without downloads."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data import files
from data.errors import DataError
from data.files import atomically
from data.images import plain
from data.loader import Samples, read
from data.order import Order, random_positions
from data.processes import PROCESSES, end_with_parent, prepare_workers
from models.manifest import check_tensors
from trainer.batch import visible_pixels
from trainer.config.settings import DataConfig
from trainer.evaluate.extractors.extractor import resize

MIN_ACCURACY = 0.9
FILE = "demo-cnn-v1.safetensors"  # in a run's folder
Sets = Sequence[Samples]  # data sets; if there are several, the label of an image is the number of its set


class DemoCNN(nn.Module):
    """Two strided convolutions and a linear layer with 64 features, on images resized to 32 pixels.

    Its FID tells which of two runs on the same data is better, and is not comparable with any published FID. The
    features are divided by the root of their mean variance over training images, so that scores on different data sets
    have about the same scale.

    Args:
        channels: channels of the images, 1 or 3
        classes: number of labels
    """

    name = "demo-cnn-v1"
    dim = 64
    resize = "antialiased bilinear to 32, rounded"
    scale: Tensor
    sha256: str

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.classes = classes
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 8 * 8, self.dim), nn.ReLU()),
        )
        self.head = nn.Linear(self.dim, classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        pixels = _resize(image).float().sub(127.5).div(127.5)
        features = self.body(pixels)
        return features / self.scale, self.head(features)


def _resize(image: Tensor) -> Tensor:
    return image if image.shape[-2:] == (32, 32) else resize(image, 32, "bilinear")


def load_demo_cnn(path: Path, channels: int) -> DemoCNN:
    """Return a demo-cnn from its file.

    Raises:
        ValueError: the file is missing, is not a demo-cnn, or is for images with other channels.
    """
    try:
        content = files.read(path)
        tensors = safetensors.torch.load(content)
        classes, found = tensors["head.weight"].shape[0], tensors["body.0.weight"].shape[1]
        if found in (1, 3):  # other numbers are damaged or of a stranger, and could be huge
            with torch.device("meta"):
                check_tensors("it", tensors, DemoCNN(found, classes).state_dict())
    except (OSError, ValueError, LookupError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"the weights {path} are not a demo-cnn: {files.escaped(str(error))}") from error
    if found != channels:
        raise ValueError(f"the weights {path} are for images of {found} channels, but the images have {channels}")
    extractor = DemoCNN(channels, classes)
    extractor.load_state_dict(tensors)
    extractor.sha256 = hashlib.sha256(content).hexdigest()
    return extractor


def demo_random(train: Sets, data: DataConfig, images: int = 5_000) -> DemoCNN:
    """Return an untrained demo-cnn without classes, for data without labels or with classes that are hard to tell.

    The weights are drawn from He's normal distribution with a fixed seed. The normalisation and the scale of the
    features are those of up to `images` training images. One thread computes them, so every run on the same data gets
    the same network.

    Raises:
        ValueError: an image is damaged.
    """
    with _reproducible():
        pixels = _some(train, images, data)[0]
        network = DemoCNN(visible_channels(data), 1)  # the class is not used
        for module in network.body:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # one forward pass then sets the statistics
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        with torch.no_grad():
            network(pixels)
        _set_scale(network.eval(), pixels)
    network.name, network.classes = "demo-random-v1", 0
    network.sha256 = hashlib.sha256(safetensors.torch.save(network.state_dict())).hexdigest()
    return network


@contextmanager
def _reproducible() -> Iterator[None]:
    """Compute on one thread with seed 0 and leave the caller's random state as it is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    except DataError as error:
        raise ValueError(str(error)) from error
    finally:
        torch.set_num_threads(threads)


def fit(train: Sets, test: Sets, data: DataConfig, path: Path, images: int = 20_000, steps: int = 600) -> None:
    """Train a demo-cnn on up to `images` labelled training images and write it to a file.

    One thread computes with a fixed seed, so every run on the same data gets the same network.

    Raises:
        ValueError: images lack labels, or the network classifies too few held-out images correctly.
    """
    check_labels(train, test)
    with _reproducible():
        network = DemoCNN(
            visible_channels(data), int(max(labels.max() for labels in (*_labels(train), *_labels(test)))) + 1
        )
        pixels, labels = _some(train, images, data)
        _train(network, pixels, labels, steps)
        accuracy = _accuracy(network, *_some(test, 5_000, data))
    if accuracy < MIN_ACCURACY:
        raise ValueError(
            f"extractor demo-cnn classifies only {accuracy:.1%} of the held-out images correctly (expected at least "
            f"{MIN_ACCURACY:.0%}), so its scores would mean little. Choose extractor inception or demo-random"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"accuracy": accuracy, "data": identity(train, test, data)}
    with atomically(path) as unfinished:
        unfinished.write_bytes(safetensors.torch.save(network.state_dict(), {"demo-cnn": json.dumps(facts)}))


def start_fit(train: Sets, test: Sets, data: DataConfig, path: Path, *how: int) -> BaseProcess:
    """Do what `fit` does in a process beside this one; if that fails, the file is missing, and `fit` tells why."""
    prepare_workers()
    process = PROCESSES.Process(target=_fit_beside, args=(train, test, data, path, *how), daemon=True)
    process.start()
    return process


def _fit_beside(*arguments: Any) -> None:
    end_with_parent()
    os.nice(10)  # the run goes first
    with suppress(ValueError, OSError):
        fit(*arguments)


def check_labels(train: Sets, test: Sets) -> None:
    """Check that every image has a label, which a demo-cnn needs; raise ValueError if some have none."""
    if min(labels.min() for labels in (*_labels(train), *_labels(test))) < 0:
        raise ValueError(
            "extractor demo-cnn needs a label for every image, but some have none. Choose extractor inception or "
            "demo-random, or prepare the data from one folder per class"
        )


def is_fit(path: Path, train: Sets, test: Sets, data: DataConfig) -> bool:
    """Return whether a file holds a demo-cnn that was trained on these images, read in the same way."""
    try:
        with safetensors.safe_open(files.regular_file(path), "pt") as file:
            facts = files.parse(file.metadata()["demo-cnn"].encode(), dict[str, Any])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return False
    return facts.get("data") == identity(train, test, data)


def identity(train: Sets, test: Sets, data: DataConfig) -> list[Any]:
    """Return what a trained demo-cnn depends on, as plain data."""
    return [
        *(images.fingerprint() for images in (*train, *test)),
        plain(data.size),
        data.channels,
        *([data.bits] if data.bits != 8 else []),
    ]


def visible_channels(data: DataConfig) -> int:
    """Return the channels of images as `visible_pixels` shows them."""
    return 1 if data.channels < 3 else 3


def _labels(sets: Sets) -> list[np.ndarray]:
    return [images.labels if len(sets) == 1 else np.full(len(images), i) for i, images in enumerate(sets)]


def _some(sets: Sets, count: int, data: DataConfig) -> tuple[Tensor, Tensor]:
    """Up to `count` images at 32 pixels, equally many of each set, and their labels."""
    pixels, labels = [], []
    for images, known in zip(sets, _labels(sets), strict=True):
        positions = random_positions(len(images), min(count // len(sets), *map(len, sets)), 0)
        ordered = np.sort(positions)  # in another order remote shards would be fetched again and again
        parts = np.array_split(ordered, max(1, len(ordered) // 256))
        found = (visible_pixels(read(images, part, *data.format).image) for part in parts)
        resized = torch.cat([_resize(image) for image in found])
        pixels.append(resized[np.searchsorted(ordered, positions)])
        labels.append(torch.from_numpy(known[positions]))
    return torch.cat(pixels), torch.cat(labels)


def _train(network: DemoCNN, pixels: Tensor, labels: Tensor, steps: int, batch: int = 128) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order = Order([len(pixels)], min(batch, len(pixels)), seed=0)
    for step in range(steps):
        chosen = torch.from_numpy(order[step])
        cross_entropy(network(pixels[chosen])[1], labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    _set_scale(network.eval(), pixels)


@torch.no_grad()
def _set_scale(network: DemoCNN, pixels: Tensor) -> None:
    features = torch.cat([network(part)[0] for part in pixels.split(1024)])
    network.scale.copy_(features.var(0).mean().sqrt())


@torch.no_grad()
def _accuracy(network: DemoCNN, pixels: Tensor, labels: Tensor) -> float:
    logits = torch.cat([network(part)[1] for part in pixels.split(1024)])
    return (logits.argmax(1) == labels).double().mean().item()
