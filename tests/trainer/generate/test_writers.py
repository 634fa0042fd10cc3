"""Films and shards of pictures."""

import sys

import imageio.v3
import numpy as np
import pytest
import torch
from generating import generate, pixels, strip
from PIL import Image, ImageSequence

from data.loader import read
from data.shards.reader import Shards
from trainer.generate import writers
from trainer.generate.writers import write_films


def test_a_gif_shows_the_pictures_of_the_strip(tiny_run, capsys, tmp_path):
    command = ["interpolate", tiny_run("GAN"), "--out", tmp_path, "--between", 2, 5, 3, "--steps", 4, "--classes", 1]
    for kind in ("png", "gif"):
        done = generate(capsys, *command, "--format", kind)
        assert f"1 {kind.upper()} written" in done.out, done.err
    film = ImageSequence.Iterator(Image.open(tmp_path / "2_to_5_to_3.gif"))
    frames = [torch.tensor(np.array(frame.convert("L"))) for frame in film]
    pictures = strip(tmp_path / "2_to_5_to_3.png")
    assert len(frames) == len(pictures) == 7
    for frame, picture in zip(frames, pictures, strict=True):
        assert torch.equal(frame, picture.repeat_interleave(8, 0).repeat_interleave(8, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_mp4_shows_the_pictures(tmp_path, channels):
    greys = [0, 128, 255, 64]
    flat = {str(i): torch.full((1, channels, 48, 48), grey, dtype=torch.uint8) for i, grey in enumerate(greys)}
    assert write_films(iter([(["film"], flat)]), tmp_path, "mp4", fps=10) == {tmp_path / "film.mp4"}
    found = imageio.v3.imread(tmp_path / "film.mp4", plugin="FFMPEG")
    assert found.shape == (4, 240, 240, 3)
    # H.264 keeps 219 levels of brightness, and rounds them and the colours that players show again.
    assert np.abs(found.astype(int) - np.array(greys)[:, None, None, None]).max() <= 4
    assert imageio.v3.immeta(tmp_path / "film.mp4", plugin="FFMPEG")["fps"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_an_mp4_says_what_it_needs(tiny_run, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    command = ["interpolate", tiny_run("GAN"), "--out", tmp_path / "out", "--between", 2, 5, "--classes", 1]
    done = generate(capsys, *command, "--format", "mp4")
    assert done.returncode == 2
    assert "--format mp4 needs imageio_ffmpeg, which is not installed: pip install 'vaegan-trainer[video]'" in done.err
    assert not (tmp_path / "out").exists()


def test_samples_are_written_as_shards(tiny_run, capsys, tmp_path):
    command = ["sample", tiny_run("GAN"), "--seed", 3]
    for name, num in (("some", 70), ("same", 70), ("fewer", 65)):
        done = generate(capsys, *command, "--num", num, "--shards", "--out", tmp_path / name)
        assert f"{num} images written" in done.out, done.err
    assert generate(capsys, *command, "--num", 70, "--out", tmp_path / "pngs").returncode == 0
    shards = Shards(tmp_path / "some")
    assert len(shards) == 70
    assert shards.name(69).endswith("00000.tar, member 000069.png")
    found = read(shards, np.arange(70), 32, 1).image[:, 0]
    assert all(torch.equal(found[i], pixels(tmp_path / "pngs" / f"{i:06d}.png")) for i in range(70))
    contents = {name: (tmp_path / name / "00000.tar").read_bytes() for name in ("some", "same", "fewer")}
    assert contents["some"] == contents["same"]
    end = Shards(tmp_path / "fewer").images(np.array([64]))[0][0]
    assert end == shards.image(64)
    again = generate(capsys, *command, "--num", 2, "--shards", "--out", tmp_path / "some")
    assert again.returncode == 2
    assert "exists and is not empty: name a new folder for --shards" in again.err
    assert len(Shards(tmp_path / "some")) == 70
    here = generate(capsys, *command, "--num", 2, "--shards", "--out", ".")
    assert "--out . is the working directory: name a new folder for --shards" in here.err


def test_unfinished_shards_are_not_left_behind(tiny_run, capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers, "encoded", full)
    done = generate(capsys, "sample", tiny_run("GAN"), "--num", 2, "--shards", "--out", tmp_path / "deep" / "out")
    assert done.returncode == 1, "there may be room later"
    assert "No space left on device" in done.err
    assert [*(tmp_path / "deep").iterdir()] == []
