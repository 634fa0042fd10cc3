"""Images of sixteen bits a channel keep them."""

import io
import struct
import zlib

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


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pngs_are_read_as_they_were_written(channels):
    """Pillow reads them too, but for all but grey ones in eight bits, of which it takes the high bytes."""
    pixels = deep(channels)
    content = encode_png(np.asfortranarray(pixels))  # as tensors of channels first give them
    assert (read_deep(content) == pixels).all()
    image = np.asarray(Image.open(io.BytesIO(content))).reshape(pixels.shape)
    assert (image == (pixels if channels == 1 else pixels >> 8)).all()
    assert (read_deep(encode_png((pixels >> 8).astype(np.uint8))) == (pixels >> 8) * 257).all()


def test_grey_with_alpha_becomes_colour_with_alpha():
    pixels = deep(2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 16, 12, 16, 4, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    assert (read_deep(content) == pixels[..., [0, 0, 0, 1]]).all()


@pytest.mark.parametrize("largest", [65535, 1023])
def test_ppms_keep_their_depth(largest):
    """Pillow scales colours of any depth to eight bits."""
    pixels = deep(3).clip(max=largest)
    content = b"P6\n# a comment\n16 12\n%d\n" % largest + pixels.astype(">u2").tobytes()
    assert (read_deep(content) == np.rint(pixels * (65535 / largest))).all()
    with pytest.raises(ValueError, match=r"."):
        read_deep(content[:-1])
    with pytest.raises(ValueError, match="a PPM of text"):
        read_deep(b"P3 1 1 %d 9 9 9" % largest)
    assert (read_deep(b"P6 1 1 255 \1\2\3") == [257, 514, 771]).all()


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
    pixels = deep(3, 2, 4)
    content = tiff(pixels, order)
    assert Image.open(io.BytesIO(content)).mode == "RGB"
    assert (read_deep(content) == pixels).all()


def test_tiffs_of_a_layout_that_loses_numbers_are_refused():
    with pytest.raises(ValueError, match="laid out as CMYK;16"):
        read_deep(tiff(deep(4, 2, 4), "<", 5))


def tiff(pixels: np.ndarray, order: str, photometric: int = 2, extra: tuple[int, ...] = ()) -> bytes:
    """A TIFF by hand of what Pillow cannot write; `extra` says what each channel beyond a colour's is."""
    height, width, channels = pixels.shape
    depth, short, long = 8 if pixels.max() < 256 else 16, "H", "I"
    data = pixels.astype(f"{order}u{depth // 8}").tobytes()
    fields = [(256, long, [width]), (257, long, [height]), (258, short, [depth] * channels), (259, short, [1])]
    fields += [(262, short, [photometric]), (273, long, [8]), (277, short, [channels]), (278, long, [height])]
    fields += [(279, long, [len(data)]), *([(338, short, extra)] if extra else [])]
    place = 8 + len(data)  # of what does not fit into the fields
    beyond, table = b"", struct.pack(f"{order}H", len(fields))
    for tag, kind, values in fields:
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        table += struct.pack(f"{order}HHI", tag, {short: 3, long: 4}[kind], len(values))
        table += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", place + len(beyond))
        beyond += packed if len(packed) > 4 else b""
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, place + len(beyond))
    return head + data + beyond + table + bytes(4)


def test_damaged_or_large_ones_are_named(tmp_path):
    content = encode_png(deep(3))
    for broken, words in ((content[:-30], "."), (b"no", "no image"), (content, "more than 9 ")):
        with pytest.raises(ValueError, match=words):
            decode_deep(broken, 8, 3, CENTRE_CROP, Limits(pixels=9) if "9" in words else Limits())
    with pytest.raises(ValueError, match=r"."):  # Pillow raises an OSError before it knows the size
        decode_deep(content[:33] + b"\0\1\0\0IDAo" + content[41:], 8, 3, CENTRE_CROP)
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
