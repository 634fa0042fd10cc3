"""Any image is read, turned, over white and eight bits deep; what cannot be is named."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image
from sample_images import encoded, smooth

from data import images
from data.images import Limits, View, decode


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_decode_agrees_with_pillow(channels, form):
    """To the pixel where the size fits (a colour JPEG in grey within two: libjpeg does not go through RGB)."""
    for mode in ("RGB", "L"):
        content = encoded(smooth(32, 32), form, mode)
        expected = Image.open(io.BytesIO(content)).convert("L" if channels == 1 else "RGB")
        found = decode(content, 32, channels)
        assert found.shape == (32, 32, channels)
        error = np.abs(found.astype(int).squeeze() - np.asarray(expected)).max()
        assert error <= (2 if (form, mode, channels) == ("JPEG", "RGB", 1) else 0)
    assert decode(encoded(np.full((8, 20), 7, np.uint8), form), 32, channels).tolist() == np.full(
        (32, 32, channels), 7
    ).tolist() or form in ("JPEG", "WEBP")


def test_large_jpegs_are_scaled_while_they_are_decoded():
    content = encoded(smooth(1000, 800), "JPEG", quality=95)
    scaled = decode(content, 64, 3).astype(int)
    whole = decode(encoded(np.asarray(Image.open(io.BytesIO(content)))), 64, 3)
    assert np.abs(scaled - whole).max() <= 3
    assert np.abs(scaled - whole).max() > 0, "it took another way"


def test_four_channels_are_colour_and_alpha():
    """To the bit where the size fits; opaque where an image has no alpha."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    for form, options in ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True}):
        assert (decode(encoded(pixels, form, **options), 32, 4) == pixels).all()
    greys = decode(encoded(pixels[..., 2:]), 32, 4)  # of mode LA
    assert (greys == pixels[..., [2, 2, 2, 3]]).all()
    for form, options in ("PNG", {}), ("JPEG", {}):
        opaque = encoded(smooth(32, 32), form, **options)
        assert (decode(opaque, 32, 4)[..., :3] == decode(opaque, 32, 3)).all()
        assert (decode(opaque, 32, 4)[..., 3] == 255).all()
    flipped = decode(encoded(pixels), 16, 4, View(flip=True))
    assert (flipped == decode(encoded(pixels[:, ::-1]), 16, 4)).all()
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:, 16:] = [200, 100, 50, 255]
    colours = decode(encoded(clear), 16, 4)[:, 8:, :3].astype(int)
    assert np.abs(colours - [200, 100, 50]).max() <= 2, "what is clear darkens no edge"


def test_decode_of_uncommon_images():
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:, 16:, 3] = 255
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 255
    for content in (encoded(clear), encoded(clear, "WEBP", lossless=True), encoded(clear[..., 2:])):
        assert (decode(content, 32, 3) == half).all(), "transparent is white"
    palette = Image.fromarray(np.repeat([[0, 1]], 32, 0).repeat(16, 1).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 0, 0, 0])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=0)
    assert (decode(file.getvalue(), 32, 3) == half).all(), "palette with a transparent colour"
    assert (decode(encoded(np.full((32, 32), 0x8034, np.uint16)), 32, 1) == 0x80).all(), "sixteen bits"
    cmyk = decode(encoded(smooth(32, 32), "JPEG", "CMYK", quality=95), 32, 3).astype(int)
    assert np.abs(cmyk - smooth(32, 32)).mean() < 3, "CMYK"
    frames = [Image.fromarray(np.full((32, 32), value, np.uint8)) for value in (50, 200)]
    for form in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:])
        assert np.abs(decode(file.getvalue(), 32, 1).astype(int) - 50).max() <= 1, f"the first frame of {form}"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(smooth(48, 32), form, exif=exif)
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    expected = np.asarray(ImageOps.fit(upright, (32, 32), Image.Resampling.BICUBIC))
    assert np.abs(decode(content, 32, 3).astype(int) - expected).max() <= 1


def test_what_cannot_be_decoded_is_a_value_error():
    good = {form: encoded(smooth(40, 40), form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    for content in (b"", b"hello", b"\xff\xd8\xff", *(one[: len(one) // 2] for one in good.values())):
        with pytest.raises(ValueError, match=r"[a-z]{4}"):
            decode(content, 40, 3)
    with pytest.raises(ValueError, match="floating-point"):
        decode(encoded(np.zeros((9, 9), np.float32), "TIFF"), 32, 1)
    for content in good.values():
        for limits, told in (
            (
                Limits(pixels=40 * 40 - 1),
                r"40 x 40 pixels, more than 1,599 \(data.max_pixels, or --max_pixels of data.prepare",
            ),
            (Limits(bytes=len(content) - 1), r"bytes \(data.max_bytes, "),
        ):
            for look in (lambda content, limits: decode(content, 32, 3, limits=limits), images.decode_whole):
                with pytest.raises(ValueError, match=told):
                    look(content, limits)


@pytest.mark.parametrize("size", [40, 64])
def test_a_jpeg_of_many_scans_is_refused(size):
    """130 kB of them take minutes. Whether it has the size asked for or not: it goes another way."""
    content = encoded(smooth(40, 40), "JPEG", progressive=True)
    scan = content[content.rindex(images.SCAN) : -2]
    decode(content, size, 3)
    with pytest.raises(ValueError, match=r"more than 50 scans \(data.max_scans, .*\): encode it again"):
        decode(content[:-2] + scan * 10_000 + content[-2:], size, 3)


@pytest.mark.parametrize("size", [40, 64])
def test_only_a_jpeg_s_own_scans_are_counted(size):
    """A phone writes a film behind the image, a camera a preview into it."""
    content = encoded(smooth(40, 40), "JPEG", progressive=True)
    segment = b"\xff\xe2" + (2**16 - 1).to_bytes(2) + (images.SCAN + b"\xff\xd9") * ((2**16 - 4) // 4) + b"\xff"
    film = np.random.default_rng(0).bytes(6 * 2**20)
    assert film.count(images.SCAN) > 50
    for one in (content + film, content[:2] + segment + content[2:]):
        assert np.array_equal(decode(one, size, 3), decode(content, size, 3))
    scan = content[content.rindex(images.SCAN) : -2]
    with pytest.raises(ValueError, match="more than 50 scans"):
        decode(content[:2] + segment + content[2:-2] + scan * 60 + content[-2:] + film, size, 3)
    with pytest.raises(ValueError, match="more than 65,536 segments"):
        decode(content[:2] + b"\xff\xfe\0\2" * 2**16 + segment + content[2:], size, 3)


def test_strips_over_white_are_as_the_whole(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    whole = images.decode_whole(encoded(pixels))
    expected = Image.alpha_composite(Image.new("RGBA", (30, 40), "white"), Image.fromarray(pixels)).convert("RGB")
    monkeypatch.setattr(images, "STRIP", 7)
    assert whole.tobytes() == images.decode_whole(encoded(pixels)).tobytes() == expected.tobytes()


def test_flipped_bytes_never_crash():
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        content = bytearray(encoded(smooth(40, 40), form))
        for _ in range(150):
            spoilt = content.copy()
            spoilt[rng.integers(len(content))] ^= int(rng.integers(1, 256))
            with contextlib.suppress(ValueError):
                assert decode(bytes(spoilt), 32, 3).shape == (32, 32, 3)


def test_views_crop_and_flip():
    content = encoded(smooth(64, 64))
    whole = decode(content, 64, 3)
    assert (decode(content, 64, 3, View(flip=True)) == whole[:, ::-1]).all()
    assert (decode(content, 32, 3, View(0.25, 0, 1, 0)) == whole[:32, 32:]).all(), "the upper right quarter"
    wide = decode(content, 32, 1, View(0.125, np.log(2), 0, 0))
    assert np.abs(wide.astype(int) - decode(encoded(smooth(64, 64)[:16, :32]), 32, 1, View(1.0, np.log(2)))).mean() < 3
    assert decode(content, 32, 3, View(1.0, np.log(4 / 3), 0.3, 0.7)).shape == (32, 32, 3), "wider than the image"
    assert (decode(content, (16, 32), 3, View(0.125, 0, 1, 0)) == whole[:16, 32:]).all(), "of the size's shape"
    assert (decode(content, (32, 64), 3) == whole[16:48]).all(), "the largest centred part of that shape"
    for x, y, left, top in ((0, 0, 0, 0), (0.99, 0.5, 16, 8), (1, 1, 16, 16)):
        found = decode(content, 48, 3, View(x=x, y=y, unscaled=True))
        assert (found == whole[top : top + 48, left : left + 48]).all(), "its own pixels, at any place"
    assert (decode(content, (64, 16), 3, View(y=0.7, flip=True, unscaled=True)) == whole[:, 24:40][:, ::-1]).all()
    small = decode(encoded(smooth(64, 32)), 48, 3, View(x=0, unscaled=True))
    enlarged = np.asarray(Image.fromarray(smooth(64, 32)).resize((96, 48), Image.Resampling.BICUBIC))
    assert (small == enlarged[:, :48]).all()
    large = encoded(smooth(1600, 1200), "JPEG", quality=95)
    window, own = decode(large, 64, 3, View(x=0, y=0, unscaled=True)), np.asarray(Image.open(io.BytesIO(large)))
    assert np.abs(window.astype(int) - own[:64, :64]).max() <= 3, "no JPEG is scaled"
    for size in (64, (48, 96)):
        for view in (View(0.3, 0.1, 0.4, 0.6, True), images.CENTRE_CROP):
            unscaled = decode(encoded(np.asarray(Image.open(io.BytesIO(large)))), size, 3, view).astype(int)
            assert np.abs(decode(large, size, 3, view).astype(int) - unscaled).max() <= 3
