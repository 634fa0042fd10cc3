"""Images of sixteen bits a channel keep them."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import encoded

from data.deep import decode_deep, encode_png, read_deep
from data.errors import DataError
from data.images import CENTRE_CROP, Limits, View, decode
from data.loader import Batches, load, read
from data.order import Order
from data.prepare.plan import PrepareSettings
from data.prepare.writer import convert
from data.shards.reader import Shards, write


def deep(channels: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**16, (height, width, channels), dtype=np.uint16)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pngs_are_read_as_they_were_written(channels):
    """Pillow reads them too, but for all but grey ones in eight bits, of which it takes the high bytes."""
    pixels = deep(channels)
    content = encode_png(np.asfortranarray(pixels))  # as tensors of channels first give them
    assert (read_deep(content) == pixels).all()
    image = Image.open(io.BytesIO(content))
    image = np.asarray(image.convert("LA") if channels == 2 else image).reshape(pixels.shape)
    assert (image == (pixels if channels == 1 else pixels >> 8)).all()
    if channels != 2:  # which becomes colour and alpha
        assert (read_deep(encode_png((pixels >> 8).astype(np.uint8))) == (pixels >> 8) * 257).all()


def test_channels_become_those_of_the_run():
    grey, colour, clear = (encode_png(deep(channels)) for channels in (1, 3, 4))

    def at(content: bytes, channels: int) -> np.ndarray:
        return decode_deep(content, (12, 16), channels, CENTRE_CROP).astype(int)

    assert (at(grey, 3) == deep(1)).all()
    assert (at(grey, 4)[..., 3] == 65535).all()
    luma = deep(3) @ [0.299, 0.587, 0.114]
    assert np.abs(at(colour, 1)[..., 0] - luma).max() <= 0.5
    assert (at(colour, 4)[..., :3] == deep(3)).all()
    assert (at(clear, 4) == deep(4)).all()
    share = deep(4)[..., 3:] / 65535
    assert np.abs(at(clear, 3) - (deep(4)[..., :3] * share + 65535 * (1 - share))).max() <= 0.5 + 1e-6
    eight = encoded((deep(3) >> 8).astype(np.uint8))
    assert (at(eight, 3) == decode(eight, (12, 16), 3).astype(int) * 257).all()


@pytest.mark.parametrize("view", [CENTRE_CROP, View(flip=True), View(0.4, 0.1, 0.3, 0.8), View(x=0.2, unscaled=True)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_views_are_those_of_eight_bits(view, channels):
    """Pillow rounds resized eight bits after each of two passes, and colours with alpha before them, too."""
    pixels = np.random.default_rng(0).integers(64, 192, (40, 30, channels), dtype=np.uint8)
    content = encoded(pixels.squeeze())
    eight = decode(content, (12, 10), channels, view).astype(float)
    sixteen = decode_deep(content, (12, 10), channels, view) / 257
    assert np.abs(eight - sixteen).max() <= (1.5 if channels < 4 else 4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_keep_their_depth(order):
    """A grey one by Pillow, and by hand one in colour, which Pillow cannot write."""
    assert (read_deep(encoded(deep(1)[..., 0], "TIFF")) == deep(1)).all()
    pixels, short, long = deep(3, 2, 4), 3, 4  # types of a field
    bits, data = 8, 14  # where the bits of each channel, and the pixels, are
    fields = [(256, long, 1, 4), (257, long, 1, 2), (258, short, 3, bits), (259, short, 1, 1), (262, short, 1, 2)]
    fields += [(273, long, 1, data), (277, short, 1, 3), (278, long, 1, 2), (279, long, 1, pixels.nbytes)]
    content = struct.pack(f"{order}2sHI3H", b"II" if order == "<" else b"MM", 42, data + pixels.nbytes, 16, 16, 16)
    content += pixels.astype(f"{order}u2").tobytes() + struct.pack(f"{order}H", len(fields))
    for tag, kind, count, value in fields:
        inline = (
            struct.pack(f"{order}HH", value, 0) if kind == short and count == 1 else struct.pack(f"{order}I", value)
        )
        content += struct.pack(f"{order}HHI", tag, kind, count) + inline
    content += bytes(4)
    assert Image.open(io.BytesIO(content)).mode == "RGB"
    assert (read_deep(content) == pixels).all()


def test_damaged_or_large_ones_are_named(tmp_path):
    content = encode_png(deep(3))
    for broken, words in ((content[:-30], "."), (b"no", "no image"), (content, "more than 9 ")):
        with pytest.raises(ValueError, match=words):
            decode_deep(broken, 8, 3, CENTRE_CROP, Limits(pixels=9) if "9" in words else Limits())
    write(tmp_path / "set", [{"__key__": "a", "png": content[:-30]}])
    with pytest.raises(DataError, match=r"cannot decode an image: .*member a.png: .+ Repair or remove"):
        read(Shards(tmp_path / "set"), np.array([0]), 8, 3, 16)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])  # the worker starts for seconds
def test_batches_carry_sixteen_bits(tmp_path, workers):
    write(tmp_path / "set", ({"__key__": str(i), "png": encode_png(deep(3, 8, 8) >> i)} for i in range(4)))
    shards = Shards(tmp_path / "set")
    batches = Batches([shards], [Order(shards.counts, 2, 0)], 8, 3, slice(0, 2), bits=16)
    (found,) = next(load(batches, range(1), workers))
    assert found.image.dtype == torch.uint16
    expected = [deep(3, 8, 8) >> i for i in found.position.tolist()]
    assert (found.image.permute(0, 2, 3, 1).numpy() == expected).all()


@pytest.mark.parametrize("settings", [{"size": 6}, {"size": (6, 10), "crop": True}, {"alpha": True, "size": 6}])
def test_prepared_images_keep_sixteen_bits(settings):
    content = encode_png(deep(4))
    form, found = convert(content, PrepareSettings(**settings))
    assert form == "PNG"
    size, channels = (6, 10) if "crop" in settings else (6, 8), 4 if "alpha" in settings else 3
    made = read_deep(found)
    assert made.shape == (*size, channels)
    assert np.abs(made.astype(int) - decode_deep(content, size, channels, CENTRE_CROP)).max() <= 1
    assert (made & 255).any()
    assert convert(content, PrepareSettings(size=6, format="webp"))[0] == "WEBP"
    grey = encoded(deep(1)[..., 0], "TIFF")
    assert read_deep(convert(grey, PrepareSettings(format="png"))[1]).tolist() == deep(1).tolist()
