"""Images of colour and alpha: from files through training and scores to pictures."""

import json

import numpy as np
import pytest
import torch
from conftest import NETWORKS
from generating import generate
from PIL import Image

from data.prepare import prepare
from models.augment import DRAWS, augment
from trainer.batch import visible_pixels
from trainer.evaluate.command import main as evaluate
from trainer.log.pictures import grid, picture


def rgba(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)


def test_transparent_images_are_shown_over_white():
    """As Pillow lays them, within its rounding of each of two products."""
    pixels = rgba(9, 9)
    white = Image.new("RGBA", (9, 9), "white")
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(pixels)).convert("RGB")).astype(int)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    shown = visible_pixels(images)[0].permute(1, 2, 0).numpy()
    assert np.abs(shown - expected).max() <= 1
    drawn = np.asarray(grid({"": images}, 1, pixels=1))[20:29, :9]
    assert (drawn == shown).all()
    assert (np.asarray(picture(images[0])) == pixels).all(), "a picture of its own keeps alpha"
    for channels in (1, 3):
        assert visible_pixels(images[:, :channels]).equal(images[:, :channels])


def test_colours_change_under_augmentation_and_alpha_does_not():
    image, u = torch.rand(2, 4, 8, 8), torch.rand(2, DRAWS)
    changed = augment(image, ("color",), u)
    assert changed[:, 3].equal(image[:, 3])
    assert changed[:, :3].equal(augment(image[:, :3], ("color",), u))


@pytest.mark.slow
def test_a_system_learns_scores_and_writes_transparent_images(here, capsys, tmp_path):
    (tmp_path / "icons").mkdir()
    for i in range(40):
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[4 : 8 + i % 20, 8:24] = [200, 5 * i, 100, 255]
        Image.fromarray(pixels).save(tmp_path / "icons" / f"{i}.png")
    prepare(str(tmp_path / "icons"), tmp_path / "set", test_fraction=0.4)
    run = tmp_path / "run"
    command = ["--system", "VAEGAN", "--data.channels", "4", "--data.train", tmp_path / "set" / "train"]
    command += ["--data.test", tmp_path / "set" / "test", "--system.binary.augment", "[color, cutout]"]
    command += ["--system.autoencoder.lr", "3e-3", "--system.kl_weight", "0.01"]
    command += ["--trainer.steps", "200", "--evaluate.every", "200", "--evaluate.num", "64"]
    command += ["--evaluate.extractor", "demo-random", "--evaluate.metrics", "[fid]", "--trainer.run_dir", run]
    done = here(*command, small=NETWORKS)
    assert done.returncode == 0, done.stderr
    assert "32 x 32 pixels, colour and alpha" in done.stderr
    made = generate(capsys, "reconstruct", run, "--images", tmp_path / "icons", "--out", tmp_path / "out")
    assert made.returncode == 0, made.err
    both = np.asarray(Image.open(tmp_path / "out" / "9.png"))
    assert both.shape == (32, 64, 4)
    assert (both[:, :32] == np.asarray(Image.open(tmp_path / "icons" / "9.png"))).all()
    assert both[6:12, 42:54, 3].mean() > both[24:, 32:, 3].mean() + 20, "alpha is learned"
    made = generate(capsys, "sample", run, "--out", tmp_path / "drawn", "--num", 20, "--shards")
    assert made.returncode == 0, made.err
    made = generate(capsys, "sample", run, "--out", tmp_path / "grid", "--num", 9, "--grid")
    assert Image.open(tmp_path / "grid" / "sample.png").mode == "RGB"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    evaluate([str(run), "--num", "64", "--metrics", "fid", "--audit", "--out", str(tmp_path / "scored")])
    lines = capsys.readouterr().out.splitlines()
    again = json.loads(next(line for line in lines if line.startswith("{")))
    assert again["eval/fid64/demo-random-v1"] == last["eval/fid64/demo-random-v1"]
    assert "audit: torch-fidelity agrees in 1 scores" in lines
    assert Image.open(tmp_path / "scored" / "000000.png").mode == "RGBA"
