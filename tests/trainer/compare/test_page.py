"""The page of a comparison shows all names as text, and leaves out what is not there."""

from types import SimpleNamespace

import pytest
import torch

from trainer.compare import page
from trainer.compare.results import Entry
from trainer.config.settings import DataConfig

SETTINGS = {
    "trainer": {"steps": 1000, "batch_size": 8},
    "evaluate": {"num": 64},
    "compare": {"seeds": [0], "systems": {"<i>": {"class_path": "VAE"}}},
}


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Write a page of entries with made-up scores and images; returns its text."""
    image = torch.zeros(24, 1, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(page, "draw_panels", lambda entry, data: {"real": image, "generated": image})

    def write(entries: list[Entry], failed: dict[str, str]) -> str:
        page.write_page(entries, failed, DataConfig("digits/train", "digits/test"), SETTINGS, tmp_path)
        return (tmp_path / "index.html").read_text()

    return write


def entry(name: str, **scores: float) -> Entry:
    last = {"step": 1000, "extractor": "demo-cnn-v1", "held_out_images": 359}
    return Entry(name, "VAE", runs=[SimpleNamespace(seed=0, evaluations=[last], logs=[], scores=scores)])


def test_no_text_becomes_markup(write):
    text = write([entry("<script>alert(1)</script>", fid=3.0)], {"<img src=x>, seed 0": "</div><script>"})
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "<i>" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2  # beside its scores and above its images
    assert "1 run failed" in text
    assert "1 systems" not in text


def test_a_page_of_one_evaluation_has_no_curves_and_no_claims(write):
    text = write([entry("VAE", fid=3.0), Entry("GAN", "GAN")], {})
    assert "2 systems on digits" in text
    assert "1,000 steps of 8 images of 32 by 32 pixels, from 1 seed." in " ".join(text.split())
    assert "failed" not in text.partition("<body>")[2]
    assert text.count("<img") == 1
    assert not any(title in text for title in ("What the scores show", "Training</h2>", "ternary discriminators"))
