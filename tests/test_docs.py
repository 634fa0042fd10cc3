"""The code in docs/extending.md and docs/evaluation.md runs as it is written."""

import io
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from PIL import Image
from systems_under_test import batch_of
from torch.nn.functional import conv2d, max_pool2d

import models
from data import sources
from data.images import sides
from data.prepare.build import prepare
from data.shards.reader import Shards
from models import VAEGAN, DiscriminatorConfig, NetworkConfig
from models.networks import families
from trainer.checkpoint import writer
from trainer.config.parser import configure
from trainer.config.settings import DataConfig, EvaluateConfig
from trainer.evaluate.extractors.build import build_extractor
from trainer.evaluate.feature_scores import FeatureScores
from trainer.evaluate.ranks import EvaluationRanks
from trainer.metrics import METRICS
from trainer.metrics.statistics import FeatureStatistics, Gaussian, ReferenceStatistics
from trainer.step import TrainStep


def snippets(title: str) -> list[str]:
    """Return the code blocks of a section."""
    (section,) = re.findall(
        rf"^## {title}\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S
    )
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.fixture
def extend(monkeypatch):
    """Run a section's file as the module that its first line names, then the entry in a list; undo both afterwards."""
    before = [(known, known.copy()) for known in (models.SYSTEMS, families.FAMILIES, sources.SOURCES, METRICS)]

    def run(title: str) -> ModuleType:
        file, entry = snippets(title)
        name = file.partition("\n")[0].removeprefix("# ").removesuffix(".py").replace("/", ".")
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(file, name, "exec"), module.__dict__)
        exec(entry, module.__dict__)
        return module

    yield run
    for known, entries in before:
        known.clear()
        known.extend(entries) if isinstance(known, list) else known.update(entries)


def trained(system: models.System) -> models.System:
    """Return the system after three steps, which change every network."""
    before = {name: value.clone() for name, value in system.state_dict().items()}
    step = TrainStep(Accelerator(cpu=True), system, 3)
    for k in range(3):
        step([batch_of(step=k)], k)
    assert step.failed() is None
    moved = {name.partition(".")[0] for name, value in system.state_dict().items() if not value.equal(before[name])}
    assert moved == set(system.networks())
    return system.eval()


def test_a_new_system_is_configured_trained_and_loaded(extend, tmp_path):
    module = extend("A system")
    settings = ["--system.latent_dim", "4", "--system.networks.family", "dcgan", "--system.networks.width", "8"]
    data = ["--data.train", "nowhere", "--data.size", "32", "--data.channels", "1"]
    config = configure(["--system", "AAE", *settings, *data])
    system = trained(config.system())
    assert type(system) is module.AAE
    tensors = {name: network.state_dict() for name, network in system.networks().items()}
    writer.save(tmp_path / "checkpoints", 3, tensors, {"configuration": config.resolved()})
    loaded = models.load(tmp_path)
    image = batch_of().image
    torch.testing.assert_close(loaded.reconstruct(image), system.reconstruct(image), rtol=0, atol=0)
    assert loaded.sample(torch.zeros(2, *loaded.latent_shape)).shape == (2, 1, 32, 32)


def test_a_new_network_family_is_named_by_a_setting(extend):
    extend("A network family")
    networks = NetworkConfig("shuffle", 8, "group")
    system = trained(VAEGAN(32, 1, 4, networks, binary=DiscriminatorConfig(r1_weight=1.0)))
    assert isinstance(system.decoder.trunk[1], torch.nn.PixelShuffle)
    assert system.reconstruct(batch_of().image).shape == (4, 1, 32, 32)


def test_a_new_source_is_prepared(extend, tmp_path):
    extend("A data source")
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    prepare(str(tmp_path / "images.npy"), tmp_path / "out")
    found = [Shards(str(tmp_path / "out" / split)) for split in ("train", "test")]
    decoded = {
        np.asarray(Image.open(io.BytesIO(shards.image(i)))).tobytes() for shards in found for i in range(len(shards))
    }
    assert decoded == {image.tobytes() for image in images}


def test_a_new_metric_is_requested_by_a_setting_and_computed_from_statistics(extend):
    extend("A metric")
    config = configure(["--system", "AE", "--data.train", "nowhere", "--evaluate.metrics", "[variance]"])
    fake, real = (Gaussian(torch.zeros(3), scale * torch.eye(3, dtype=torch.float64), 2000) for scale in (1.0, 2.0))
    statistics, reference = FeatureStatistics(fake, None, 0.0, None), ReferenceStatistics(real, {})
    ranks = EvaluationRanks(Accelerator(cpu=True))
    scores = FeatureScores("demo-cnn-v1", config.evaluate.metrics, ranks).compare(statistics, reference)
    assert scores == {"eval/variance2k/demo-cnn-v1": 0.5}


@pytest.mark.slow  # VGG16 has 138 million weights
def test_vgg16s_means_are_an_extractor_of_images_from_32_pixels_on(vgg16, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.S)
    weights = torch.load(vgg16)
    for name, value in weights.items():  # without biases, and as large in each layer, so that features depend on images
        if name.startswith("features."):
            weights[name] = torch.zeros_like(value) if value.ndim == 1 else value * 2**0.5
    torch.save(weights, "vgg16-397923af.pth")
    exec(compile(code, "vgg16_means.py", "exec"), {})
    for size in (64, (32, 48)):
        data, settings = DataConfig("", None, size, 3, 0), EvaluateConfig(extractor="file", weights="vgg16-means.pt2")
        extractor = build_extractor(settings, data, None, [], [], Accelerator(cpu=True))
        images = torch.randint(0, 256, (3, 3, *sides(size)), dtype=torch.uint8)
        hidden = images / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        hidden = hidden / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        for layer in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):  # Simonyan & Zisserman 2015, table 1, column D
            hidden = max_pool2d(hidden, 2) if layer in (5, 10, 17, 24) else hidden
            weight, bias = weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"]
            hidden = conv2d(hidden, weight, bias, padding=1).relu()
        features, _ = extractor(images)
        assert features.shape == (3, 512)
        # Thirteen float32 layers of up to 4,608 products: 13 * sqrt(4608) * 2^-24 = 5e-5 of the largest.
        torch.testing.assert_close(features, hidden.mean((2, 3)), rtol=0, atol=1e-4 * features.abs().max().item())
