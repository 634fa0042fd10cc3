"""FID over CPU time, compared with Pythae's VAEGAN and a plain loop: `python -m benchmarks.quality --data FOLDER`.

FOLDER holds MNIST or CIFAR-10 as `python -m data.prepare` makes it. All runs train the same convolutions (32-64-128 at
32 pixels, latent 16) on one thread. Images are decoded in memory, and scoring takes none of the CPU time that counts.
At each of `--marks`, 10,000 samples from the prior are scored against the held-out images by the project's evaluator,
with demo-cnn, which is trained first, or demo-random. A round trains all methods from one seed.

- `ours, binary` and `ours, ternary`: `trainer.step.TrainStep`, no normalisation, samples of the averaged weights, the
  settings below.
- `plain loop`: benchmarks/plain.py with our networks and batch size, at its own learning rate of 2e-4 and at 1e-3; it
  has neither R1 nor averaged weights.
- `Pythae`: its model class and its trainer's update (benchmarks/peer.py), its MNIST benchmark's settings and batch of
  100, at learning rates 1e-4 (its default) and 1e-3; BatchNorm in encoder and decoder, and no averaged weights.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import accelerator, parser, print_table
from benchmarks.plain import PlainLoop
from data.loader import read
from data.order import Order
from data.shards.reader import Shards
from models import VAEGAN, DiscriminatorConfig, NetworkConfig, OptimizerConfig
from models.losses import Mode
from trainer.batch import Batch, normalize, to_pixels
from trainer.config.settings import DataConfig
from trainer.ema import EMA
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.extractors import demo_cnn
from trainer.samplers import Sampler
from trainer.step import TrainStep

SIZE, LATENT, WIDTH = 32, 16, 32
METHODS = ["ours, binary", "ours, ternary", "plain loop, lr 2e-4", "plain loop, lr 1e-3"]
METHODS += ["Pythae, lr 1e-4", "Pythae, lr 1e-3"]
BATCH_SIZE, HALF_LIFE = 32, 20_000
Sample = Callable[[Tensor], Tensor]  # z [n, LATENT] to images [n, channels, SIZE, SIZE] in [-1, 1]


def our_system(mode: Mode, channels: int) -> VAEGAN:
    return VAEGAN(
        SIZE,
        channels=channels,
        latent_dim=LATENT,
        networks=NetworkConfig("dcgan", WIDTH, "none"),
        discriminator=mode,
        kl_weight=1.0,
        adversarial_weight=100,
        autoencoder=OptimizerConfig(lr=3e-3),
        **{mode: DiscriminatorConfig(lr=3e-3, r1_weight=0.3, penalty_every=4)},
    )


class Ours:
    batch_size = BATCH_SIZE

    def __init__(self, mode: Mode, channels: int, precision: str, seed: int):
        system = our_system(mode, channels)
        self.seed, self.move = seed, TrainStep(accelerator(precision), system, 1)
        self.ema = EMA(system, HALF_LIFE, BATCH_SIZE)

    def step(self, image: Tensor, k: int) -> None:
        self.move([Batch((image,), slice(0, len(image)), len(image), self.seed, k)], k)
        self.ema.update(k + 1)

    def sampler(self) -> Sample:
        assert self.move.failed() is None, self.move.failed()
        return self.ema.system.sample


class Plain:
    batch_size = BATCH_SIZE

    def __init__(self, lr: float, channels: int):
        networks = NetworkConfig("dcgan", WIDTH, "none")
        self.system = VAEGAN(SIZE, channels, LATENT, networks, binary=DiscriminatorConfig(r1_weight=0.0))
        self.loop = PlainLoop(self.system, lr=lr)

    def step(self, image: Tensor, k: int) -> None:
        self.loop.step(image)

    def sampler(self) -> Sample:
        return self.system.sample


class Theirs:
    batch_size = 100

    def __init__(self, lr: float, channels: int):
        from benchmarks.peer import Pythae  # in the extra `bench`

        self.peer = Pythae(SIZE, channels, LATENT, [WIDTH, 2 * WIDTH, 4 * WIDTH], lr, self.batch_size)

    def step(self, image: Tensor, k: int) -> None:
        self.peer.model.train()
        self.peer.step(image)

    def sampler(self) -> Sample:
        self.peer.model.eval()
        return self.peer.sample


def build(method: str, channels: int, precision: str, seed: int) -> Ours | Plain | Theirs:
    torch.manual_seed(seed)
    kind, setting = method.split(", ")
    if kind == "ours":
        return Ours(cast(Mode, setting), channels, precision, seed)
    return {"plain loop": Plain, "Pythae": Theirs}[kind](float(setting.removeprefix("lr ")), channels)


def train(run: Ours | Plain | Theirs, pixels: Tensor, seed: int, marks: list[float], score: Callable[[Sample], float]):
    """Train until the last mark, in CPU seconds; yield the steps taken and the FID at each."""
    order, k, spent = Order([len(pixels)], run.batch_size, seed), 0, 0.0
    for mark in marks:
        while spent < mark:
            began = time.process_time()
            run.step(normalize(pixels[order[k]]), k)
            k, spent = k + 1, spent + time.process_time() - began
        yield k, score(run.sampler())


def evaluator_of(folder: Path, channels: int, extractor: str, precision: str) -> tuple[Evaluator, Tensor]:
    """Return an evaluator of FID with an extractor of a folder's images, and the training images as pixels."""
    data = DataConfig(str(folder / "train"), str(folder / "test"), size=SIZE, channels=channels)
    train_shards, test_shards = Shards(folder / "train"), Shards(folder / "test")
    if extractor == "demo-random":
        features = demo_cnn.demo_random([train_shards], data)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            kept = Path(temporary, "demo-cnn.safetensors")
            demo_cnn.fit([train_shards], [test_shards], data, kept)
            features = demo_cnn.load_demo_cnn(kept, channels)
    features = features.eval().requires_grad_(False)
    settings = {"num": 10_000, "seed": 0, "metrics": ("fid",)}
    evaluator = Evaluator(accelerator(precision), features, [test_shards], data, **settings)
    return evaluator, read(train_shards, np.arange(len(train_shards)), SIZE, channels).image


def fid(evaluator: Evaluator, sample: Sample) -> float:
    """Return the FID of samples of the evaluator's draws from the prior."""
    draw = Sampler("prior", (LATENT,))
    scores = evaluator.score(lambda index: to_pixels(sample(draw(evaluator.seed, index)), evaluator.data.bits))
    (found,) = (value for name, value in scores.items() if name.startswith("eval/fid"))
    return found


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--data", type=Path, required=True, help="folder of train and test shards")
    options.add_argument("--channels", type=int, choices=[1, 3], default=1, help="1 for MNIST, 3 for CIFAR-10 (1)")
    options.add_argument("--extractor", choices=["demo-cnn", "demo-random"], default="demo-cnn", help="(demo-cnn)")
    options.add_argument("--marks", type=float, nargs="+", default=[15, 30, 60, 120], help="CPU seconds (15 30 60 120)")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="methods to train (all)")
    options.add_argument("--precision", choices=["no", "bf16"], default="no", help="of ours; the others' is fp32")
    given = options.parse_args()
    given.marks = [1.0] if given.small else given.marks
    left_out = [] if find_spec("pythae") else [method for method in given.methods if method.startswith("Pythae")]
    torch.set_num_threads(1)
    evaluator, pixels = evaluator_of(given.data, given.channels, given.extractor, given.precision)

    found: dict[str, list[list[float]]] = {method: [] for method in given.methods if method not in left_out}
    steps: dict[str, int] = {}
    for seed in range(given.rounds):
        for method in found:
            run = build(method, given.channels, given.precision, seed)
            taken, fids = zip(*train(run, pixels, seed, given.marks, partial(fid, evaluator)), strict=True)
            steps[method] = taken[-1]
            found[method].append(list(fids))
            print(f"{method}, seed {seed}: {taken[-1]} steps, FID {fids}", file=sys.stderr, flush=True)

    def rows() -> Iterator[list[object]]:
        for method, seeds in found.items():
            middle = [f"{statistics.median(at):.1f}" for at in zip(*seeds, strict=True)]
            yield [method, steps[method], *middle, ", ".join(f"{fids[-1]:.1f}" for fids in seeds)]
        for method in left_out:
            yield [f"{method}: left out, see `pip install -e '.[bench]'`", "", *[""] * len(given.marks), ""]

    marks = " | ".join(f"{mark:g} s" for mark in given.marks)
    print("FID of 10,000 samples, medians over seeds, after CPU seconds of training:\n")
    print_table(f"method | steps | {marks} | each seed's last", rows())


if __name__ == "__main__":
    main()
