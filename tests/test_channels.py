"""Images of colour and alpha, and of sixteen bits: from files through training and scores to pictures."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import KL, NETWORKS
from generating import generate
from PIL import Image

from data.arrays import array
from data.deep import encode_png, is_deep, read_deep
from data.images import COLOURS
from data.prepare import prepare
from models.augment import DRAWS, augment
from trainer.batch import normalize, to_pixels, to_uint8, visible_pixels
from trainer.encode.command import main as encode
from trainer.evaluate.command import main as evaluate
from trainer.log.pictures import encoded, grid, picture
from trainer.metrics.images import psnr, ssim


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


def test_numbers_of_sixteen_bits_pass_through_the_networks_range_unchanged():
    pixels = torch.arange(2**16).to(torch.uint16).view(1, 1, 256, 256)
    assert to_pixels(normalize(pixels), 16).equal(pixels)
    assert visible_pixels(pixels).equal(to_uint8(normalize(pixels)))
    assert ("png", encode_png(pixels[0].permute(1, 2, 0).numpy())) == encoded(pixels[0])


def test_sixteen_bits_are_scored_as_such():
    """One step of 65,536 in all pixels is 96 dB, which eight bits could not tell from none."""
    image = torch.randint(0, 65535, (2, 3, 16, 16)).to(torch.uint16)
    other = (image.int() + 1).to(torch.uint16)
    assert psnr(image, other).tolist() == pytest.approx([20 * math.log10(65535)] * 2)
    eight = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    wide = (eight.int() * 257).to(torch.uint16)
    assert psnr(wide, wide.flip(0)).tolist() == pytest.approx(psnr(eight, eight.flip(0)).tolist())


@pytest.mark.slow  # torchmetrics takes seconds to import
def test_structural_similarity_is_the_same_in_sixteen_bits():
    eight = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    wide = (eight.int() * 257).to(torch.uint16)
    assert ssim(wide, wide.flip(0)).tolist() == pytest.approx(ssim(eight, eight.flip(0)).tolist(), rel=1e-4)  # float32


def drawn_and_scored_again(capsys, run, tmp_path) -> tuple[dict, list[str]]:
    """Draw samples as shards and as a grid; return the run's last scores and what scoring it again prints."""
    made = generate(capsys, "sample", run, "--out", tmp_path / "drawn", "--num", 20, "--shards")
    assert made.returncode == 0, made.err
    made = generate(capsys, "sample", run, "--out", tmp_path / "grid", "--num", 9, "--grid")
    assert Image.open(tmp_path / "grid" / "sample.png").mode == "RGB"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    evaluate([str(run), "--num", "64", "--metrics", "fid", "--audit", "--json", "--out", str(tmp_path / "scored")])
    lines = capsys.readouterr().out.splitlines()
    again = json.loads(next(line for line in lines if line.startswith("{")))
    for name in ("eval/fid64/demo-random-v1", "eval/psnr16"):
        assert again.get(name) == last.get(name)
    return last, lines


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "bits"), [(4, 8), (1, 16), (4, 16)])
def test_a_system_learns_scores_and_writes_such_images(here, capsys, tmp_path, channels, bits):
    (tmp_path / "icons").mkdir()
    for i in range(40):
        pixels = np.zeros((32, 32, 4), np.uint8 if bits == 8 else np.uint16)
        pixels[4 : 8 + i % 20, 8:24] = [200, 5 * i, 100, 255]
        pixels = pixels * (1 if bits == 8 else 256)
        (tmp_path / "icons" / f"{i}.png").write_bytes(encode_png(pixels[..., 4 - channels :]))
    prepare(str(tmp_path / "icons"), tmp_path / "set", test_fraction=0.4)
    run = tmp_path / "run"
    command = ["--system", "VAEGAN", "--data.channels", channels, "--data.bits", bits]
    command += ["--data.train", tmp_path / "set" / "train", "--data.workers", "1"]
    command += ["--data.test", tmp_path / "set" / "test", "--system.binary.augment", "[color, cutout]"]
    command += ["--system.autoencoder.lr", "3e-3", "--system.kl_weight", "0.01"]
    command += ["--trainer.steps", "200", "--evaluate.every", "200", "--evaluate.num", "64"]
    command += ["--evaluate.extractor", "demo-random", "--evaluate.metrics", "[fid]", "--trainer.run_dir", run]
    done = here(*command, small=NETWORKS)
    assert done.returncode == 0, done.stderr
    look = f"{COLOURS[channels]}{', 16 bits a channel' * (bits == 16)}\n"
    assert f"32 x 32 pixels, {look}" in done.stderr
    made = generate(capsys, "reconstruct", run, "--images", tmp_path / "icons", "--out", tmp_path / "out")
    assert made.returncode == 0, made.err

    def pixels_of(path) -> np.ndarray:
        read = read_deep(path.read_bytes())
        return read if bits == 16 else (read // 257).astype(np.uint8)

    both = pixels_of(tmp_path / "out" / "9.png")
    assert both.shape == (32, 64, channels)
    assert (both[:, :32] == pixels_of(tmp_path / "icons" / "9.png")).all()
    assert bits == 8 or (both & 255).any(), "the low bits are written"
    high = both[..., -1] / np.iinfo(both.dtype).max
    assert high[6:12, 42:54].mean() > high[24:, 32:].mean() + 0.1, "it is learned"
    last, lines = drawn_and_scored_again(capsys, run, tmp_path)
    assert (last["channels"], last["bits"]) == (channels, bits)
    assert "audit: torch-fidelity agrees in 1 scores" in lines
    assert is_deep((tmp_path / "scored" / "000000.png").read_bytes()) == (bits == 16)
    latents = tmp_path / "latents"
    AcceleratorState._reset_state(reset_partial_state=True)
    encode([str(run), str(tmp_path / "set" / "test"), str(latents), "--workers", "0"])


def test_of_many_channels_the_first_three_are_shown_and_of_two_the_first():
    for channels, shown in (2, 1), (5, 3):
        images = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8)
        assert visible_pixels(images).equal(images[:, :shown])
        ending, content = encoded(images[0])
        assert ending == "npy"
        assert (array(content) == images[0].permute(1, 2, 0).numpy()).all()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "networks"), [(8, NETWORKS), (16, KL)])
def test_a_system_learns_scores_and_writes_images_of_five_channels(here, capsys, tmp_path, bits, networks):
    rng = np.random.default_rng(0)
    (tmp_path / "scenes").mkdir()
    for i in range(40):
        pixels = np.full((32, 32, 5), 2 ** (bits - 3), f"uint{bits}")
        pixels[4 : 8 + i % 20, 8:24] = rng.integers(2 ** (bits - 1), 2**bits, 5)
        np.save(tmp_path / "scenes" / f"{i}.npy", pixels)
    prepare(str(tmp_path / "scenes"), tmp_path / "set", test_fraction=0.4)
    run = tmp_path / "run"
    command = ["--system", "VAEGAN", "--data.channels", "5", "--data.bits", bits, "--data.flip", "true"]
    command += ["--data.train", tmp_path / "set" / "train", "--data.workers", "1"]
    command += ["--data.test", tmp_path / "set" / "test", "--system.binary.augment", "[color, cutout]"]
    command += ["--trainer.steps", "20", "--evaluate.every", "20", "--evaluate.num", "64"]
    command += ["--evaluate.extractor", "demo-random", "--evaluate.metrics", "[fid]", "--trainer.run_dir", run]
    done = here(*command, small=networks)
    assert done.returncode == 0, done.stderr
    assert f"32 x 32 pixels, 5 channels{', 16 bits a channel' * (bits == 16)}\n" in done.stderr
    whole = ["--whole"] if networks is KL else []
    made = generate(capsys, "reconstruct", run, "--images", tmp_path / "scenes", "--out", tmp_path / "out", *whole)
    assert made.out.startswith(f"{tmp_path / 'out'}: 40 NPYs written, by "), made.err
    both = np.load(tmp_path / "out" / "9.npy")
    assert (both.shape, both.dtype) == ((32, 64, 5), f"uint{bits}")
    assert (both[:, :32] == np.load(tmp_path / "scenes" / "9.npy")).all()
    drawn_and_scored_again(capsys, run, tmp_path)
    assert np.load(tmp_path / "scored" / "000000.npy").shape == (32, 32, 5)
    AcceleratorState._reset_state(reset_partial_state=True)
    against = ["--against", str(tmp_path / "set" / "test"), "--extractor", "demo-random", "--metrics", "fid"]
    evaluate([str(tmp_path / "scored"), *against, "--json"])  # as a folder of images
    scored = json.loads(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("{")))
    assert scored["channels"] == 5
    AcceleratorState._reset_state(reset_partial_state=True)
    encode([str(run), str(tmp_path / "set" / "test"), str(tmp_path / "latents"), "--workers", "0", "--format", "npy"])
