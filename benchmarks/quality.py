"""FID after a fixed time of training, beside Pythae's VAEGAN: `python -m benchmarks.quality --data FOLDER`.

FOLDER holds MNIST as `python -m data.prepare` makes it. All runs train the same convolutions (32-64-128 at 32 pixels,
latent 16) for the same CPU time of one thread (`time.process_time`; images lie decoded in memory, and scoring is not
counted), then score 10,000 samples from the prior against the held-out images, by the project's evaluator and demo-cnn,
which is trained first.

Ours (binary, ternary): `trainer.step.TrainStep`, no normalisation, samples of the averaged weights, the settings below.
Pythae's: its model class, its trainer's update (see benchmarks/peer.py), its MNIST benchmark's settings and batch of
100, at learning rates 1e-4 (its default) and 1e-3; BatchNorm in encoder and decoder; it averages no weights.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.peer import Pythae
from data.loader import read
from data.order import Order
from data.shards.reader import Shards
from models import VAEGAN, DiscriminatorConfig, NetworkConfig, OptimizerConfig
from models.losses import ModeName
from trainer.batch import Batch, normalize
from trainer.config.settings import DataConfig
from trainer.ema import EMA
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.extractors import demo_cnn
from trainer.step import TrainStep

SIZE, LATENT, WIDTH = 32, 16, 32
METHODS = ["ours, binary", "ours, ternary", "Pythae, lr 1e-4", "Pythae, lr 1e-3"]
BATCH_SIZE, HALF_LIFE = 32, 20_000


def our_system(mode: ModeName) -> VAEGAN:
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

    def __init__(self, accelerator: Accelerator, mode: ModeName, seed: int):
        system = our_system(mode)
        self.seed, self.move, self.ema = seed, TrainStep(accelerator, system, 1), EMA(system, HALF_LIFE, BATCH_SIZE)

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


def build(method: str, accelerator: Accelerator, seed: int) -> Ours | Theirs:
    torch.manual_seed(seed)
    kind, setting = method.split(", ")
    return Ours(accelerator, setting, seed) if kind == "ours" else Theirs(float(setting.removeprefix("lr ")))


def train(run: Ours | Theirs, pixels: Tensor, seed: int, seconds: float) -> int:
    """Train for some CPU time; returns the steps made."""
    order, k = Order([len(pixels)], run.batch_size, seed), 0
    began = time.process_time()
    while time.process_time() - began < seconds:
        run.step(normalize(pixels[order[k]]), k)
        k += 1
    return k


def report(scores: dict[str, list[float]], steps: dict[str, int]) -> str:
    medians = {method: statistics.median(values) for method, values in scores.items()}
    best = min(value for method, value in medians.items() if method.startswith("Pythae"))
    rows = ["| method | steps | FID of each seed | median | of the better Pythae's |", "|---|---|---|---|---|"]
    for method, values in scores.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        rows.append(f"| {method} | {steps[method]} | {each} | {medians[method]:.1f} | 1/{best / medians[method]:.1f} |")
    ternary = medians["ours, ternary"] / medians["ours, binary"]
    return "\n".join([*rows, "", f"Ternary over binary: {ternary:.2f}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train and test shards")
    parser.add_argument("--seconds", type=float, default=120, help="of CPU time a run trains")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="of ours; Pythae's is fp32")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the table to")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision=settings.precision)
    data = DataConfig(str(settings.data / "train"), str(settings.data / "test"), size=SIZE, channels=1)
    train_shards, test_shards = Shards(settings.data / "train"), Shards(settings.data / "test")
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "demo-cnn.safetensors")
        demo_cnn.fit([train_shards], [test_shards], data, kept)
        features = demo_cnn.load_demo_cnn(kept, data.channels).eval().requires_grad_(False)
    evaluator = Evaluator(accelerator, features, [test_shards], data, num=10_000, seed=0, system=our_system("binary"))
    pixels = read(train_shards, np.arange(len(train_shards)), SIZE, 1).image
    scores: dict[str, list[float]] = {method: [] for method in METHODS}
    steps: dict[str, int] = {}
    for seed in range(settings.seeds):
        for method in METHODS:
            run = build(method, accelerator, seed)
            steps[method] = train(run, pixels, seed, settings.seconds)
            found = evaluator(run.trained())
            scores[method].append(found["eval/fid10k/demo-cnn-v1"])
            facts = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"{method}, seed {seed}: {steps[method]} steps, {facts}", flush=True)
    table = report(scores, steps)
    print(table)
    if settings.out:
        settings.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
