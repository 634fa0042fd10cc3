"""Networks whose features the scores compare: InceptionV3, a small one that is trained on labelled shards, or random,
any of torch-fidelity's, or one from a file.

An extractor takes uint8 images [n, 1 or 3, size, size] to (features [n, D], logits [n, K]), and has a `name` that every
score carries.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from data import files
from data.errors import DataError
from data.loader import Samples, read
from data.order import Order, permutation
from models.manifest import check_tensors
from models.networks.perceptual import Perceptual
from trainer.batch import normalize
from trainer.config import Data, Evaluate
from trainer.launcher import is_first_on_machine
from trainer.peers import on_main

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
ACCURACY_GATE = 0.9
BATCH = 64  # images that an extractor is given at once


Sets = Sequence[Samples]  # of several sets, an image's label is its set's number


class Extractor(Protocol):
    name: str
    dim: int
    classes: int  # 0: it names none, so there is no inception score
    sha256: str  # of its weights' file
    resize: str  # how it brings images to the size of its network

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]: ...


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


class Inception(nn.Module):
    """torch-fidelity's InceptionV3, the network of published FIDs: 2048 features, 1008 logits without their bias."""

    name = "inception-v3"
    dim = 2048
    resize = "TensorFlow 1's bilinear to 299"
    classes = 1008
    sha256: str

    def __init__(self, weights: Path):
        super().__init__()
        self.path = weights
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(coloured(image))


def build(
    settings: Evaluate, data: Data, run_dir: Path, train: Sets, test: Sets, accelerator: Accelerator
) -> Extractor:
    """The extractor that the settings name, on the accelerator's device, in eval mode.

    Raises:
        ValueError: it cannot be had as set; says what to do.
    """
    extractor: nn.Module
    kind, weights, device = settings.extractor, settings.weights, accelerator.device
    if kind == "inception":
        extractor = inception(weights)
    elif kind == "file":
        extractor = FileExtractor(weights, data.size, device)
    elif kind == "demo-cnn":
        kept = Path(weights or run_dir / "demo-cnn-v1.safetensors")
        if weights is None:
            on_main(accelerator, lambda: None if _is_fit(kept, train, test, data) else fit(train, test, data, kept))
        extractor = load_demo_cnn(kept, data.channels)
    elif weights:
        raise ValueError(f"evaluate.weights has no effect while evaluate.extractor is {kind}: leave it unset")
    elif kind == "demo-random":
        extractor = on_main(accelerator, lambda: demo_random(train, data))  # processors differ in their last digits
    else:
        extractor = registered(kind)
    return extractor.to(device).eval().requires_grad_(False)


class Registered(nn.Module):
    """An extractor of torch-fidelity's registry, by the layer that it takes for FID.

    There is an inception score where it takes another layer for that. DINOv2 gets images that are resized as those who
    publish its distances do (Stein et al. 2023; Karras et al. 2024): to 224 pixels, bicubic and antialiased;
    torch-fidelity's own resize is another one.

    Args:
        name: in the registry
    """

    def __init__(self, name: str):
        super().__init__()
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        self.name, self.registered = name, name
        self.layers = [kind.get_default_feature_layer_for_metric("fid")]
        logits = kind.get_default_feature_layer_for_metric("isc")
        if logits not in self.layers:
            self.layers.append(logits)
        self.network = kind(name, self.layers).eval()
        self.size = 224 if name.startswith("dinov2") else None
        self.resize = "antialiased bicubic to 224, rounded" if self.size else "torch-fidelity's own"
        found = self(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        self.dim, self.classes = found[0].shape[1], found[1].shape[1] if len(self.layers) > 1 else 0
        self.sha256 = digest_of(self.network)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network(coloured(image if self.size is None else bicubic(image, self.size)))
        return found[0], found[-1]


class FileExtractor(nn.Module):
    """A network of the user's, from a TorchScript file or one of `torch.export`.

    It is given uint8 images [n, 3, size, size], n from 1 to 64, and gives features [n, D], or features and logits.

    Args:
        weights: the file
        size: of the images
        device: it runs on

    Raises:
        ValueError: there is no such file, or it is not such a network.
    """

    resize = "the file's own"

    def __init__(self, weights: str | None, size: int, device: torch.device):
        super().__init__()
        if not weights:
            raise ValueError(
                "evaluate.extractor is file: name a TorchScript file, or one of torch.export, with --evaluate.weights"
            )
        try:
            content = Path(weights).read_bytes()
        except OSError as error:
            raise ValueError(f"evaluate.weights: {weights} cannot be read: {error.strerror}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.name = f"{Path(weights).stem}-{self.sha256[:8]}"
        self._calls = [_network_of(weights, device)]  # no child: an exported program has no eval mode
        shape, generator = (BATCH, 3, size, size), torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        try:
            with torch.no_grad():
                found = [self(images[:n]) for n in (BATCH, 2)]
            dims = {(features.shape[1], logits.shape[1]) for features, logits in found}
            (self.dim, classes), lengths = dims.pop(), [len(features) for features, _ in found]
            fits = not dims and lengths == [BATCH, 2] and all(f.is_floating_point() for f, _ in found)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
            raise ValueError(self._expected(weights, size, str(error).strip().splitlines()[-1])) from error
        if not fits:
            raise ValueError(self._expected(weights, size, f"it gives {[list(f.shape) for f, _ in found]}"))
        many, few = found[0][0][:2], found[1][0]
        if not many.isfinite().all():
            raise ValueError(self._expected(weights, size, "its features are not finite"))
        if not torch.allclose(many, few, rtol=1e-2, atol=1e-2 * many.abs().max().item()):
            raise ValueError(
                self._expected(weights, size, "an image's features depend on those beside it: export it in eval mode")
            )
        self.classes = classes if found[0][1] is not found[0][0] else 0

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self._calls[0](coloured(image))
        return (found, found) if isinstance(found, Tensor) else (found[0], found[-1])

    @staticmethod
    def _expected(weights: str, size: int, found: str) -> str:
        return (
            f"evaluate.weights: {weights} is not an extractor: of uint8 images [n, 3, {size}, {size}], any n up to "
            f"{BATCH}, it must give features [n, D], or features and logits ({found})"
        )


def _network_of(path: str, device: torch.device) -> Callable[[Tensor], Any]:
    """A TorchScript file's module, or an exported program's.

    Raises:
        ValueError: it is neither.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".torch.jit", FutureWarning)  # of its end, some day
            return torch.jit.load(path, map_location=device).eval()
    except RuntimeError:
        pass  # it may be an exported program
    try:
        from torch.export.passes import move_to_device_pass

        # Where it was exported is written all over a program: a module's own `to` would not do.
        return move_to_device_pass(torch.export.load(path), device).module()
    except Exception as error:  # zip's, pickle's and the loader's ways to say that a file is another one
        raise ValueError(
            f"evaluate.weights: {path} is neither a TorchScript file nor one of torch.export.save "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def coloured(image: Tensor) -> Tensor:
    """Images [n, 1 or 3, h, w] in three channels."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image


def bicubic(image: Tensor, size: int) -> Tensor:
    """uint8 images, resized by Pillow's bicubic filter, but that it clips between its two passes and this does not."""
    resized = interpolate(image.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def digest_of(network: nn.Module) -> str:
    """sha256 of a network's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_name(name: str) -> None:
    """Refuse the name of an extractor that there is not.

    Raises:
        ValueError: names those that there are.
    """
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    others = sorted(FEATURE_EXTRACTORS_REGISTRY.keys() - {"inception-v3-compat"})
    if name not in {"inception", "demo-cnn", "demo-random", "file", *others}:
        raise ValueError(
            f"evaluate.extractor is {name}, expected inception, demo-cnn, demo-random, file, or one of "
            f"torch-fidelity's: {', '.join(others)}"
        )


def registered(name: str) -> Registered:
    """An extractor of torch-fidelity's registry; one process a machine downloads it if it is not there.

    Raises:
        ValueError: there is none of that name, or it cannot be had.
    """
    check_name(name)
    found, reason = None, "another process of this machine could not have it"
    if is_first_on_machine():
        found, reason = _try(name)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if found is None and not is_first_on_machine():
        found, reason = _try(name)
    if found is None:
        raise ValueError(
            f"evaluate.extractor is {name}, and it cannot be had: {reason}. It is downloaded by torch.hub into "
            f"{torch.hub.get_dir()}: have it there by python -m trainer.prefetch {name}, on a machine with a network"
        )
    return found


def _try(name: str) -> tuple[Registered | None, str]:
    try:
        return Registered(name), ""
    except Exception as error:  # torch.hub's, its repositories' and the network's
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class LPIPS:
    """LPIPS of uint8 images, by VGG16 (Zhang et al. 2018), of weights from a file.

    Raises:
        ValueError: the file is missing, or holds other weights.
    """

    name = "lpips_vgg"

    def __init__(self, weights: str, device: torch.device):
        self.network = Perceptual("lpips", weights, "evaluate.lpips").to(device)
        self.sha256 = self.network.sha256

    def __call__(self, image: Tensor, other: Tensor) -> Tensor:
        """[n] of images [n, 1 or 3, h, w], of 16 pixels a side or more."""
        return self.network.each(normalize(image), normalize(other))


def inception(weights: str | None) -> Inception:
    """InceptionV3 from a file, from TORCH_HOME, or downloaded into TORCH_HOME by one process a machine.

    Raises:
        ValueError: there are no weights and no network, or the file is not InceptionV3's weights.
    """
    path = Path(weights) if weights else Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    if weights and not path.exists():
        raise ValueError(f"evaluate.weights: {path} does not exist; expected torch-fidelity's {INCEPTION_FILE}")
    if not weights:
        _download(path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would load code, too
        found = Inception(path)
    except Exception as error:  # pickle's, zip's and load_state_dict's many ways to say that a file is another one
        raise ValueError(
            f"evaluate.weights: {path} does not hold the weights of the FID's InceptionV3 "
            f"({str(error).splitlines()[0]}); expected torch-fidelity's {INCEPTION_FILE}, not "
            "torchvision's inception_v3, which is another network"
        ) from error
    found.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.sha256.startswith(INCEPTION_SHA256):
        found.name = f"inception-v3-weights-{found.sha256[:8]}"
    return found


def _download(path: Path) -> None:
    """Have one process a machine fetch the weights if they are not there; every process calls this."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    reason = "another process of this machine could not download them"
    if is_first_on_machine() and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            reason = f"they could not be downloaded: {error}"
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if not path.exists():
        raise ValueError(
            f"evaluate.extractor is inception, but its weights are not there, and {reason}. Put {INCEPTION_FILE} (from "
            f"torch-fidelity's releases on GitHub; or by python -m trainer.prefetch inception, with a network) "
            f"at {path}, or name it with --evaluate.weights PATH; or take "
            "--evaluate.extractor demo-cnn, which is trained on labelled shards, or demo-random, or train without "
            "scores: --evaluate.every 0"
        )


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
        raise ValueError(f"evaluate.weights: {path} is no demo-cnn's file: {files.shown(str(error))}") from error
    if seen != channels:
        raise ValueError(f"evaluate.weights: {path} sees {seen} channels, but data.channels is {channels}")
    extractor = DemoCNN(channels, classes)
    extractor.load_state_dict(tensors)
    extractor.sha256 = hashlib.sha256(content).hexdigest()
    return extractor


def demo_random(train: Sets, data: Data, images: int = 5_000) -> DemoCNN:
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


def fit(train: Sets, test: Sets, data: Data, path: Path, images: int = 20_000, steps: int = 600) -> None:
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


def _is_fit(path: Path, train: Sets, test: Sets, data: Data) -> bool:
    """Whether a demo-cnn was trained on these very shards, read like this."""
    try:
        with safetensors.safe_open(files.regular(path), "pt") as file:
            facts = files.parse(file.metadata()["demo-cnn"].encode(), dict[str, Any])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return False
    return facts.get("data") == _identity(train, test, data)


def _identity(train: Sets, test: Sets, data: Data) -> list[str | int]:
    return [*(shards.fingerprint() for shards in (*train, *test)), data.size, data.channels]


def _labels(sets: Sets) -> list[np.ndarray]:
    return [shards.labels if len(sets) == 1 else np.full(len(shards), i) for i, shards in enumerate(sets)]


def _some(sets: Sets, count: int, data: Data) -> tuple[Tensor, Tensor]:
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
