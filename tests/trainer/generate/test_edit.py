"""Edits: the direction is the difference of mean codes, and images move along it."""

import math

import numpy as np
import pytest
import torch
from generating import generate, pixels
from sample_images import flat

from data.loader import read
from data.prepare import prepare
from data.shards.reader import Shards
from trainer.batch import to_uint8
from trainer.draws import prior
from trainer.generate import edit
from trainer.generate.edit import attribute_vector
from trainer.generate.generator import Generator


@pytest.fixture
def generator(tiny_run) -> Generator:
    return Generator(tiny_run("VAE"), "edit")


def by_hand(generator, images, having, lacking=None) -> torch.Tensor:
    everything = read(images, np.arange(len(images)), 32, 1)
    mean = generator.encoder(everything.image)[0].double()
    has = everything.label == having
    lacks = ~has if lacking is None else everything.label == lacking
    return mean[has].mean(0) - mean[lacks].mean(0)


@pytest.mark.parametrize(("having", "lacking"), [("3", None), ("1", "0")])
def test_the_direction_is_the_difference_of_mean_codes(generator, digits, having, lacking):
    images = Shards(digits / "train")
    found = attribute_vector(generator, images, having, lacking, None)
    expected = by_hand(generator, images, int(having), lacking and int(lacking))
    # A float64 sum of 1,400 numbers near 1.
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert found.norm() > 1e-3


def test_the_mean_is_exact_whatever_the_blocks(generator, digits, monkeypatch):
    """Given the same codes, from e^-20 to e^20; a convolution would round differently in blocks of another size."""
    images = Shards(digits / "test")
    monkeypatch.setattr(generator.system, "posterior", lambda image: 2 * [(20 * image.flatten(1)[:, 500:504]).exp()])
    whole = attribute_vector(generator, images, "3", None, None)
    generator.block = generator.encoder.block = 7
    assert torch.equal(attribute_vector(generator, images, "3", None, None), whole)
    assert not torch.equal(attribute_vector(generator, images, "3", None, 100), whole)
    everything = read(images, np.arange(len(images)), 32, 1)
    codes = generator.encoder(everything.image)[0].double()
    sides = [codes[side].T.tolist() for side in (everything.label == 3, everything.label != 3)]
    means = torch.tensor([[math.fsum(column) / len(column) for column in side] for side in sides], dtype=torch.float64)
    # Each sum and each quotient is rounded once.
    assert ((means[0] - means[1]) - whole).abs().le(2**-52 * means.sum(0)).all()


def test_images_move_along_the_direction(generator, digits, capsys, tmp_path, tiny_run):
    run, images = tiny_run("VAE"), ["--images", digits / "test"]
    edits = ["edit", run, "--with", "1", "--without", "0", "--strengths", "-2", "0", "1.5"]
    assert generate(capsys, *edits, *images, "--out", tmp_path / "few", "--num", 2).returncode == 0
    many = generate(capsys, *edits, *images, "--out", tmp_path / "many", "--num", 70)
    assert "70 PNGs written" in many.out, many.err
    strip = pixels(tmp_path / "many" / "000001.png")
    assert torch.equal(strip, pixels(tmp_path / "few" / "000001.png"))
    again = generate(capsys, "reconstruct", run, *images, "--out", tmp_path / "plain", "--num", 2)
    assert again.returncode == 0, again.err
    original, less, same, more = strip.split(32, 1)
    assert torch.equal(torch.cat([original, same], 1), pixels(tmp_path / "plain" / "000001.png"))
    direction = attribute_vector(generator, Shards(digits / "train"), "1", "0", None)
    block = read(Shards(digits / "test"), np.arange(64), 32, 1).image
    mean = generator.encoder(block)[0].double()
    for strength, image in (-2, less), (1.5, more):
        made = to_uint8(generator.system.sample((mean + strength * direction).float()))
        assert torch.equal(image, made[1, 0])


def test_draws_are_edited_too(generator, capsys, tmp_path, tiny_run):
    run = tiny_run("VAE")
    done = generate(capsys, "edit", run, "--with", "1", "--num", 2, "--seed", 5, "--out", tmp_path / "edits")
    assert "2 PNGs written" in done.out, done.err
    done = generate(capsys, "sample", run, "--num", 2, "--seed", 5, "--out", tmp_path / "draws")
    less, same, more = pixels(tmp_path / "edits" / "000001.png").split(32, 1)
    assert torch.equal(same, pixels(tmp_path / "draws" / "000001.png"))
    z = prior(5, torch.arange(64), generator.system.latent_shape)
    direction = attribute_vector(generator, Shards(generator.data.trains[0]), "1", None, None)
    made = to_uint8(generator.system.sample((z.double() + direction).float()))
    assert torch.equal(more, made[1, 0])
    assert not torch.equal(less, more)
    grid = generate(capsys, "edit", run, "--with", "1", "--num", 3, "--grid", "--out", tmp_path / "grid")
    assert "1 PNG written" in grid.out, grid.err
    height, width, _ = pixels(tmp_path / "grid" / "edit.png").shape
    assert (width, height) == (3 * 66 - 2, 3 * 66 + 20 - 2)


def test_labels_may_be_named(generator, tmp_path):
    for i, name in enumerate(("cats", "dogs")):
        for split in ("train", "test"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            (tmp_path / "pets" / split / name / "0.png").write_bytes(flat(100 * i))
    prepare(str(tmp_path / "pets"), tmp_path / "shards")
    images = Shards(tmp_path / "shards" / "train")
    named = attribute_vector(generator, images, "dogs", "cats", None)
    assert torch.equal(named, attribute_vector(generator, images, "1", "0", None))
    indexed = Shards(tmp_path / "shards" / "train" / "index.json")
    assert torch.equal(attribute_vector(generator, indexed, "dogs", "cats", None), named)
    with pytest.raises(ValueError, match="--with cows: expected the number of a label or one of cats, dogs"):
        attribute_vector(generator, images, "cows", None, None)
    with pytest.raises(ValueError, match="--without cats is the label of --with"):
        attribute_vector(generator, images, "0", "cats", None)


def test_where_names_are_numbers_a_number_is_a_name(tmp_path):
    for name in ("1", "2", "10"):  # whose labels are 0, 2 and 1, as names are sorted as text
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(flat(100))
    prepare(str(tmp_path / "images"), tmp_path / "shards", test_fraction=0)
    images = Shards(tmp_path / "shards" / "train")
    assert [edit._label(images, "with", given) for given in ("1", "2", "10")] == [0, 2, 1]
    with pytest.raises(ValueError, match="--with 0: expected one of 1, 10, 2"):
        edit._label(images, "with", "0")
