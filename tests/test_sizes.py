"""Sizes of the real world: images that are not square through a whole run, and networks of the largest sizes."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import CYCLE, NETWORKS
from generating import generate, pixels
from PIL import Image

from data.shards.reader import Shards
from models import AE, VAEGAN, NetworkConfig
from models.networks.config import LARGEST
from trainer.encode.command import main as encode
from trainer.evaluate.command import main as evaluate
from trainer.log.pictures import COLUMNS

HEIGHT, WIDTH = 32, 48
SCORED = ["--trainer.steps", "2", "--evaluate.every", "2", "--evaluate.num", "32", "--evaluate.metrics", "[fid]"]
SCORED += ["--evaluate.extractor", "demo-random", "--data.size", f"[{HEIGHT}, {WIDTH}]"]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["VAEGAN", "CycleGAN"])
def test_images_that_are_not_square_are_learnt_scored_drawn_and_encoded(here, capsys, digits, tmp_path, system):
    run, few = tmp_path / "run", tmp_path / "few"
    sets = [part if system == "VAEGAN" else f"[{part}, {part}]" for part in (digits / "train", digits / "test")]
    networks = NETWORKS if system == "VAEGAN" else CYCLE
    data = ["--data.train", sets[0], "--data.test", sets[1]]
    done = here("--system", system, *data, *SCORED, "--trainer.run_dir", run, small=networks)
    assert done.returncode == 0, done.stderr
    assert f"{HEIGHT} x {WIDTH} pixels" in done.stderr
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    (grid,) = (run / "samples").glob("*2.png")
    assert Image.open(grid).width == COLUMNS * (WIDTH + 2) - 2
    few.mkdir()
    for i in range(3):
        (few / f"{i}.png").write_bytes(Shards(digits / "test").image(i))
    command = ["reconstruct"] if system == "VAEGAN" else ["translate", "--direction", "a2b"]
    made = generate(capsys, *command, run, "--images", few, "--out", tmp_path / "pairs")
    assert made.returncode == 0, made.err
    assert pixels(tmp_path / "pairs" / "0.png").shape[:2] == (HEIGHT, 2 * WIDTH)
    AcceleratorState._reset_state(reset_partial_state=True)
    drawn = ["--num", "32", "--metrics", "fid", "--audit", "--out", str(tmp_path / "scored")]
    evaluate([str(run), "--json", *(drawn if system == "VAEGAN" else [])])
    lines = capsys.readouterr().out.splitlines()
    again = json.loads(next(line for line in lines if line.startswith("{")))
    scores = {key for key in again if key.startswith("eval/") and "fid" in key}
    assert scores
    assert {key: again[key] for key in scores} == pytest.approx({key: last[key] for key in scores}, rel=1e-9)
    if system == "VAEGAN":
        assert "audit: torch-fidelity agrees in 1 scores" in lines
        assert pixels(tmp_path / "scored" / "000000.png").shape == (HEIGHT, WIDTH)
        AcceleratorState._reset_state(reset_partial_state=True)
        encode([str(run), str(digits / "test"), str(tmp_path / "latents"), "--workers", "0"])
        described = json.loads((tmp_path / "latents" / "dataset.json").read_text())
        assert described["settings"]["size"] == [HEIGHT, WIDTH]


@pytest.mark.parametrize("size", [512, LARGEST, (LARGEST, 768)])
@pytest.mark.parametrize("family", ["dcgan", "residual"])
def test_networks_take_the_largest_sizes(family, size):
    height, width = (size, size) if isinstance(size, int) else size
    blocks = {"blocks": 1} if family == "residual" else {}
    maps = VAEGAN(size, 3, 4, NetworkConfig(family, 2, **blocks, latent_stride=16, patches=True))
    whole = AE(size, 1, 4, NetworkConfig(family, 1, **blocks))
    with torch.no_grad():
        image = torch.rand(1, 3, height, width) * 2 - 1
        assert maps.reconstruct(image, None).shape == image.shape
        assert maps.discriminator_binary(image).shape[0] == 1
        assert whole.reconstruct(image[:, :1], None).shape == (1, 1, height, width)
    assert np.prod(maps.latent_shape) == 4 * height * width // 256
