"""Extractors from files and from torch-fidelity's registry, and LPIPS; nothing is downloaded."""

import hashlib

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from trainer.config.settings import DataConfig, EvaluateConfig
from trainer.evaluate.extractors.build import build
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
    return build(EvaluateConfig(extractor=kind, weights=weights), DATA, None, [], [], Accelerator(cpu=True))


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
        (None, "name a TorchScript file"),
        (str(tmp_path / "none.pt"), "cannot be read: No such file"),
        (str(tmp_path / "text.pt"), "neither a TorchScript file nor"),
        (str(tmp_path / "flat.pt"), "is not an extractor"),
        (str(tmp_path / "training.pt"), "features depend on those beside it: export it in eval mode"),
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
        ValueError, match=r"cannot be had: OSError: no route to host.*trainer\.prefetch dinov2-vit-s-14"
    ):
        extractor("dinov2-vit-s-14")
    with pytest.raises(ValueError, match="expected inception, demo-cnn, demo-random, file, or one of"):
        extractor("resnet")
    with pytest.raises(ValueError, match=r"evaluate\.weights has no effect"):
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
