"""On an NVIDIA GPU: `make test-gpu`. Elsewhere each is skipped; `GPU_TESTS_ON=cpu make test-gpu` tries the tests
themselves on a CPU, less what only CUDA has."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import NETWORKS, ROOT
from evaluators import random_inception
from systems_under_test import SYSTEMS
from test_run import lines, weights

import models
from data.loader import Batches, load, read
from data.order import Order
from data.shards.reader import Shards, write
from trainer.batch import Batch, normalize
from trainer.config.parser import configure
from trainer.config.settings import DataConfig, EvaluateConfig
from trainer.distributed.ranks import Ranks
from trainer.distributed.stop import StopSignal
from trainer.ema import EMA
from trainer.evaluate.accumulators import extract_features
from trainer.evaluate.extractors.build import build_extractor
from trainer.run_folder import RunFolder
from trainer.step import TrainStep
from trainer.train import Run

ON = os.environ.get("GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON == "cuda" and not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU here"),
]
only_cuda = pytest.mark.skipif(ON != "cuda", reason="only CUDA has it")
TERNARY = ["--system", "VAEGAN", "--system.discriminator", "ternary"]
FP16 = ["--trainer.precision", "fp16"]
RESIDUAL = ["--system.networks.family", "residual", "--system.networks.width", "8", "--system.networks.attention"]


@pytest.fixture
def launched(main):
    """The launcher with a configuration of launch/accelerate on the GPU; None: without a launcher."""

    def run(configuration: str | None, *arguments, processes=1, **options):
        environment = {"ACCELERATE_USE_CPU": str(ON == "cpu").lower()}
        launch = ["--config_file", str(ROOT / "launch" / "accelerate" / f"{configuration}.yaml")]
        count = processes if configuration else 0
        done = main(*arguments, processes=count, launch=launch, env=environment, **options)
        assert done.returncode == 0, done.stderr
        assert f"{processes} process{'es' * (processes > 1)} on {ON}" in done.stderr
        return done.stderr

    return run


@pytest.fixture
def accelerator():
    """Make one in this process: `accelerator("fp16")`, `accelerator(cpu=True)`."""

    def make(precision: str = "no", cpu: bool = ON == "cpu") -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=cpu, mixed_precision=precision)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def scalers(run_dir) -> dict:
    newest = max((run_dir / "checkpoints").glob("step_*"))
    return json.loads((newest / "manifest.json").read_text())["scalers"]


def test_bf16_is_the_default_and_fp32_agrees_with_a_cpu(launched, main, tmp_path):
    """An AE draws nothing, so that both train on the same numbers."""
    run = ["--system", "AE", "--trainer.steps", "6", "--data.workers", "1"]
    told = launched(None, *run, "--trainer.run_dir", tmp_path / "unset")
    assert f"precision {'bf16' if ON == 'cuda' else 'no'}" in told
    told = launched("one_gpu", *run, "--trainer.run_dir", tmp_path / "bf16")
    assert "precision bf16" in told
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16").values())
    launched(None, *run, "--trainer.precision", "no", "--trainer.run_dir", tmp_path / "fp32")
    done = main(*run, "--trainer.run_dir", tmp_path / "cpu", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    for name, rounding in {"unset": 0.05, "bf16": 0.05, "fp32": 5e-3}.items():  # convolutions in fp32 are TF32's
        for one, other in zip(lines(tmp_path / name), lines(tmp_path / "cpu"), strict=True):
            assert one["sample_checksum"] == other["sample_checksum"]
            key = "autoencoder/reconstruction"
            assert one[key] == pytest.approx(other[key], rel=rounding), (name, one["step"])


@pytest.mark.parametrize(
    "options",
    [
        [*TERNARY, *RESIDUAL, "[8]", "--system.adaptive", "true"],
        pytest.param([*FP16, "--system", "VAEGAN", "--system.discriminator", "both"], marks=only_cuda),
        ["--system", "CycleGAN", "--system.width", "4", "--system.blocks", "1"],
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(launched, digits, tmp_path, options):
    """With `--trainer.deterministic`; under fp16 every player has a scaler of its own, saved by its name."""
    small = NETWORKS
    if "CycleGAN" in options:
        train, test = (f'["{digits}/{part}", "{digits}/{part}"]' for part in ("train", "test"))
        small = ["--data.train", train, "--data.test", test]
    run = [*options, "--trainer.deterministic", "true", "--trainer.steps", "8", "--trainer.save_every", "4"]
    run += ["--trainer.log_every", "1", "--data.workers", "1", "--evaluate.every", "8", "--evaluate.num", "64"]
    run += ["--evaluate.extractor", "demo-random"]
    launched("one_gpu", *run, "--trainer.run_dir", tmp_path / "whole", small=small)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000008")
    told = launched("one_gpu", *run, "--trainer.run_dir", tmp_path / "cut", small=small)
    assert "Resuming at step 4 of 8" in told
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    players = {"binary", "ternary", "autoencoder"} if "fp16" in options else set()
    assert scalers(tmp_path / "whole").keys() == players
    assert scalers(tmp_path / "whole") == scalers(tmp_path / "cut")


@pytest.mark.parametrize("compile", ["true", pytest.param("cuda_graphs", marks=only_cuda)])
def test_compiled_networks_train_as_eager_ones(launched, tmp_path, compile):
    run = [*TERNARY, "--trainer.precision", "no", "--trainer.steps", "4", "--trainer.log_every", "1"]
    launched(None, *run, "--trainer.run_dir", tmp_path / "eager")
    launched(None, *run, "--trainer.run_dir", tmp_path / "compiled", "--trainer.compile", compile)
    assert weights(tmp_path / "eager").keys() == weights(tmp_path / "compiled").keys()
    for one, other in zip(lines(tmp_path / "eager"), lines(tmp_path / "compiled"), strict=True):
        for key in ("autoencoder/reconstruction", "autoencoder/kl", "ternary/discriminator_loss", "ternary/r1"):
            assert one[key] == pytest.approx(other[key], rel=2e-2), (key, one["step"])
    resumed = [*run, "--trainer.steps", "6", "--trainer.compile", compile]
    assert "Resuming at step 4 of 6" in launched(None, *resumed, "--trainer.run_dir", tmp_path / "eager")


def test_copies_beside_a_busy_device_are_the_images(accelerator, digits, tmp_path):
    """Pinned batches go over on a stream of their own while another computes: none is seen half copied, or reused."""
    arguments = ["--data.train", str(digits / "train"), "--data.channels", "1", "--data.workers", "2"]
    arguments += ["--system", "AE", *NETWORKS, "--evaluate.every", "0", "--trainer.batch_size", "256"]
    config = configure([*arguments, "--trainer.steps", "40", "--trainer.run_dir", str(tmp_path)])
    made = accelerator()
    with RunFolder(tmp_path) as folder:
        run = Run(config, folder, made, Ranks(made, 60), StopSignal())
        (shards,), (order,) = run.parts.trains, run.parts.orders
        busy = torch.rand(2048 if ON == "cuda" else 64, 2048 if ON == "cuda" else 64, device=made.device)
        seen = []
        for batch in run.batches():
            for _ in range(20):
                busy = (busy @ busy).softmax(1)  # the copy of the next batch meets it
            seen.append(batch.image.clone())
        for step, image in enumerate(seen):
            expected = normalize(read(shards, order[step], 32, 1).image)
            torch.testing.assert_close(image.cpu(), expected, rtol=0, atol=1e-6, msg=f"step {step}")
        run.logger.close()


@only_cuda
def test_a_workers_batch_is_pinned(digits):
    shards = Shards(digits / "train")
    source = Batches([shards], [Order(shards.counts, 8, 0)], 32, 1, slice(0, 8))
    for workers in (0, 1):
        assert all(images.image.is_pinned() for (images,) in load(source, range(2), workers, pin_memory=True))


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=only_cuda)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_no_step_waits_for_the_device(accelerator, name, precision):
    """Anything that makes the host wait raises, after the first steps, in which algorithms are chosen."""
    made = accelerator(precision)
    system = SYSTEMS[name]().to(made.device)
    before = copy.deepcopy(system.state_dict())
    train_step, ema = TrainStep(made, system, 99), EMA(system, 100, 4)
    images = tuple(torch.rand(4, 1, 32, 32, device=made.device) * 2 - 1 for _ in range(2))
    label = torch.tensor([0, 1, 1, 0], device=made.device)
    for step in range(20 if precision == "fp16" else 5):  # fp16 skips its first updates
        if step == 2 and ON == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            train_step([Batch(images, slice(0, 4), 4, 0, step, label)], step)
            ema.update(step + 1)
        finally:
            if ON == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert train_step.failed() is None
    assert not any(state.overflows.item() for state in train_step.player_states), "all move in the end"
    assert any(not torch.equal(value, before[key]) for key, value in system.state_dict().items())


def test_inception_on_the_device_agrees_with_a_cpu_and_scores_a_run(launched, accelerator, digits, tmp_path):
    """The real architecture with random weights, by the path that real ones take."""
    path, image = tmp_path / "weights.pth", torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    random_inception(path)
    data, settings = (
        DataConfig(str(digits / "train"), str(digits / "test"), 32, 1, 0),
        EvaluateConfig(weights=str(path)),
    )
    found = []
    for cpu in (ON == "cpu", True):
        made = accelerator(cpu=cpu)
        found.append(extract_features(build_extractor(settings, data, tmp_path, [], [], made), image.to(made.device)))
    for one, other in zip(*found, strict=True):
        distance = (one.cpu().double() - other.double()).norm() / other.double().norm()
        assert distance < 1e-4, distance  # TF32 keeps ten bits
    few = tmp_path / "few"
    contents, _ = Shards(digits / "test").images(np.arange(16))
    write(few, ({"__key__": f"{i:02}", "png": bytes(content)} for i, content in enumerate(contents)))
    launched(
        "one_gpu",
        *("--system", "VAE", "--trainer.steps", "2", "--data.test", few, "--trainer.run_dir", tmp_path / "run"),
        *("--evaluate.every", "2", "--evaluate.num", "16", "--evaluate.weights", path),
    )
    (scores,) = (line for line in lines(tmp_path / "run") if any(key.startswith("eval/fid16/") for key in line))
    assert any(key.startswith("eval/fid16/inception-v3-weights-") for key in scores)


def test_codes_that_are_maps_at_256_pixels(launched, tmp_path):
    """A tokenizer as latent diffusion has it: 4 x 16 x 16 codes, a small KL weight, a patch discriminator."""
    width = "32" if ON == "cuda" else "4"
    launched(
        "one_gpu",
        *("--system", "VAEGAN", "--system.networks.family", "residual", "--system.networks.width", width),
        *("--system.networks.latent_stride", "16", "--system.networks.patches", "true", "--system.kl_weight", "1e-6"),
        *("--data.size", "256", "--trainer.batch_size", "4", "--trainer.steps", "2", "--trainer.log_every", "1"),
        *("--trainer.run_dir", tmp_path),
    )
    system = models.load(tmp_path)
    assert tuple(system.latent_shape) == (4, 16, 16)
    assert system.reconstruct(torch.zeros(1, 1, 256, 256)).shape == (1, 1, 256, 256)
    assert list((tmp_path / "samples").glob("*.png"))


@pytest.mark.skipif(ON == "cuda" and torch.cuda.device_count() < 2, reason="NCCL wants a GPU a process: two GPUs")
@pytest.mark.parametrize("way", ["ddp", "flat"])
def test_two_gpus_train_as_one(launched, tmp_path, way):
    run = ["--system", "AE", "--trainer.precision", "no", "--trainer.steps", "4", "--trainer.log_every", "1"]
    one = ["--trainer.micro_batch", "4", "--trainer.run_dir", tmp_path / "one"]
    launched("one_gpu", *run, *one)
    launched("one_node", *run, "--trainer.grad_sync", way, "--trainer.run_dir", tmp_path / "two", processes=2)
    for first, second in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert first["sample_checksum"] == second["sample_checksum"]
        key = "autoencoder/reconstruction"
        assert first[key] == pytest.approx(second[key], rel=1e-3)
