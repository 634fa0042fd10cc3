"""Images of any size: whole, and in tiles whose seams fade."""

import pytest
import torch
from generating import generate, pixels
from PIL import Image
from torch.nn.functional import pad

import models
from models import AE, NetworkConfig
from trainer.batch import normalize, to_uint8
from trainer.generate import whole

RADIUS = 17  # how far from an output pixel the network below sees: 2 strided 4x4, two 3x3, 2 transposed 4x4


def network() -> AE:
    """Convolutions alone, without groups, whose statistics would be of the whole image."""
    return AE(32, 1, 4, NetworkConfig("dcgan", 4, latent_stride=4)).double().eval()


@torch.no_grad()
def test_away_from_seams_tiles_make_the_pixels_of_the_whole_image():
    system, image = network(), torch.rand(1, 1, 224, 320, dtype=torch.float64) * 2 - 1
    one, tiled = system.reconstruct(image), whole.in_tiles(system.reconstruct, image, 4, 128)
    differs = ((tiled - one).abs() > 1e-12)[0, 0]  # sums of some 100 float64 terms in another order
    # Tiles lie at 0, 96 and 192 and overlap by 32 pixels, which is more than the networks see.
    seams = torch.zeros(224, 320, dtype=torch.bool)
    seams[96:128] = seams[:, 96:128] = seams[:, 192:224] = True
    assert not differs[~seams].any()
    assert differs[seams].any(), "tiles do not see beyond their edges"


def test_one_tile_is_the_whole_image():
    system, image = network().float(), torch.rand(1, 1, 64, 96) * 2 - 1
    with torch.no_grad():
        expected = system.reconstruct(image)
        for tile in (None, 96, 1024):
            assert torch.equal(whole.in_tiles(system.reconstruct, image, 4, tile), expected)


def test_neighbours_fade_into_each_other_linearly():
    """The n-th tile is all n, of two tiles at 0 and 16 of 48 pixels: they share 16 to 48, and the seam is at 32."""
    calls = []

    def count(image):
        calls.append(image.shape)
        return torch.full_like(image, float(len(calls)))

    made = whole.in_tiles(count, torch.zeros(1, 1, 48, 64), 4, 48)[0, 0]
    place = torch.arange(64) + 0.5
    expected = (1 + ((place - 32) / 12 + 0.5).clamp(0, 1)).expand(48, 64)
    torch.testing.assert_close(made, expected, rtol=4 * 2**-23, atol=0)
    assert calls == [(1, 1, 48, 48)] * 2


@pytest.mark.parametrize("tile", [16, 48, 112])
def test_weights_sum_to_one_and_tiles_cover_the_image(tile):
    """A network that changes nothing changes no image; float32 adds at most four products of weights."""
    for height, width in ((16, 4), (52, 200), (tile, tile + 4), (3 * tile, 2 * tile - 4)):
        image, parts = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))[None], []

        def unchanged(part, parts=parts):
            parts.append(part)
            return part

        made = whole.in_tiles(unchanged, image.float(), 4, tile)
        torch.testing.assert_close(made, image.float(), rtol=4 * 2**-23, atol=0)
        assert {part.shape for part in parts} == {(1, 2, min(tile, height), min(tile, width))}
        assert all(part[0, :, 0, 0].remainder(4).eq(0).all() for part in parts), "a code stands for 4 x 4 pixels"


def test_images_keep_their_sizes(tiny_run, capsys, tmp_path):
    run, photos = tiny_run("kl"), tmp_path / "photos"
    photos.mkdir()
    for name, size in ("wide", (45, 25)), ("tall", (19, 31)):
        Image.effect_noise(size, 60).save(photos / f"{name}.png")
    options = {"whole": ["--whole"], "large": ["--tile", 48], "small": ["--tile", 16]}
    for name, option in options.items():
        done = generate(capsys, "reconstruct", run, "--images", photos, "--out", tmp_path / name, *option)
        assert done.out.startswith(f"{tmp_path / name}: 2 PNGs written, by "), done.err
    for name, (width, height) in ("wide", (45, 25)), ("tall", (19, 31)):
        original, made = pixels(tmp_path / "whole" / f"{name}.png").split(width, dim=1)
        assert torch.equal(original, pixels(photos / f"{name}.png"))
        image = pad(normalize(original)[None, None], (0, -width % 4, 0, -height % 4), mode="replicate")
        with torch.no_grad():
            assert torch.equal(made, to_uint8(models.load(run).reconstruct(image))[0, 0, :height, :width])
        files = [(tmp_path / folder / f"{name}.png").read_bytes() for folder in options]
        assert files[0] == files[1]
        assert pixels(tmp_path / "small" / f"{name}.png").shape == (height, 2 * width)
        assert files[0] != files[2], "groups' statistics are a tile's"


def test_translations_keep_the_sizes_of_photos(tiny_run, capsys, tmp_path):
    """Also of the smallest, whose reflected edges need 8 pixels. A whole image is one pass of the translator."""
    run, photos = tiny_run("CycleGAN"), tmp_path / "photos"
    photos.mkdir()
    for name, size in ("wide", (45, 25)), ("dot", (3, 2)):
        Image.effect_noise(size, 60).save(photos / f"{name}.png")
    for name, option in ("whole", ["--whole"]), ("tiles", ["--tile", 16]):
        out, direction = tmp_path / name, ("--direction", "b2a")
        done = generate(capsys, "translate", run, *direction, "--images", photos, "--out", out, *option)
        assert done.out.startswith(f"{out}: 2 PNGs written, by "), done.err
    for name, (width, height), margins in ("wide", (45, 25), (3, 3)), ("dot", (3, 2), (5, 6)):
        original, made = pixels(tmp_path / "whole" / f"{name}.png").split(width, dim=1)
        assert torch.equal(original, pixels(photos / f"{name}.png"))
        image = pad(normalize(original)[None, None], (0, margins[0], 0, margins[1]), mode="replicate")
        with torch.no_grad():
            assert torch.equal(made, to_uint8(models.load(run).translate(image, "b2a"))[0, 0, :height, :width])
        tiled = pixels(tmp_path / "tiles" / f"{name}.png")[:, width:]
        assert torch.equal(tiled, made) == (name == "dot"), "a tile is normalized by itself"


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("VAEGAN", ["--whole"], "system.networks.latent_stride is null, so codes are vectors and images have 32 x 32"),
        (
            "kl",
            ["--tile", 40],
            "--tile is 40, expected a multiple of 16, as networks make 4 pixels a side at once",
        ),
        ("kl", ["--tile", 48, "--grid"], "error: --grid shows images of one size"),
        ("kl", ["--tile", 40, "--grid"], "such as 32; --grid shows images of one size"),
        ("VAEGAN", ["--whole", "--grid"], "latent_stride 8; --grid shows images of one size"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tiny_run, capsys, tmp_path, system, options, words):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    done = generate(capsys, "reconstruct", tiny_run(system), "--images", tmp_path, "--out", "none", *options)
    assert done.returncode == 2
    assert words in done.err
