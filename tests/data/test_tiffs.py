"""TIFFs of more than four channels: read as they are, prepared as .npy members, and refused by name."""

import io
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import tifffile
from PIL.TiffImagePlugin import PREFIXES

from data import tiffs
from data.arrays import MAGIC, array, is_array
from data.deep import decode_to, read_deep
from data.errors import DataError
from data.images import Limits, decode, header
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
@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits", "zstd"])
def test_their_channels_are_read_as_they_are(dtype, order, compression):
    pixels = bands(6, dtype)
    planes = np.moveaxis(pixels, -1, 0)
    for content in (
        tiff(pixels, byteorder=order, compression=compression),
        tiff(planes, byteorder=order, compression=compression, planarconfig="separate"),
        tiff(pixels, byteorder=order, compression=compression, photometric="rgb"),  # a colour and three more
        tiff(pixels, byteorder=order, compression=compression, bigtiff=order == "<", tile=(16, 16)),
    ):
        assert is_array(content)
        assert array(content).dtype == dtype
        assert (array(content) == pixels).all()
        wide = pixels if dtype == "uint16" else pixels.astype(np.uint16) * 257
        assert (decode_to(content, None, 6, 16) == wide).all()
        with pytest.raises(ValueError, match=r"it has 6 channels, expected the 3 of data.channels"):
            decode(content, 8, 3)


def test_bands_that_are_no_colours_are_read_from_two_on():
    for channels in (2, 3, 4):
        pixels = bands(channels, "uint8")
        assert (decode_to(tiff(pixels), (20, 24), channels, 8) == pixels).all()


@pytest.mark.parametrize("start", PREFIXES)
def test_all_beginnings_that_pillow_takes_for_a_tiff_are_known(start):
    """A TIFF of six channels is read as it is, or refused where tifffile or Pillow does not know its order of bytes."""
    big = 43 in start[2:4]
    content = tiff(bands(6), byteorder="<" if start[:1] == b"I" else ">", photometric="rgb", bigtiff=big)
    content = start + content[4:]
    if start in (b"II*\0", b"MM\0*", b"II+\0"):
        assert (decode_to(content, (20, 24), 6, 16) == bands(6)).all()
    else:
        with pytest.raises(ValueError, match=r"damaged"):
            decode_to(content, (20, 24), 6, 16)
    with pytest.raises(ValueError, match=r"it has 6 channels, expected the 3|no image of a known kind"):
        decode(content, 8, 3)


def test_of_colours_pillow_reads_them():
    for channels, photometric in ((1, "minisblack"), (3, "rgb"), (4, "rgb")):
        pixels = bands(channels, "uint8")
        content = tiff(pixels.squeeze(), photometric=photometric, **({"extrasamples": [2]} if channels == 4 else {}))
        assert not is_array(content)
        assert (decode_to(content, (20, 24), channels, 8) == pixels).all()


def stack(images: int = 2, kind: int = 0, channels: int = 1) -> bytes:
    """A TIFF of several images, those after the first of one kind: 0 none, 1 reduced, 2 a page."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for i in range(images):
            pixels = bands(channels, "uint8").squeeze()[: 20 >> (i if kind == 1 else 0)]
            writer.write(pixels, photometric="minisblack", planarconfig="contig", subfiletype=kind if i else 0)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "several"),
    [
        (stack(), True),
        (stack(kind=2), True),
        (tiff(bands(5, "uint8"), planarconfig=None), True),
        (tiff(bands(5, "uint8"), planarconfig=None, bigtiff=True), True),
        (stack(1), False),
        (stack(3, kind=1), False),
        (stack(channels=5), False),
        (stack()[: tifffile.TiffFile(io.BytesIO(stack())).pages[1].offset], False),  # cut short after the first
    ],
)
def test_of_several_images_none_is_read_silently_but_thumbnails_are_no_images(content, several, tmp_path):
    channels = 5 if is_array(content) else 1
    for bits in (8, 16):
        with pytest.raises(ValueError, match=r"^it is a TIFF of several images") if several else nullcontext():
            decode_to(content, 8, channels, bits)
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "a.tif").write_bytes(content)
    words = r"\n  a\.tif: it is a TIFF of several images, .* numpy.moveaxis"
    with pytest.raises(DataError, match=words) if several else nullcontext():
        prepare(str(tmp_path / "scenes"), tmp_path / "set", test_fraction=0.0)


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


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"extratags": [(274, "H", 1, 6, True)]}, "it is a TIFF whose Orientation is 6, expected 1: turn the pixels"),
        ({"bitspersample": 12}, "it is a TIFF of 12 bits a channel, expected 8 or 16: write it anew"),
        ({"dtype": "float32"}, "it is a TIFF of float32, expected the uint8 or uint16 of pixels"),
        (
            {"compression": "lzma"},
            "it is a TIFF with compression 34925, expected none, LZW, deflate, PackBits or ",
        ),
        ({"volumetric": True}, "it is a TIFF of shape .*, but its tags tell of"),
    ],
)
def test_what_is_not_read_is_told(made, words):
    made = dict(made)
    pixels = (bands(5) >> 4).astype(made.pop("dtype", "uint16"))
    pixels = np.stack([pixels, pixels]) if "volumetric" in made else pixels
    with pytest.raises(ValueError, match=f"^{words}"):
        read_deep(tiff(pixels, **made))


def test_damaged_ones_are_told_and_never_black():
    content = tiff(bands(5), compression="zlib", rowsperstrip=4)
    with pytest.raises(ValueError, match=r"^it is a damaged TIFF: "):
        read_deep(content[:-1000])
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        tag = file.pages.first.tags[279]  # the bytes of each strip
        empty = content[: tag.valueoffset] + bytes(4) + content[tag.valueoffset + 4 :]
    with pytest.raises(ValueError, match=r"^it is a TIFF without some of its strips or tiles: write it anew"):
        read_deep(empty)
    for content in (tiff(bands(5))[:8], tiff(bands(5))[:4] + b"\xff" * 40):
        with pytest.raises(ValueError, match=r"no image of a known kind"):
            read_deep(content)


def test_large_ones_are_refused_before_they_are_decoded(monkeypatch):
    content = tiff(bands(5))
    monkeypatch.setattr(tiffs, "read", None)
    assert header(content) == ((24, 20), 5)
    with pytest.raises(ValueError, match=r"^it has 24 x 20 pixels, more than 479 "):
        decode_to(content, 8, 5, 16, limits=Limits(pixels=479))
    with pytest.raises(ValueError, match=r"^it has 24 x 20 pixels, more than 479 "):
        decode(tiff(bands(3, "uint8")), 8, 3, limits=Limits(pixels=479))
    monkeypatch.undo()
    monkeypatch.setattr(tiffs, "MOST", 20 * 24 * 5 * 2 - 1)
    with pytest.raises(ValueError, match=r"^it has 4,800 bytes of pixels, more than 4,799: scale it down, or cut it"):
        read_deep(content)
    with pytest.raises(ValueError, match=r"^it has 163,840 bytes of pixels, more than 4,799"):
        read_deep(tiff(bands(5), tile=(128, 128)))


def test_without_tifffile_commands_end_with_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "a.tif").write_bytes(tiff(bands(5)))
    write(tmp_path / "tars", [{"__key__": "a", "tif": tiff(bands(3))}])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"^a TIFF of many channels is among the images, and tifffile"):
        read(Shards(tmp_path / "tars"), np.arange(1), (20, 24), 3)
    with pytest.raises(DataError, match=r"tifffile, .* is not installed: pip install 'vaegan-trainer\[tiff\]'"):
        prepare(str(tmp_path / "scenes"), tmp_path / "set", test_fraction=0.0, max_rejected=1.0)
