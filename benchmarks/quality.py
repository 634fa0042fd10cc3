"""FID after a fixed time of training, compared with Pythae's VAEGAN: `python -m benchmarks.quality --data FOLDER`.

FOLDER holds MNIST as `python -m data.prepare` makes it. All runs train the same convolutions (32-64-128 at 32 pixels,
latent 16) for the same CPU time of one thread. Images are decoded in memory, and scoring takes none of that time. Then
10,000 samples from the prior are scored against the held-out images by the project's evaluator and demo-cnn, which is
trained first. A round trains all methods from one seed.

Ours (binary, ternary): `trainer.step.TrainStep`, no normalisation, samples of the averaged weights, the settings below.
Pythae's: its model class and its trainer's update (benchmarks/peer.py), its MNIST benchmark's settings and batch of
100, at learning rates 1e-4 (its default) and 1e-3; BatchNorm in encoder and decoder, and no averaged weights.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import accelerator, parser, print_table
from benchmarks.peer import Pythae
from data.loader import read
from data.order import Order
from data.shards.reader import Shards
from models import VAEGAN, DiscriminatorConfig, NetworkConfig, OptimizerConfig
from models.losses import Mode
from trainer.batch import Batch, normalize
from trainer.config.settings import DataConfig
from trainer.ema import EMA
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.extractors import demo_cnn
from trainer.step import TrainStep

SIZE, LATENT, WIDTH = 32, 16, 32
METHODS = ["ours, binary", "ours, ternary", "Pythae, lr 1e-4", "Pythae, lr 1e-3"]
BATCH_SIZE, HALF_LIFE = 32, 20_000


def our_system(mode: Mode) -> VAEGAN:
    return VAEGAN(
        SIZE,
        channels=1,
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

    def __init__(self, mode: Mode, precision: str, seed: int):
        system = our_system(mode)
        self.seed, self.move = seed, TrainStep(accelerator(precision), system, 1)
        self.ema = EMA(system, HALF_LIFE, BATCH_SIZE)

    def step(self, image: Tensor, k: int) -> None:
        self.move([Batch((image,), slice(0, len(image)), len(image), self.seed, k)], k)
        self.ema.update(k + 1)

    def trained(self) -> torch.nn.Module:
        assert self.move.failed() is None, self.move.failed()
        return self.ema.system


class Theirs(Pythae):
    batch_size = 100

    def __init__(self, lr: float):
        super().__init__(SIZE, 1, LATENT, [WIDTH, 2 * WIDTH, 4 * WIDTH], lr, self.batch_size)

    def trained(self) -> Pythae:
        self.model.eval()
        return self


def build(method: str, precision: str, seed: int) -> Ours | Theirs:
    torch.manual_seed(seed)
    kind, setting = method.split(", ")
    return Ours(setting, precision, seed) if kind == "ours" else Theirs(float(setting.removeprefix("lr ")))


def train(run: Ours | Theirs, pixels: Tensor, seed: int, seconds: float) -> int:
    """Train for some CPU seconds; return the steps taken."""
    order, k = Order([len(pixels)], run.batch_size, seed), 0
    began = time.process_time()
    while time.process_time() - began < seconds:
        run.step(normalize(pixels[order[k]]), k)
        k += 1
    return k


def evaluator_of(folder: Path, precision: str) -> tuple[Evaluator, Tensor]:
    """Return an evaluator with the demo-cnn of a folder's images, and the training images as pixels."""
    data = DataConfig(str(folder / "train"), str(folder / "test"), size=SIZE, channels=1)
    train_shards, test_shards = Shards(folder / "train"), Shards(folder / "test")
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary, "demo-cnn.safetensors")
        demo_cnn.fit([train_shards], [test_shards], data, kept)
        features = demo_cnn.load_demo_cnn(kept, data.channels).eval().requires_grad_(False)
    evaluator = Evaluator(
        accelerator(precision), features, [test_shards], data, num=10_000, seed=0, system=our_system("binary")
    )
    return evaluator, read(train_shards, np.arange(len(train_shards)), SIZE, 1).image


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--data", type=Path, required=True, help="folder of train and test shards")
    options.add_argument("--seconds", type=float, default=120, help="CPU seconds of each training (120)")
    options.add_argument("--precision", choices=["no", "bf16"], default="no", help="of ours; Pythae's is fp32")
    given = options.parse_args()
    torch.set_num_threads(1)
    evaluator, pixels = evaluator_of(given.data, given.precision)
    scores: dict[str, list[float]] = {method: [] for method in METHODS}
    steps: dict[str, int] = {}
    for seed in range(given.rounds):
        for method in METHODS:
            run = build(method, given.precision, seed)
            steps[method] = train(run, pixels, seed, given.seconds)
            found = evaluator(run.trained())
            scores[method].append(found["eval/fid10k/demo-cnn-v1"])
            facts = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"{method}, seed {seed}: {steps[method]} steps, {facts}", file=sys.stderr, flush=True)
    medians = {method: statistics.median(values) for method, values in scores.items()}
    best = min(value for method, value in medians.items() if method.startswith("Pythae"))

    def rows() -> Iterator[list[object]]:
        for method, values in scores.items():
            each = ", ".join(f"{value:.1f}" for value in values)
            yield [method, steps[method], each, f"{medians[method]:.1f}", f"1/{best / medians[method]:.1f}"]

    print_table("method | steps | FID of each seed | median | of the better Pythae's", rows())
    print(f"Ternary over binary: {medians['ours, ternary'] / medians['ours, binary']:.2f}.")


if __name__ == "__main__":
    main()
