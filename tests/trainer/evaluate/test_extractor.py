"""Extractors from files and from torch-fidelity's registry, and LPIPS; nothing is downloaded."""

import hashlib
import io
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from evaluators import Playback, random_inception
from PIL import Image
from systems_under_test import SMALL
from torch import nn

from data.loader import read
from data.shards.reader import Shards, write
from models import VAE
from trainer.batch import to_uint8
from trainer.config.settings import DataConfig, EvaluateConfig
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.extractors.build import build_extractor
from trainer.evaluate.extractors.demo_cnn import demo_random, fit, is_fit, start_fit
from trainer.evaluate.extractors.inception import inception
from trainer.evaluate.extractors.lpips import LPIPS

DATA = DataConfig("", None, 32, 3, 0)


class Small(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.logits = logits

    def forward(self, image):
        features = self.convolution(image.float() / 255).mean((2, 3))
        return (features, self.head(features)) if self.logits else features


class Beside(nn.Module):
    """As batch normalization is in training mode."""

    def forward(self, image: torch.Tensor):
        features = image.float().mean((2, 3))
        return features - features.mean(0)


def extractor(kind, weights=None):
    return build_extractor(EvaluateConfig(extractor=kind, weights=weights), DATA, None, [], [], Accelerator(cpu=True))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("logits", [False, True])
def test_a_network_from_a_file(tmp_path, logits):
    network, images = Small(logits).eval(), torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    torch.jit.trace(network, images).save(tmp_path / "scripted.pt")
    count = torch.export.Dim("count", min=1, max=64)
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=({0: count},)), tmp_path / "own.pt2")
    expected = network(images)
    for name in ("scripted.pt", "own.pt2"):
        found = extractor("file", str(tmp_path / name))
        assert (found.dim, found.classes) == (8, 5 if logits else 0)
        assert found.name == f"{name.partition('.')[0]}-{found.sha256[:8]}"
        features, told = found(images)
        torch.testing.assert_close(features, expected[0] if logits else expected)
        if logits:
            torch.testing.assert_close(told, expected[1])
        assert found(images[:1, :1])[0].shape == (1, 8)  # grey


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_files_that_are_no_extractor_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("nothing")
    torch.jit.trace(nn.Flatten(0), torch.zeros(2, 3)).save(tmp_path / "flat.pt")
    torch.jit.script(Beside()).save(tmp_path / "training.pt")
    for weights, words in (
        (None, "name a file of TorchScript or torch.export"),
        (str(tmp_path / "none.pt"), "cannot be read: No such file"),
        (str(tmp_path / "text.pt"), "neither a TorchScript file nor"),
        (str(tmp_path / "flat.pt"), "is not an extractor"),
        (str(tmp_path / "training.pt"), "the features of an image depend on the other images: export it in eval mode"),
    ):
        with pytest.raises(ValueError, match=words):
            extractor("file", weights)


def test_dinov2_sees_images_as_pillow_resizes_them(monkeypatch):
    seen = []

    class Vision(nn.Module):
        def forward(self, image):
            seen.append(image)
            return image.mean((2, 3))

    monkeypatch.setattr("torch.hub.load", lambda *_, **__: Vision())
    found = extractor("dinov2-vit-l-14")
    assert (found.name, found.dim, found.classes) == ("dinov2-vit-l-14", 3, 0)
    noise = torch.rand(1, 3, 40, 40)  # smooth once it is enlarged: where its filter overshoots, Pillow clips in between
    image = (nn.functional.interpolate(noise, (300, 300), mode="bilinear")[0] * 255).to(torch.uint8)
    found(image[None])
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    shown = seen[-1][0] * std + mean
    assert (shown - pixels).abs().max() < 1.5 / 255


def test_registered_extractors_that_cannot_be_had_are_told(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load", offline)
    with pytest.raises(
        ValueError, match=r"is not available: OSError: no route to host.*trainer\.prefetch dinov2-vit-s-14"
    ):
        extractor("dinov2-vit-s-14")
    with pytest.raises(ValueError, match="expected inception, demo-cnn, demo-random, file, or one of"):
        extractor("resnet")
    with pytest.raises(ValueError, match=r"evaluate\.weights has no effect while evaluate\.extractor is"):
        extractor("dinov2-vit-s-14", "somewhere")


def test_lpips_is_torchmetrics(vgg16, torchmetrics_lpips):
    a, b = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    found = LPIPS(str(vgg16), torch.device("cpu"))(a, b)
    expected = torchmetrics_lpips(a / 127.5 - 1, b / 127.5 - 1).flatten()
    assert found.shape == (3,)
    # Thirteen float32 layers of up to 4,608 products: 13 * sqrt(4608) * 2^-24, and twice that of squared differences.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert (LPIPS(str(vgg16), torch.device("cpu"))(a, a) == 0).all()


def test_prefetch_fills_the_cache_with_what_is_the_published_file_only(tmp_path, monkeypatch, capsys):
    """From a file, as from a server: weights that are not the published ones are not kept."""
    from trainer.prefetch import main

    (tmp_path / "served.pth").write_bytes(b"other weights")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3", f"file://{tmp_path / 'served.pth'}"
    )
    for name, words in (("inception", "invalid hash value"), ("resnet", "expected inception, demo-cnn")):
        with pytest.raises(SystemExit) as stopped:
            main([name])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    monkeypatch.setattr(
        "trainer.evaluate.extractors.inception.INCEPTION_SHA256", hashlib.sha256(b"other weights").hexdigest()[:8]
    )
    with pytest.raises(SystemExit):
        main(["inception"])
    assert "does not hold the weights" in capsys.readouterr().err
    (kept,) = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert kept.name == "weights-inception-2015-12-05-6726825d.pth"

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("LOCAL_RANK", "1")  # one process a machine fetches; this one is another
    with pytest.raises(ValueError, match="another process of this machine could not download them"):
        inception(None)
    assert not (tmp_path / "other").exists()
    monkeypatch.delenv("LOCAL_RANK")

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, image):
            return image.mean((2, 3)) * self.scale

    monkeypatch.setattr("torch.hub.load", lambda *_, **__: Vision())
    main(["dinov2-vit-s-14"])
    assert "dinov2-vit-s-14: in " in capsys.readouterr().out


def test_demo_cnn_is_the_same_when_trained_again(data, tmp_path):
    for name in ("one", "again"):
        fit([Shards(data.train)], [Shards(data.test)], data, tmp_path / name, steps=20)
        torch.rand(1)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.slow  # it trains networks for seconds
def test_a_process_beside_the_run_trains_the_same_demo_cnn(data, tmp_path, capfd):
    """One whose network is not good enough leaves no file, and says nothing: the run meets the same error."""
    train, test = [Shards(data.train)], [Shards(data.test)]
    for steps in (60, 1):
        process = start_fit(train, test, data, tmp_path / f"{steps}", 20_000, steps)
        process.join()
        assert process.exitcode == 0
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["60"]
    assert is_fit(tmp_path / "60", train, test, data)


@pytest.mark.slow  # it trains networks for seconds
def test_a_demo_cnn_of_other_data_is_not_taken_for_this_datas(data, demo_cnn, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evaluate.extractors.demo_cnn.fit", partial(fit, steps=2))
    monkeypatch.setattr("trainer.evaluate.extractors.demo_cnn.MIN_ACCURACY", 0)
    kept = tmp_path / "demo-cnn-v1.safetensors"
    kept.write_bytes(demo_cnn.read_bytes())
    settings, accelerator = EvaluateConfig(extractor="demo-cnn"), Accelerator(cpu=True)
    train, test = Shards(data.train), Shards(data.test)
    build_extractor(settings, data, tmp_path, [train], [test], accelerator)
    assert kept.read_bytes() == demo_cnn.read_bytes()
    images = zip(map(train.image, range(len(train) - 1)), train.labels.tolist(), strict=False)
    samples = ({"__key__": f"{i}", "png": image, "cls": str(label)} for i, (image, label) in enumerate(images))
    write(tmp_path / "other", samples)
    train = Shards(tmp_path / "other")
    build_extractor(settings, data, tmp_path, [train], [test], accelerator)
    assert kept.read_bytes() != demo_cnn.read_bytes()


def noise(labelled):
    generator = np.random.default_rng(0)
    for i in range(200):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (32, 32), np.uint8)).save(file, "PNG")
        sample = {"__key__": str(i), "png": file.getvalue()}
        yield sample | ({"cls": str(i % 5)} if labelled else {})


def test_demo_cnn_refuses_data_it_cannot_name(tmp_path):
    data = DataConfig("", None, 32, 1, 0)
    for kind, words in ((False, "needs a label"), (True, "held-out images correctly")):
        write(tmp_path / str(kind), noise(kind))
        shards = Shards(tmp_path / str(kind))
        with pytest.raises(ValueError, match=words):
            fit([shards], [shards], data, tmp_path / "never", steps=5)
    assert not (tmp_path / "never").exists()


def test_demo_random_is_the_same_for_the_same_data_and_leaves_the_training_randomness(data):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = demo_random([Shards(data.train)], data)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    second = demo_random([Shards(data.train)], data)
    assert first.sha256 == second.sha256
    assert all(torch.equal(a, second.state_dict()[name]) for name, a in first.state_dict().items())
    train = read(Shards(data.train), np.arange(1438), 32, 1).image
    assert first(train)[0].var(0).mean().item() == pytest.approx(1, abs=1e-3)
    assert first.sha256 != demo_random([Shards(data.test)], data).sha256


def test_demo_randoms_fid_grows_with_blur_and_noise_and_is_its_only_score_of_samples(data):
    extractor = demo_random([Shards(data.train)], data).eval().requires_grad_(False)
    evaluator = Evaluator(
        Accelerator(cpu=True), extractor, [Shards(data.test)], data, num=359, seed=0, system=VAE(32, 1, 4, SMALL)
    )
    train = read(Shards(data.train), np.arange(359), 32, 1).image
    blurs = [train, *(to_uint8(box(train.float() / 127.5 - 1, size)) for size in (3, 5, 9))]
    noises = [(train + deviation * torch.randn(train.shape)).clamp(0, 255).byte() for deviation in (0, 20, 40, 80)]
    for images in (blurs, noises):
        scores = [evaluator(Playback(image)) for image in images]
        fids = [score["eval/fid359/demo-random-v1"] for score in scores]
        assert 0 < fids[0] < fids[1] < fids[2] < fids[3]
        assert fids[3] > 3 * fids[0]
        assert scores[0]["eval/rfid359/demo-random-v1"] < 1e-6
        assert not any(name.startswith("eval/is") for name in scores[0])
    assert "is no classifier, as are inception and, for images with labels, demo-cnn" in evaluator.missing


def box(image, size):
    return torch.nn.functional.avg_pool2d(image, size, 1, size // 2, count_include_pad=False)


def test_demo_random_needs_no_labels_and_takes_no_weights(tmp_path):
    write(tmp_path / "unlabelled", noise(False))
    shards, data, accelerator = Shards(tmp_path / "unlabelled"), DataConfig("", None, 32, 1, 0), Accelerator(cpu=True)
    settings = EvaluateConfig(extractor="demo-random")
    extractor = build_extractor(settings, data, tmp_path, [shards], [shards], accelerator)
    assert (extractor.name, extractor.training) == ("demo-random-v1", False)
    settings.weights = "somewhere"
    with pytest.raises(ValueError, match=r"evaluate\.weights has no effect while evaluate\.extractor is"):
        build_extractor(settings, data, tmp_path, [shards], [shards], accelerator)


def test_inception_reads_a_weight_file_and_says_that_it_is_not_the_known_one(tmp_path, monkeypatch):
    """The path that real weights take."""
    path = tmp_path / "weights.pth"
    random_inception(path)
    extractor = inception(str(path)).eval()
    assert extractor.name.startswith("inception-v3-weights-")
    features, logits = extractor(torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8))
    assert features.shape == (2, extractor.dim)
    assert logits.shape == (2, extractor.classes)
    (tmp_path / "other.pth").write_bytes(b"nothing")
    monkeypatch.setattr(
        "trainer.evaluate.extractors.inception.INCEPTION_SHA256", extractor.sha256[:8]
    )  # as the published file's would be
    assert inception(str(path)).name == "inception-v3"
    with pytest.raises(ValueError, match="does not hold the weights"):
        inception(str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="does not exist"):
        inception(str(tmp_path / "nowhere.pth"))


def test_inception_without_weights_and_network_says_where_the_file_goes(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens: a machine without network
    train, test = Shards(data.train), Shards(data.test)
    with pytest.raises(ValueError, match=r"weights-inception-2015-12-05-6726825d\.pth") as raised:
        build_extractor(EvaluateConfig(extractor="inception"), data, tmp_path, [train], [test], Accelerator(cpu=True))
    assert str(tmp_path) in str(raised.value)
    assert "demo-cnn" in str(raised.value)
