"""A small CNN, trained on labelled shards or random, for demonstrations without downloads."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from data import files
from data.errors import DataError
from data.loader import Samples, read
from data.order import Order, permutation
from models.manifest import check_tensors
from trainer.config.settings import DataConfig

ACCURACY_GATE = 0.9


Sets = Sequence[Samples]  # of several sets, an image's label is its set's number


class DemoCNN(nn.Module):
    """Two strided convolutions and a linear layer of 64 features, on images shrunk to 32 pixels.

    Its FID says which of two runs on the same data is better, and nothing else: it is comparable with no published FID.
    The features are divided by the root of their mean variance on the training images, so that scores on different data
    sets have about one scale.
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
        pixels = shrink(image).float().sub(127.5).div(127.5)
        features = self.body(pixels)
        return features / self.scale, self.head(features)


def shrink(image: Tensor) -> Tensor:
    """uint8 images at 32x32 pixels."""
    if image.shape[-2:] == (32, 32):
        return image
    resized = interpolate(image.float(), (32, 32), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def load_demo_cnn(path: Path, channels: int) -> DemoCNN:
    """A demo-cnn from its file.

    Raises:
        ValueError: the file is missing, is not a demo-cnn, or sees other channels.
    """
    try:
        content = files.read(path)
        tensors = safetensors.torch.load(content)
        classes, seen = tensors["head.weight"].shape[0], tensors["body.0.weight"].shape[1]
        if seen in (1, 3):  # all that a file can be of
            with torch.device("meta"):
                check_tensors("it", tensors, DemoCNN(seen, classes).state_dict())
    except (OSError, ValueError, LookupError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"evaluate.weights: {path} is no demo-cnn's file: {files.escaped(str(error))}") from error
    if seen != channels:
        raise ValueError(f"evaluate.weights: {path} sees {seen} channels, but data.channels is {channels}")
    extractor = DemoCNN(channels, classes)
    extractor.load_state_dict(tensors)
    extractor.sha256 = hashlib.sha256(content).hexdigest()
    return extractor


def demo_random(train: Sets, data: DataConfig, images: int = 5_000) -> DemoCNN:
    """A demo-cnn that learned nothing, for data without labels or with classes hard to tell: no inception score.

    Its weights are He's normal ones from a seed of their own; the normalisations and the features' scale are of up to
    `images` training images, on one thread, so that any run on the same data gets the same one.

    Raises:
        ValueError: an image is damaged.
    """
    with _alone():
        pixels = _some(train, images, data)[0]
        network = DemoCNN(data.channels, 1)  # its one class is not used
        for module in network.body:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # one pass tells its statistics
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        with torch.no_grad():
            network(pixels)
        _settle_scale(network.eval(), pixels)
    network.name, network.classes = "demo-random-v1", 0
    network.sha256 = hashlib.sha256(safetensors.torch.save(network.state_dict())).hexdigest()
    return network


@contextmanager
def _alone() -> Iterator[None]:
    """On one thread and from seed 0, leaving the caller's randomness as it was; damaged data is the user's mistake."""
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
    """Train a demo-cnn on up to `images` labelled training images and write it to `path`.

    On one thread and from a seed of its own, so that any run on the same data gets the same one.

    Raises:
        ValueError: images lack labels, or the network names fewer than nine in ten held-out images rightly.
    """
    check_labels(train, test)
    with _alone():
        network = DemoCNN(data.channels, int(max(labels.max() for labels in (*_labels(train), *_labels(test)))) + 1)
        pixels, labels = _some(train, images, data)
        _descend(network, pixels, labels, steps)
        accuracy = _accuracy(network.eval(), *_some(test, 5_000, data))
    if accuracy < ACCURACY_GATE:
        raise ValueError(
            f"evaluate.extractor is demo-cnn, but on this data it names only {accuracy:.1%} of the held-out images "
            f"rightly (expected {ACCURACY_GATE:.0%}): its scores would mean little. Take --evaluate.extractor "
            "inception or demo-random"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    facts = {"accuracy": accuracy, "data": _identity(train, test, data)}
    unfinished.write_bytes(safetensors.torch.save(network.state_dict(), {"demo-cnn": json.dumps(facts)}))
    os.replace(unfinished, path)


def check_labels(train: Sets, test: Sets) -> None:
    """Refuse to train a demo-cnn on images without labels.

    Raises:
        ValueError: some have none.
    """
    if min(labels.min() for labels in (*_labels(train), *_labels(test))) < 0:
        raise ValueError(
            "evaluate.extractor is demo-cnn, which needs a label for every image, and some have none: take "
            "--evaluate.extractor inception or demo-random, or prepare the data from one folder a class"
        )


def _is_fit(path: Path, train: Sets, test: Sets, data: DataConfig) -> bool:
    """Whether a demo-cnn was trained on these very shards, read like this."""
    try:
        with safetensors.safe_open(files.regular_file(path), "pt") as file:
            facts = files.parse(file.metadata()["demo-cnn"].encode(), dict[str, Any])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return False
    return facts.get("data") == _identity(train, test, data)


def _identity(train: Sets, test: Sets, data: DataConfig) -> list[str | int]:
    return [*(shards.fingerprint() for shards in (*train, *test)), data.size, data.channels]


def _labels(sets: Sets) -> list[np.ndarray]:
    return [shards.labels if len(sets) == 1 else np.full(len(shards), i) for i, shards in enumerate(sets)]


def _some(sets: Sets, count: int, data: DataConfig) -> tuple[Tensor, Tensor]:
    """Up to `count` images at 32 pixels, as many of each set, and their labels."""
    images, labels = [], []
    for shards, known in zip(sets, _labels(sets), strict=True):
        positions = permutation(len(shards), 0)[: min(count // len(sets), *(len(shards) for shards in sets))]
        inward = np.sort(positions)  # in another order remote shards would be fetched again and again
        parts = np.array_split(inward, max(1, len(inward) // 256))
        pixels = torch.cat([shrink(read(shards, part, data.size, data.channels).image) for part in parts])
        images.append(pixels[np.searchsorted(inward, positions)])
        labels.append(torch.from_numpy(known[positions]))
    return torch.cat(images), torch.cat(labels)


def _descend(network: DemoCNN, pixels: Tensor, labels: Tensor, steps: int, batch: int = 128) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order = Order([len(pixels)], min(batch, len(pixels)), seed=0)
    for step in range(steps):
        chosen = torch.from_numpy(order[step])
        cross_entropy(network(pixels[chosen])[1], labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    _settle_scale(network.eval(), pixels)


@torch.no_grad()
def _settle_scale(network: DemoCNN, pixels: Tensor) -> None:
    features = torch.cat([network(part)[0] for part in pixels.split(1024)])
    network.scale.copy_(features.var(0).mean().sqrt())


@torch.no_grad()
def _accuracy(network: DemoCNN, pixels: Tensor, labels: Tensor) -> float:
    logits = torch.cat([network(part)[1] for part in pixels.split(1024)])
    return (logits.argmax(1) == labels).double().mean().item()
