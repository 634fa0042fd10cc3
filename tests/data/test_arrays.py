"""Images of any number of channels are .npy files, from a folder through shards to pixels; other files are named."""

import io
import json

import numpy as np
import pytest
from sample_images import encoded

from data.arrays import array, encode_npy
from data.deep import decode_to, read_deep
from data.errors import DataError
from data.images import View, decode, decode_whole, header
from data.inspect.sheet import sheet
from data.inspect.verify import inspect
from data.loader import read
from data.prepare import prepare
from data.prepare.plan import PrepareSettings
from data.prepare.writer import convert
from data.shards.reader import Shards, write


def bands(channels: int, dtype: str = "uint8", height: int = 20, width: int = 24) -> np.ndarray:
    shape, most = (height, width, channels), np.iinfo(dtype).max
    return np.random.default_rng(channels).integers(0, most, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
@pytest.mark.parametrize("order", "CF")
def test_arrays_are_read_as_numpy_wrote_them(dtype, order):
    pixels, file = bands(5, dtype[-2:]), io.BytesIO()
    np.save(file, np.asarray(pixels, dtype, order))
    found = array(file.getvalue())
    assert found.dtype == pixels.dtype
    assert (found == pixels).all()
    assert header(file.getvalue()) == ((24, 20), 5)
    assert (array(encode_npy(pixels[..., 0])) == pixels[..., :1]).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encode_npy(np.zeros((20, 20, 3), np.float32)), "of float32, expected the uint8 or uint16"),
        (encode_npy(np.zeros((20, 20), np.int16)), "of int16"),
        (encode_npy(np.zeros((2, 20, 20, 3), np.uint8)), r"of shape \[2, 20, 20, 3\], expected \[height, width"),
        (encode_npy(np.zeros((5, 20, 24), np.uint8)), "5 seem to be its channels, which come last"),
        (encode_npy(bands(5))[:-1], "cut short"),
        (encode_npy(bands(5)) + b"1", "with more bytes"),
        (encode_npy(bands(5)).replace(b"(20, 24, 5)", b"(20, 24, x)"), "a damaged .npy file"),
        (encode_npy(bands(5)).replace(b"(20, 24, 5), } ", b"(10**9, 9, 5)}"), "a damaged .npy file"),
        (encode_npy(bands(3)), r"3 channels, expected the 5 of .*: set that to 1, 3 or 4, or leave"),
        (encoded(bands(3)), r"it is of mode RGB, which is read as 1, 3 or 4 channels, not as the 5 of data"),
        (encode_npy(bands(9, width=5)), r"9 channels, expected the 5 .*come first, numpy.moveaxis"),
    ],
)
def test_what_is_no_image_of_the_channels_is_named(content, words):
    for bits in (8, 16):
        with pytest.raises(ValueError, match=words):
            decode_to(content, 16, 5, bits)


def test_arrays_of_grey_colour_and_alpha_are_read_as_pngs_are():
    for own in (1, 3, 4):
        pixels = bands(own)
        as_png, as_array = encoded(pixels.squeeze()), encode_npy(pixels)
        for channels in (1, 3, 4):
            for size in (None, 8):
                for bits in (8, 16):
                    one, other = (decode_to(content, size, channels, bits) for content in (as_png, as_array))
                    assert (one == other).all()
    assert (decode(encode_npy(bands(3, "uint16")), (20, 24), 3) == bands(3, "uint16") >> 8).all()


@pytest.mark.parametrize("view", [View(flip=True), View(0.4, 0.1, 0.3, 0.8), View(x=0.2, unscaled=True)])
def test_each_channel_is_changed_as_a_grey_image_is(view):
    """Within Pillow's rounding of grey images after each of two passes, and ours."""
    pixels = bands(6) // 2 + 64
    found = decode_to(encode_npy(pixels), (12, 10), 6, 8, view)
    for i in range(6):
        assert np.abs(found[..., i] - decode(encoded(pixels[..., i]), (12, 10), 1, view)[..., 0].astype(int)).max() <= 2


def test_pictures_show_the_first_three_channels_or_the_first_of_two():
    assert (np.asarray(decode_whole(encode_npy(bands(7)))) == bands(7)[..., :3]).all()
    assert (np.asarray(decode_whole(encode_npy(bands(2)))) == bands(2)[..., 0]).all()


def test_a_folder_becomes_shards_that_are_read_in_both_depths(tmp_path):
    for i in range(6):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "ab"[i % 2] / f"{i}.npy").write_bytes(encode_npy(bands(5, "uint16") >> i))
    (tmp_path / "in" / "a" / "old.tar.npy").write_bytes(encode_npy(np.zeros((2, 4), np.int64)))
    prepare(str(tmp_path / "in"), tmp_path / "out", test_fraction=0.0)
    shards = Shards(tmp_path / "out" / "train")
    assert all(".image.npy (" in shards.name(i) for i in range(6))
    found = read(shards, np.arange(6), (20, 24), 5, 16)
    expected = {(bands(5, "uint16") >> i).tobytes() for i in range(6)}
    assert {one.permute(1, 2, 0).contiguous().numpy().tobytes() for one in found.image} == expected
    eight = read(shards, np.arange(6), (20, 24), 5).image
    assert (eight.numpy() == np.rint(found.image.numpy() / 257)).all()
    assert sorted(found.label.tolist()) == [0, 0, 0, 1, 1, 1]
    dataset, problems = inspect(tmp_path / "out", verify=True)
    assert problems == []
    assert dataset.splits["train"].modes == {"uint16 x 5": 6}
    assert dataset.ignored == {".npy": 1}
    assert sheet(tmp_path / "out", dataset).getcolors(10**6)
    with pytest.raises(
        DataError, match=r"member .*.image.npy .*: it has 5 channels, .* set that to 5, or leave out such images$"
    ):
        read(shards, np.arange(6), 20, 3)


def test_prepared_arrays_are_resized_in_their_depth():
    for dtype in ("uint8", "uint16"):
        form, content = convert(encode_npy(bands(5, dtype)), PrepareSettings(size=10))
        made = array(content)
        assert (form, made.shape, made.dtype) == ("NPY", (10, 12, 5), dtype)
        expected = read_deep(encode_npy(decode_to(encode_npy(bands(5, dtype)), (10, 12), 5, 16)))
        assert np.abs(read_deep(content).astype(int) - expected).max() <= (129 if dtype == "uint8" else 0)
    with pytest.raises(ValueError, match="5 channels, which WEBP cannot hold: leave --format webp out"):
        convert(encode_npy(bands(5)), PrepareSettings(format="webp"))
    form, content = convert(encode_npy(bands(3, "uint16")), PrepareSettings(format="png"))
    assert (form, read_deep(content).tolist()) == ("PNG", bands(3, "uint16").tolist())


def test_npy_members_of_other_programs_are_told_apart_by_their_numbers(tmp_path):
    """Integers are an image, also to data.inspect; floating-point numbers are latents."""
    write(tmp_path / "set", [{"__key__": "a", "npy": encode_npy(bands(5)), "json": json.dumps({}).encode()}])
    assert (
        read(Shards(tmp_path / "set"), np.array([0]), (20, 24), 5).image[0].permute(1, 2, 0).numpy() == bands(5)
    ).all()
    assert inspect(tmp_path / "set")[1] == []
    assert Shards(tmp_path / "set").others(0) == [("a", {"json": b"{}"})]
    prepare(str(tmp_path / "set"), tmp_path / "again", test_fraction=0.0)
    assert Shards(tmp_path / "again" / "train").name(0).endswith("member 00000000.image.npy (00000.tar: a.npy)")
