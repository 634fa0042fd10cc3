"""Pictures by a trained system, and models.load, which gives it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import reseal
from generating import generate, pixels, strip
from PIL import Image

import models
from data.loader import read
from data.shards.reader import Shards
from models.load import checkpoint_of
from trainer.batch import normalize, to_uint8
from trainer.draws import prior
from trainer.generate.generator import Generator
from trainer.generate.panels import given


@pytest.fixture
def run(tiny_run):
    return tiny_run


@pytest.fixture
def photos(digits, tmp_path) -> Path:
    """A nested folder of image files, of other sizes and modes than the system's."""
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    image = Image.fromarray(read(Shards(digits / "test"), np.array([3]), 32, 1).image[0, 0].numpy())
    image.save(folder / "b.png")
    image.convert("RGB").resize((50, 40)).save(folder / "b.jpg")
    image.rotate(90).save(folder / "a.webp", lossless=True)
    image.resize((80, 64)).save(folder / "deep" / "er" / "c.png")
    return folder


def test_samples_are_those_of_the_evaluation_whatever_their_number(run, capsys, tmp_path):
    done = generate(capsys, "sample", run("VAEGAN"), "--out", tmp_path / "many", "--num", 70, "--seed", 5)
    assert done.returncode == 0, done.err
    assert done.out.startswith(f"{tmp_path / 'many'}: 70 PNGs written, by ")
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == [f"{i:06d}.png" for i in range(70)]
    few = ["sample", run("VAEGAN"), "--out", tmp_path / "few", "--num", 3]
    assert generate(capsys, *few, "--seed", 5).returncode == 0
    for i in range(3):
        name = f"{i:06d}.png"
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    system = models.load(run("VAEGAN"))
    by_hand = to_uint8(system.decoder(prior(5, torch.arange(64), system.latent_shape)))
    assert torch.equal(pixels(tmp_path / "many" / "000000.png"), by_hand[0, 0])
    assert torch.equal(pixels(tmp_path / "many" / "000063.png"), by_hand[63, 0])
    assert generate(capsys, *few, "--seed", 6).returncode == 0
    assert not torch.equal(pixels(tmp_path / "few" / "000000.png"), by_hand[0, 0])
    again = generate(capsys, "sample", run("VAEGAN"), "--out", tmp_path / "many", "--num", 2)
    assert "2 PNGs written, beside 68 older" in again.out


@pytest.mark.parametrize("chosen", [[], [3, 7]])
def test_samples_are_of_the_classes_in_turn(run, capsys, tmp_path, chosen):
    command = ["sample", run("GAN"), "--out", tmp_path, "--num", 3, "--seed", 5]
    done = generate(capsys, *command, *(["--classes", ",".join(map(str, chosen))] if chosen else []))
    assert done.returncode == 0, done.err
    system = models.load(run("GAN"))
    label = torch.tensor((chosen or range(10)) * 32)[:64] if chosen else torch.arange(64) % 10
    by_hand = to_uint8(system.sample(prior(5, torch.arange(64), system.latent_shape), label))
    for i in range(3):
        assert torch.equal(pixels(tmp_path / f"{i:06d}.png"), by_hand[i, 0])
    with pytest.raises(ValueError, match=r"^system.classes is 10: give the class of each image"):
        system.sample(torch.zeros(1, *system.latent_shape))


def test_a_grid_is_one_picture(run, capsys, tmp_path):
    done = generate(capsys, "sample", run("GAN"), "--out", tmp_path, "--grid")
    assert done.returncode == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["sample.png"]
    assert Image.open(tmp_path / "sample.png").size == (8 * 66 - 2, 8 * 66 + 20 - 2)


def test_the_averaged_weights_are_used(run, capsys, tmp_path):
    """Of a checkpoint whose raw weights are gone bad, the pictures stay; of one whose average is other, they change."""
    checkpoint = shutil.copytree(checkpoint_of(run("VAEGAN")), tmp_path / "copy")

    def zero(name: str) -> bytes:
        path = checkpoint / name
        tensors = {key: torch.zeros_like(value) for key, value in safetensors.torch.load_file(path).items()}
        path.write_bytes(safetensors.torch.save(tensors))
        reseal(checkpoint)
        assert generate(capsys, "sample", checkpoint, "--out", tmp_path / "out", "--num", 1).returncode == 0
        return (tmp_path / "out" / "000000.png").read_bytes()

    assert generate(capsys, "sample", run("VAEGAN"), "--out", tmp_path / "whole", "--num", 1).returncode == 0
    whole = (tmp_path / "whole" / "000000.png").read_bytes()
    assert zero("decoder.safetensors") == whole
    assert zero("ema.decoder.safetensors") != whole


def test_reconstructions_stand_beside_a_folders_images(run, capsys, photos, tmp_path):
    done = generate(capsys, "reconstruct", run("VAEGAN"), "--out", tmp_path / "out", "--images", photos)
    assert done.returncode == 0, done.err
    made = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert made == {"a.png", "b.jpg.png", "b.png.png", "deep/er/c.png"}
    both = pixels(tmp_path / "out" / "b.png.png")
    assert both.shape == (32, 64)
    assert torch.equal(both[:, :32], pixels(photos / "b.png"))
    system, image = models.load(run("VAEGAN")), torch.zeros(64, 1, 32, 32)
    image[0, 0] = normalize(both[:, :32])
    assert torch.equal(both[:, 32:], to_uint8(system.reconstruct(image))[0, 0])
    limited = generate(
        capsys, "reconstruct", run("VAEGAN"), "--out", tmp_path / "two", "--images", photos, "--num", "2"
    )
    assert "2 PNGs written" in limited.out
    assert (tmp_path / "two" / "a.png").read_bytes() == (tmp_path / "out" / "a.png").read_bytes()


def test_reconstructions_of_shards_are_numbered(run, capsys, digits, tmp_path):
    shards = ["--images", digits / "test"]
    done = generate(capsys, "reconstruct", run("VAEGAN"), "--out", tmp_path / "out", *shards, "--num", "66")
    assert "66 PNGs written" in done.out, done.err
    real = read(Shards(digits / "test"), np.array([65]), 32, 1).image[0, 0]
    assert torch.equal(pixels(tmp_path / "out" / "000065.png")[:, :32], real)
    grid = generate(capsys, "reconstruct", run("VAEGAN"), "--out", tmp_path / "grid", *shards, "--grid", "--num", "4")
    newest = run("VAEGAN") / "checkpoints" / "step_00000003"
    assert grid.out == f"{tmp_path / 'grid' / 'reconstruct.png'}: 1 PNG written, by {newest}\n", grid.err
    assert Image.open(tmp_path / "grid" / "reconstruct.png").size == (3 * 66 - 2, 20 + 4 * 66 - 2)


def test_strips_end_at_the_reconstructions_or_samples(run, capsys, photos, tmp_path):
    out = ["--out", tmp_path / "out"]
    files = [photos / "a.webp", photos / "deep" / "er" / "c.png"]
    assert generate(capsys, "interpolate", run("VAEGAN"), *out, "--between", *files).returncode == 0
    shown = strip(tmp_path / "out" / "a_to_c.png")
    assert len(shown) == 9
    assert generate(capsys, "reconstruct", run("VAEGAN"), *out, "--images", photos).returncode == 0
    assert torch.equal(shown[0], pixels(tmp_path / "out" / "a.png")[:, 32:])
    assert torch.equal(shown[-1], pixels(tmp_path / "out" / "deep" / "er" / "c.png")[:, 32:])
    for system in ("VAEGAN", "GAN"):
        between = ["--between", "2", "65", "--seed", "7", "--steps", "70"]
        classes = ["--classes", "4"] if system == "GAN" else []
        assert generate(capsys, "interpolate", run(system), *out, *between, *classes).returncode == 0
        assert generate(capsys, "sample", run(system), *out, "--num", "66", "--seed", "7", *classes).returncode == 0
        shown = strip(tmp_path / "out" / "2_to_65.png")
        assert len(shown) == 70
        assert torch.equal(shown[0], pixels(tmp_path / "out" / "000002.png"))
        assert torch.equal(shown[-1], pixels(tmp_path / "out" / "000065.png"))
    path = ["--between", "2", "65", "7", "--seed", "7", "--steps", "3"]
    assert generate(capsys, "interpolate", run("GAN"), *out, *path, "--classes", "4").returncode == 0
    corners = strip(tmp_path / "out" / "2_to_65_to_7.png")
    assert len(corners) == 5
    for corner, name in zip(corners[::2], ("000002", "000065", "000007"), strict=True):
        assert torch.equal(corner, pixels(tmp_path / "out" / f"{name}.png"))


def test_translations_stand_beside_their_originals(run, capsys, digits, photos, tmp_path):
    for direction in ("a2b", "b2a"):
        arguments = ["--direction", direction, "--images", photos, "--out", tmp_path / direction]
        done = generate(capsys, "translate", run("CycleGAN"), *arguments)
        assert "4 PNGs written" in done.out, done.err
        both = pixels(tmp_path / direction / "b.png.png")
        image = torch.zeros(64, 1, 32, 32)
        image[0, 0] = normalize(both[:, :32])
        assert torch.equal(both[:, 32:], to_uint8(models.load(run("CycleGAN")).translate(image, direction))[0, 0])
    assert (tmp_path / "a2b" / "a.png").read_bytes() != (tmp_path / "b2a" / "a.png").read_bytes()


def test_the_command_line_as_a_program(run, forked, tmp_path):
    argv = ["trainer.generate", "sample", str(run("GAN")), "--out", str(tmp_path / "out"), "--num", "2"]
    code = f"import runpy, sys\nsys.argv, sys.stderr = {argv!r}, open({str(tmp_path / 'errors')!r}, 'w')\n"
    done = forked(f"{code}runpy.run_module('trainer.generate', run_name='__main__')").wait()
    assert done.returncode == 0, (tmp_path / "errors").read_text()
    assert (tmp_path / "errors").read_text() == "", "no bar where there is no terminal"
    assert done.stderr.startswith(f"{tmp_path / 'out'}: 2 PNGs written, by ")


@pytest.mark.parametrize(
    ("system", "arguments", "words"),
    [
        (
            "GAN",
            ["reconstruct", "RUN", "--images", "PHOTOS"],
            "GAN cannot reconstruct: choose sample or decode or interpolate",
        ),
        (
            "GAN",
            ["interpolate", "RUN", "--between", "a.png", "b.png", "--classes", "1"],
            "GAN has no encoder, so --between needs the numbers of two samples, such as 0 1; got a.png",
        ),
        (
            "GAN",
            ["interpolate", "RUN", "--between", "1", "2"],
            "interpolate needs --classes, as the system was trained",
        ),
        ("GAN", ["interpolate", "RUN", "--between", "1", "2", "--classes", "1,2"], "--classes names 2 classes, and a"),
        ("GAN", ["sample", "RUN", "--classes", "3,10"], "--classes 10: the system was trained with classes 0 to 9"),
        ("GAN", ["sample", "RUN", "--classes", "three"], "--classes"),
        ("VAEGAN", ["sample", "RUN", "--classes", "3"], "--classes 3: the system was trained with no classes: leave"),
        ("GAN", ["interpolate", "RUN"], "required: --between"),
        ("GAN", ["interpolate", "RUN", "--between", "1", "--classes", "1"], "--between needs two or more ends; got 1"),
        (
            "GAN",
            ["interpolate", "RUN", "--between", "1", "2", "--steps", "1", "--classes", "1"],
            "--steps is 1, expected at least 2",
        ),
        ("GAN", ["sample", "nowhere"], "nowhere does not exist"),
        ("GAN", ["sample", "RUN", "--num", "0"], "--num"),
        ("GAN", ["sample", "RUN", "--device", "abacus"], "--device abacus cannot be used"),
        ("GAN", ["sample", "RUN", "--out", "PHOTOS/a.webp"], "is a file: name a folder"),
        ("GAN", ["paint", "RUN"], "paint"),
        ("CycleGAN", ["sample", "RUN"], "CycleGAN cannot sample: choose translate"),
        ("CycleGAN", ["translate", "RUN", "--images", "PHOTOS"], "required: --direction"),
        ("VAEGAN", ["translate", "RUN", "--images", "PHOTOS", "--direction", "a2b"], "VAEGAN cannot translate"),
        ("VAEGAN", ["reconstruct", "RUN", "--images", "nowhere"], "--images nowhere is not a folder"),
        ("VAEGAN", ["reconstruct", "RUN", "--images", "RUN/checkpoints"], "holds no images"),
        ("VAEGAN", ["reconstruct", "RUN", "--images", "PHOTOS", "--out", "PHOTOS"], "name a folder outside it"),
        ("GAN", ["sample", "RUN", "--sampler", "resample"], "--sampler resample is fitted to codes, and GAN has"),
        ("GAN", ["sample", "RUN", "--truncation", "0"], "--truncation"),
        ("GAN", ["sample", "RUN", "--grid", "--shards"], "--grid has no effect on --shards"),
        ("GAN", ["interpolate", "RUN", "--between", "1", "2", "--fps", "3"], "--fps has no effect on a strip"),
        ("GAN", ["edit", "RUN", "--with", "1"], "GAN cannot edit: choose sample or decode or interpolate"),
        ("VAEGAN", ["sample", "RUN", "--train", "PHOTOS"], "--train has no effect on --sampler prior"),
        ("VAEGAN", ["sample", "RUN", "--sampler", "resample", "--components", "3"], "--components has no effect"),
        ("VAEGAN", ["sample", "RUN", "--sampler", "mixture", "--train_num", "14"], "than 14; there are 14"),
        ("VAEGAN", ["edit", "RUN", "--with", "10"], "--with 10: expected one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (
            "VAEGAN",
            ["edit", "RUN", "--with", "1", "--without", "nine"],
            "--without nine: expected one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        ),
        (
            "VAEGAN",
            ["edit", "RUN", "--with", "1", "--images", "PHOTOS", "--truncation", "2"],
            "--truncation has no effect on --images",
        ),
        ("VAEGAN", ["neighbours", "RUN", "--train_num", "3"], "--nearest 7 needs as many training images; there are 3"),
        ("VAEGAN", ["interpolate", "RUN", "--between", "PHOTOS/a.webp", "no.png"], "image no.png: No such file"),
    ],
)
def test_refusals_are_one_message(run, capsys, photos, tmp_path, system, arguments, words):
    places = {"RUN": str(run(system)), "PHOTOS": str(photos)}
    for short, place in places.items():
        arguments = [argument.replace(short, place) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    done = generate(capsys, *arguments)
    assert done.returncode == 2
    assert done.err.startswith("error: ")
    assert words in done.err
    assert len(done.err.splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_read_are_named_and_the_others_are_used(run, capsys, photos, tmp_path):
    assert generate(capsys, "reconstruct", run("VAEGAN"), "--out", tmp_path / "all", "--images", photos).returncode == 0
    truncated = (photos / "b.png").read_bytes()[:60]
    (photos / "aa.png").write_bytes(truncated)
    (photos / "bad.png").write_bytes(b"no")
    done = generate(capsys, "reconstruct", run("VAEGAN"), "--out", tmp_path / "out", "--images", photos)
    assert done.returncode == 1
    said = f"error: 2 of the images of --images {photos} could not be read, and the others were used: "
    assert done.err.startswith(said)
    broken, alien = re.findall(r"cannot read the image (\S+): ([^;]*)", done.err)
    assert broken[0] == str(photos / "aa.png")
    assert broken[1].startswith("image file is truncated")
    assert alien[0] == str(photos / "bad.png")
    assert alien[1].startswith("it is no image of a known kind (PNG, ")
    assert done.err.count("\n") == 1
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("out", "all")]
    assert files[0] == files[1]


def test_a_prepared_folder_stands_for_its_held_out_images(run, digits):
    generator = Generator(run("VAEGAN"), "reconstruct")
    first = [next(given(generator, folder, 3, [])).images for folder in (digits, digits / "test", digits / "train")]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["smaple", "RUN"], "(did you mean sample?)"),
        (["sample", "RUN", "--gird"], "(did you mean --grid?)"),
        (["sample", "RUN", "extra", "--gird"], "(did you mean --grid?)"),
        (["sample", "RUNS"], ": did you mean RUN?"),
    ],
)
def test_what_was_perhaps_meant_is_named(run, capsys, tmp_path, arguments, meant):
    folder = str(run("GAN"))
    done = generate(capsys, *(word.replace("RUN", folder) for word in arguments), "--out", tmp_path)
    assert done.returncode == 2
    assert meant.replace("RUN", folder) in done.err.splitlines()[0]


@pytest.mark.parametrize("words", [["--sampler", "resampled"], ["--strength", "2"]])
def test_no_option_of_another_kind_or_command_is_named(run, capsys, tmp_path, words):
    done = generate(capsys, "sample", run("GAN"), "--out", tmp_path, *words)
    assert done.returncode == 2
    assert "did you mean" not in done.err


def test_images_keep_their_numbers_where_others_are_left_out(run, photos):
    """The classes of --classes are given by number."""
    (photos / "aa.png").write_bytes(b"no")
    left_out = list[str]()
    (found,) = given(Generator(run("VAEGAN"), "reconstruct"), photos, None, left_out)
    assert found.names == ["a", "b.jpg", "b.png", "deep/er/c"]
    assert found.numbers == [0, 2, 3, 4]
    assert len(found.images) == 4
    assert len(left_out) == 1


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("VAEGAN", ["reconstruct", "--grid"]),
        ("VAEGAN", ["neighbours", "--train_num", "9"]),
        ("CycleGAN", ["translate", "--direction", "a2b", "--whole"]),
    ],
    ids=["grid", "neighbours", "whole"],
)
def test_a_folder_without_a_readable_image_is_refused(run, capsys, tmp_path, system, words):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        (photos / name).write_bytes(b"no")
    command, *options = words
    done = generate(capsys, command, run(system), "--out", tmp_path / "out", "--images", photos, *options)
    assert done.returncode == 2
    assert done.err.startswith(f"error: cannot read the image {photos / 'a.png'}: it is no image of a known kind")
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_finite_are_refused(run, capsys, tmp_path):
    checkpoint = shutil.copytree(checkpoint_of(run("GAN")), tmp_path / "copy")
    path = checkpoint / "ema.decoder.safetensors"
    tensors = {key: torch.full_like(value, torch.nan) for key, value in safetensors.torch.load_file(path).items()}
    path.write_bytes(safetensors.torch.save(tensors))
    reseal(checkpoint)
    done = generate(capsys, "sample", checkpoint, "--out", tmp_path / "out", "--num", "1")
    assert done.returncode == 2
    assert "not finite: the run has diverged" in done.err


def test_pictures_are_made_in_float32_as_it_is_written(run, capsys, tmp_path, monkeypatch):
    """No TF32 and no algorithms chosen by speed, as in evaluations, whatever was set before."""
    found, sample, folder = [], models.GAN.sample, run("GAN")

    def noting(self, z, *label):
        cudnn = torch.backends.cudnn
        found.append((torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic))
        return sample(self, z, *label)

    monkeypatch.setattr(models.GAN, "sample", noting)
    torch.set_float32_matmul_precision("high")
    try:
        done = generate(capsys, "sample", folder, "--out", tmp_path, "--num", "1")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert done.returncode == 0, done.err
    assert found == [("highest", False, False, True)]


def test_two_lines_give_the_system(run):
    system = models.load(run("VAEGAN"))
    assert isinstance(system, models.VAEGAN)
    assert not system.training
    assert not any(parameter.requires_grad for parameter in system.parameters())
    averaged = safetensors.torch.load_file(checkpoint_of(run("VAEGAN")) / "ema.decoder.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in system.decoder.state_dict().items())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", lambda content: b"{"),
        ("manifest.json", lambda content: b"[]"),
        ("manifest.json", lambda content: content.replace(b'"latent_dim": 4', b'"latent_dim": 5')),
        ("ema.decoder.safetensors", lambda content: b"cut short"),
        ("ema.decoder.safetensors", lambda content: content[:-2] + bytes([content[-2] ^ 64]) + content[-1:]),
        ("discriminator_binary.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        ("discriminator_binary.safetensors", None),
    ],
    ids=["cut", "list", "setting", "short", "one bit of an average", "one bit of a network", "missing"],
)
def test_a_damaged_checkpoint_is_named(run, capsys, tmp_path, name, damage):
    checkpoint = shutil.copytree(checkpoint_of(run("GAN")), tmp_path / "copy")
    if damage is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(damage((checkpoint / name).read_bytes()))
    with pytest.raises(ValueError, match=f"checkpoint {checkpoint} cannot be loaded"):
        models.load(checkpoint)
    done = generate(capsys, "sample", checkpoint, "--out", tmp_path / "out", "--num", "1")
    assert (done.returncode, len(done.err.splitlines())) == (2, 1), done.err


def test_no_checkpoint_is_named():
    with pytest.raises(ValueError, match="nowhere does not exist"):
        models.load("nowhere")
