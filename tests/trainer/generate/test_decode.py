"""Images of latents that `python -m trainer.encode` wrote."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from generating import generate, pixels

from data.loader import read
from data.shards.reader import Shards, write
from trainer.encode.command import main as encode

N = 70  # images: a block and a part of one


@pytest.fixture(scope="module")
def photos(digits, tmp_path_factory):
    source, folder = Shards(digits / "test"), tmp_path_factory.mktemp("decode") / "photos"
    write(folder, ({"__key__": f"{i:03d}", "png": source.image(i)} for i in range(N)))
    return folder


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_decoded_latents_are_the_reconstructions(tiny_run, photos, capsys, tmp_path, form):
    run, latents = tiny_run("VAEGAN"), tmp_path / "latents"
    AcceleratorState._reset_state(reset_partial_state=True)
    options = ["--dtype", "fp32", "--format", form, "--workers", "0"]
    encode([*map(str, (run, photos, latents)), *options])
    AcceleratorState._reset_state(reset_partial_state=True)
    made = generate(capsys, "decode", run, latents / "photos", "--out", tmp_path / "decoded")
    assert made.out.startswith(f"{tmp_path / 'decoded'}: {N} PNGs written, by "), made.err
    assert generate(capsys, "reconstruct", run, "--images", photos, "--out", tmp_path / "both").returncode == 0
    for i in range(N):
        both = pixels(tmp_path / "both" / f"{i:06d}.png")
        assert torch.equal(pixels(tmp_path / "decoded" / f"{i:06d}.png"), both[:, 32:])
    if form == "npy":
        return
    shards = ["decode", run, latents / "photos", "--out", tmp_path / "shards", "--shards"]
    assert generate(capsys, *shards).returncode == 0
    decoded = read(Shards(tmp_path / "shards"), np.arange(N), 32, 1).image
    assert torch.equal(decoded[N - 1, 0], pixels(tmp_path / "decoded" / f"{N - 1:06d}.png"))
    for system, folder, words in (
        ("VAEGAN", photos, "member 000.png: it holds no latents"),
        ("VAEGAN", latents, f"but {latents / 'photos'}"),
        ("CycleGAN", latents / "photos", "CycleGAN cannot decode"),
    ):
        refused = generate(capsys, "decode", tiny_run(system), folder, "--out", tmp_path / "none")
        assert refused.returncode == 2
        assert words in refused.err
    inside = generate(capsys, "decode", run, latents / "photos", "--out", latents / "photos" / "out")
    assert "lies in LATENTS" in inside.err


def test_latents_of_other_networks_are_refused(tiny_run, capsys, tmp_path):
    for name, array, words in (
        ("other", np.zeros((1, 1, 5), np.float32), "its latents are [5], and the system's [4]"),
        ("huge", np.full((1, 1, 4), np.nan, np.float32), "not finite"),
    ):
        write(tmp_path / name, [{"__key__": "a", "npy": array}])
        done = generate(capsys, "decode", tiny_run("VAEGAN"), tmp_path / name, "--out", tmp_path / "none")
        assert done.returncode == 2
        assert f"{tmp_path / name / '00000.tar'}, member a.npy: " in done.err
        assert words in done.err
