"""Shards are ordinary WebDataset; batches are a pure function of the step; damaged data is named."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data.images import decode
from data.loader import Batches, load
from data.order import Order, permutation
from data.shards import DataError, Shards, write


def png(pixels: np.ndarray, mode: str | None = None, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, form, **options)
    return file.getvalue()


def gradient(i: int) -> bytes:
    return png(np.full((8, 8), i, np.uint8))


@pytest.fixture
def numbered(tmp_path) -> Shards:
    """50 flat images whose grey is their number, in shards of 7."""
    write(
        tmp_path / "numbered",
        ({"__key__": f"{i:03d}", "png": gradient(i), "cls": str(i % 3)} for i in range(50)),
        per_shard=7,
    )
    return Shards(tmp_path / "numbered")


def test_digits_are_genuine_webdataset_shards(digits):
    train = list(webdataset.WebDataset(str(digits / "train" / "00000.tar"), shardshuffle=False).decode("pil"))
    test = list(webdataset.WebDataset(str(digits / "test" / "00000.tar"), shardshuffle=False).decode("pil"))
    assert len(train) + len(test) == 1797
    assert train[0]["png"].size == (8, 8)
    assert {sample["cls"] for sample in test} == set(range(10))
    from sklearn.datasets import load_digits

    first_held_out = (load_digits().images[4] * (255 / 16)).round()
    assert np.array_equal(np.asarray(test[0]["png"])[..., 0], first_held_out)


def test_reading_by_position_agrees_with_webdataset(numbered):
    urls = [str(path) for path in numbered.paths]
    expected = [(s["png"], int(s["cls"])) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert [(numbered.image(i), numbered.labels[i]) for i in range(50)] == expected
    assert numbered.counts == [7] * 7 + [1]
    index = json.loads((numbered.folder / "index.json").read_text())
    assert [shard["nsamples"] for shard in index["shardlist"]] == numbered.counts


def test_shards_in_a_folder_that_cannot_be_written_read_the_same(numbered, monkeypatch):
    for path in [*numbered.folder.glob("*.npy"), numbered.folder / "index.json"]:
        path.unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)  # root may write anywhere
    assert Shards(numbered.folder).fingerprint() == numbered.fingerprint()
    assert not list(numbered.folder.glob("*.npy"))


def test_shards_without_an_index_get_one(numbered):
    for path in [*numbered.folder.glob("*.npy"), numbered.folder / "index.json"]:
        path.unlink()
    again = Shards(numbered.folder)
    assert np.array_equal(again.rows, numbered.rows)
    assert again.fingerprint() == numbered.fingerprint()
    assert len(list(numbered.folder.glob("*.npy"))) == 8


def test_a_replaced_shard_is_indexed_anew(numbered):
    before = numbered.fingerprint()
    other = numbered.folder.with_name("other")
    write(other, ({"__key__": f"{i}", "png": gradient(i)} for i in range(3)))
    shutil.copyfile(other / "00000.tar", numbered.paths[0])
    os.utime(numbered.paths[0], (0, 0))  # as by a copy that keeps an older file's time
    again = Shards(numbered.folder)
    assert again.counts[0] == 3
    assert again.labels[0] == -1
    assert again.fingerprint() != before


def test_permutation_is_pinned():
    """A change would silently reorder the data of every run that is resumed."""
    assert permutation(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]


def test_every_sample_once_an_epoch_and_the_remainder_rotates():
    order = Order(50, 8, seed=1)
    left_out = set()
    for epoch in range(20):
        seen = np.concatenate([order[epoch * 6 + step] for step in range(6)])
        assert len(set(seen.tolist())) == 48
        left_out |= set(range(50)) - set(seen.tolist())
    assert len(left_out) > 10


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_global_batches_do_not_depend_on_world_size_or_workers(numbered, world, workers):
    order, share = Order(50, 8, seed=0), 8 // world
    parts = [
        list(load(Batches([numbered], [order], 32, 1, slice(r * share, (r + 1) * share)), range(4, 8), workers))
        for r in range(world)
    ]
    for i, step in enumerate(range(4, 8)):
        whole = torch.cat([part[i][0].image for part in parts])
        assert whole.shape == (8, 1, 32, 32)
        assert whole[:, 0, 0, 0].tolist() == order[step].tolist()
        assert torch.cat([part[i][0].label for part in parts]).tolist() == [p % 3 for p in order[step]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path, workers):
    samples = [{"__key__": f"{i}", "png": gradient(i)} for i in range(8)]
    samples[5]["png"] = samples[5]["png"][:40] + b"garbage" + samples[5]["png"][47:]
    write(tmp_path / "bad", samples)
    shards = Shards(tmp_path / "bad")
    with pytest.raises(DataError, match=r"step 0: .*bad/00000.tar, member 5.png") as raised:
        list(load(Batches([shards], [Order(8, 8, 0)], 32, 1, slice(0, 8)), range(1), workers))
    assert "Traceback" not in str(raised.value)


def test_missing_empty_and_damaged_data_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        Shards(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no shards"):
        Shards(tmp_path / "empty")
    (tmp_path / "empty" / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match=r"a\.tar"):
        Shards(tmp_path / "empty")
    with pytest.raises(DataError, match="lower it"):
        Order(5, 6, 0)


def test_truncated_shards_are_named(numbered):
    content = numbered.paths[0].read_bytes()
    numbered.paths[0].write_bytes(content[:700])
    with pytest.raises(DataError, match=r"00000\.tar.* cut short"):
        numbered.image(6)
    with pytest.raises(DataError, match=r"00000\.tar"):
        Shards(numbered.folder)


def test_a_shard_without_images_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"), io.BytesIO())
    with pytest.raises(DataError, match="no images"):
        Shards(tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_keeps_sizes_that_fit_and_resizes_others(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    same = decode(png(pixels), 32, channels)
    assert same.shape == (32, 32, channels)
    assert (same == pixels[..., None]).all()
    assert decode(png(np.full((8, 20), 7, np.uint8)), 32, channels).tolist() == np.full((32, 32, channels), 7).tolist()


def test_decode_of_uncommon_images():
    clear = np.zeros((32, 32, 4), np.uint8)
    assert (decode(png(clear), 32, 3) == 255).all(), "transparent is white"
    deep = np.full((32, 32), 0x8000, np.uint16)
    assert (decode(png(deep), 32, 1) == 128).all(), "sixteen bits"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 255
    turned = decode(png(half, form="JPEG", exif=exif, quality=95), 32, 1)
    assert turned[4].mean() > 200
    assert turned[-4].mean() < 50
