"""TIFFs of more than four channels: read as they are, prepared as .npy members, and refused by name."""

import io
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from data import tiffs
from data.arrays import MAGIC, array, is_array
from data.deep import decode_to, read_deep
from data.images import decode
from data.inspect.verify import inspect
from data.loader import read
from data.prepare.build import prepare
from data.shards.reader import Shards, write


def bands(channels: int, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (20, 24, channels), dtype, endpoint=True)


def tiff(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **{"photometric": "minisblack", "planarconfig": "contig", **options})
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_their_channels_are_read_as_they_are(dtype, order, compression):
    pixels = bands(6, dtype)
    planes = np.moveaxis(pixels, -1, 0)
    for content in (
        tiff(pixels, byteorder=order, compression=compression),
        tiff(planes, byteorder=order, compression=compression, planarconfig="separate"),
        tiff(pixels, byteorder=order, compression=compression, photometric="rgb"),  # a colour and three more
    ):
        assert is_array(content)
        assert array(content).dtype == dtype
        assert (array(content) == pixels).all()
        wide = pixels if dtype == "uint16" else pixels.astype(np.uint16) * 257
        assert (decode_to(content, None, 6, 16) == wide).all()
        with pytest.raises(ValueError, match=r"it has 6 channels, expected the 3 of data.channels"):
            decode(content, 8, 3)


def test_of_four_channels_and_less_pillow_reads_them():
    for channels, photometric in ((1, "minisblack"), (3, "rgb"), (4, "rgb")):
        pixels = bands(channels, "uint8")
        content = tiff(pixels.squeeze(), photometric=photometric, **({"extrasamples": [2]} if channels == 4 else {}))
        assert not is_array(content)
        assert (decode_to(content, (20, 24), channels, 8) == pixels).all()


def test_a_folder_of_them_is_prepared_as_arrays_and_a_shard_of_them_is_read(tmp_path):
    (tmp_path / "scenes").mkdir()
    for i in range(4):
        (tmp_path / "scenes" / f"{i}.tif").write_bytes(tiff(bands(5) >> i, compression="lzw"))
    prepare(str(tmp_path / "scenes"), tmp_path / "set", test_fraction=0.0)
    shards = Shards(tmp_path / "set" / "train")
    assert {shards.name(i).partition(".image.npy ")[2] for i in range(4)} == {f"({i}.tif)" for i in range(4)}
    assert all(shards.image(i).startswith(MAGIC) for i in range(4))
    found = read(shards, np.arange(4), (20, 24), 5, 16).image.permute(0, 2, 3, 1).numpy()
    assert sorted(found.tolist()) == sorted((bands(5) >> i).tolist() for i in range(4))
    prepare(str(tmp_path / "scenes"), tmp_path / "small", test_fraction=0.0, size=10)
    assert read(Shards(tmp_path / "small" / "train"), np.arange(4), (10, 12), 5).image.shape == (4, 5, 10, 12)
    write(tmp_path / "tars", ({"__key__": str(i), "tif": tiff(bands(5) >> i)} for i in range(4)))
    dataset, problems = inspect(tmp_path / "tars", verify=True)
    (split,) = dataset.splits.values()
    assert (problems, split.modes, split.formats) == ([], {"uint16 x 5": 4}, {"TIFF": 4})
    found = read(Shards(tmp_path / "tars"), np.arange(4), (20, 24), 5, 16).image.permute(0, 2, 3, 1).numpy()
    assert (found == [bands(5) >> i for i in range(4)]).all()


def test_what_cannot_be_read_is_told(monkeypatch):
    pixels = bands(5)
    turned = tiff(pixels, extratags=[(274, "H", 1, 6, True)])
    with pytest.raises(ValueError, match=r"not upright: turn its pixels"):
        read_deep(turned)
    with pytest.raises(ValueError, match=r"a TIFF of float32, expected the uint8 or uint16 of pixels"):
        read_deep(tiff(pixels.astype(np.float32)))
    with pytest.raises(ValueError, match=r"a TIFF that cannot be read: "):
        read_deep(tiff(pixels, compression="zlib")[:-1000])
    for content in (tiff(pixels)[:8], tiff(pixels)[:4] + b"\xff" * 40):
        with pytest.raises(ValueError, match=r"no image of a known kind"):
            read_deep(content)
    monkeypatch.setattr(tiffs, "MOST", 20 * 24 * 5 * 2 - 1)
    tiffs.read.cache_clear()
    with pytest.raises(ValueError, match=r"it has 4,800 bytes of pixels, more than 4,799: cut it into parts"):
        read_deep(tiff(pixels))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"tifffile, which reads those, is not .*'.\[tiff\]' of this project$"):
        read_deep(tiff(pixels + 1))
    grey = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(grey, "TIFF")
    assert (read_deep(grey.getvalue())[..., 0] == pixels[..., 0]).all(), "Pillow reads those of few channels"
