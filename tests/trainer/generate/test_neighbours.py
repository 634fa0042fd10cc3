"""Neighbours: the training images whose codes are nearest."""

import json

import numpy as np
import pytest
import torch
from generating import generate, pixels

from data.loader import read
from data.shards.reader import Shards
from trainer.generate.arguments import parser
from trainer.generate.command import _pictures
from trainer.generate.generator import Generator


def test_neighbours_are_those_of_an_exhaustive_search(digits, tiny_run, capsys, tmp_path):
    run, shards = tiny_run("VAE"), Shards(digits / "test")
    command = ["neighbours", run, "--images", digits / "test", "--train", digits / "test", "--nearest", 3]
    done = generate(capsys, *command, "--out", tmp_path / "many", "--num", 70)
    assert "70 PNGs written" in done.out, done.err
    few = generate(capsys, *command, "--out", tmp_path / "few", "--num", 2)
    assert few.returncode == 0, few.err
    codes = Generator(run, "neighbours").encoder(read(shards, np.arange(len(shards)), 32, 1).image)[0].double()
    lines = [json.loads(line) for line in (tmp_path / "many" / "neighbours.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"{i:06d}" for i in range(70)]
    for i in (0, 1, 69):
        distances = (codes - codes[i]).square().sum(1).sqrt()
        order = distances.argsort()[:3].tolist()
        found = lines[i]["neighbours"]
        assert [neighbour["image"] for neighbour in found] == [shards.name(position) for position in order]
        assert [neighbour["file"] for neighbour in found] == [shards.original(position) for position in order]
        # The sum of four squares, in another order.
        assert np.allclose([neighbour["distance"] for neighbour in found], distances[order], rtol=1e-15, atol=0)
        assert found[0]["distance"] == 0, "an image is its own neighbour"
        expected = read(shards, np.array([i, *order]), 32, 1).image[:, 0]
        assert torch.equal(pixels(tmp_path / "many" / f"{i:06d}.png"), torch.cat([*expected], 1))
    first = [(tmp_path / name / "neighbours.jsonl").read_text().splitlines()[:2] for name in ("many", "few")]
    assert first[0] == first[1]


@pytest.mark.parametrize(("given", "title", "num"), [(True, "given", 359), (False, "sample", 64)])
def test_a_picture_says_what_it_shows_and_a_grid_has_sixteen_rows(digits, tiny_run, tmp_path, given, title, num):
    command = ["neighbours", str(tiny_run("VAE")), "--out", str(tmp_path), "--nearest", "1", "--train_num", "9"]
    command += ["--images", str(digits / "test")] * given
    for options, rows in (([], num), (["--grid"], 16), (["--grid", "--num", "17"], 17)):
        settings = parser().parse_args([*command, *options])
        parts = [*_pictures(Generator(tiny_run("VAE"), "neighbours"), settings, [])]
        assert [*parts[0][1]] == [title, "1"]
        assert sum(len(names) for names, _ in parts) == rows


def test_draws_have_neighbours_in_the_runs_training_images(digits, tiny_run, capsys, tmp_path):
    run = tiny_run("VAE")
    done = generate(capsys, "neighbours", run, "--out", tmp_path, "--num", 2, "--nearest", 2, "--grid")
    assert done.returncode == 0, done.err
    assert {path.name for path in tmp_path.iterdir()} == {"neighbours.jsonl", "neighbours.png"}
    assert pixels(tmp_path / "neighbours.png").shape[:2] == (2 * 66 + 20 - 2, 3 * 66 - 2)
    line = json.loads((tmp_path / "neighbours.jsonl").read_text().splitlines()[0])
    assert all(str(digits / "train") in neighbour["image"] for neighbour in line["neighbours"])
    assert generate(capsys, "sample", run, "--out", tmp_path / "draws", "--num", 2).returncode == 0
    drawn = pixels(tmp_path / "draws" / "000001.png")[None, None]
    generator = Generator(run, "neighbours")
    everything = read(Shards(digits / "train"), np.arange(len(Shards(digits / "train"))), 32, 1).image
    mean, of_training = (generator.encoder(images)[0].double() for images in (drawn, everything))
    (second,) = [json.loads(line) for line in (tmp_path / "neighbours.jsonl").read_text().splitlines()[1:]]
    nearest = (of_training - mean).square().sum(1).min().sqrt().item()
    assert np.isclose(second["neighbours"][0]["distance"], nearest, rtol=1e-15, atol=0)
