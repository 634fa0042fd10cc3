"""The folder of an export: what opens it, what it states, how training goes on from it, and what is refused."""

import json
import re
import shlex
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import reseal
from generating import run_command
from PIL import Image

import models
from data.loader import read
from data.shards.reader import Shards
from models.load import checkpoint_of
from trainer.checkpoint import files
from trainer.evaluate.command import main as evaluate
from trainer.export import command
from trainer.export.command import main
from trainer.generate.command import main as generate


@pytest.fixture
def export(capsys):
    """Run the command: its exit code, and what it said."""

    return partial(run_command, main, capsys)


def outputs(system: models.System) -> list[torch.Tensor]:
    """What a system makes of some images and of some draws from the prior."""
    generator = torch.Generator().manual_seed(0)
    image, z = torch.rand(3, 1, 32, 32, generator=generator), torch.randn(3, *system.latent_shape, generator=generator)
    made, told = [], system.told(torch.arange(3))
    if system.can("sample"):
        made.append(system.sample(z, *told))
    if system.can("posterior"):
        made += [*system.posterior(image), system.reconstruct(image, *told)]
    if system.can("translate"):
        made += [system.translate(image, "a2b"), system.translate(image, "b2a")]
    return made


@pytest.mark.parametrize("name", ["AE", "VAE", "VAEGAN", "GAN", "GANVAE", "CycleGAN"])
def test_an_export_of_each_system_computes_what_the_run_does(export, tiny_run, tmp_path, name):
    out, run = tmp_path / "new" / "out", tiny_run(name)
    done = export(run, out, "--num", 20)
    assert done.returncode == 0, done.err
    assert str(out) in done.out
    system, exported = models.load(run), models.load(out)
    assert outputs(exported)
    assert all(map(torch.equal, outputs(exported), outputs(system)))
    assert {*exported.networks()} == {*system.averaged}
    assert {path.stem for path in out.glob("*.safetensors")} == {*system.averaged}
    assert Image.open(out / "pictures.png").size[0] == (10 if name == "GAN" else 12) * 66 - 2
    assert "```python" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert (config["_class_name"], config["image_size"], config["channels"]) == (name, 32, 1)
    assert ("scaling_factor" in config) == system.can("posterior")


def test_diffusers_opens_an_export_of_family_kl(export, tiny_run, tmp_path):
    """The folder holds the weights once, and both ways of opening it give the run's averaged networks."""
    from diffusers import AutoencoderKL  # importing it takes seconds in each process of the tests

    out = tmp_path / "out"
    done = export(tiny_run("kl"), out, "--num", 20)
    assert done.returncode == 0, done.err
    assert [path.name for path in out.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert "AutoencoderKL.from_pretrained" in (out / "README.md").read_text()
    system, theirs = models.load(out), AutoencoderKL.from_pretrained(out)
    assert all(map(torch.equal, outputs(system), outputs(models.load(tiny_run("kl")))))
    assert {*system.networks()} == {"encoder", "decoder"}
    image = torch.rand(3, 1, 32, 32) * 2 - 1
    mean, log_variance = system.posterior(image)
    with torch.no_grad():
        latents = theirs.encode(image).latent_dist
        found = (latents.mean, latents.logvar, theirs.decode(mean).sample)
    for own, other in zip((mean, log_variance, system.sample(mean)), found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)  # the same operations in the same order
    config = json.loads((out / "config.json").read_text())
    assert theirs.config.scaling_factor == config["scaling_factor"]
    assert [*theirs.config.latents_std] == config["latents_std"]


@pytest.mark.parametrize("name", ["AE", "VAEGAN"])
def test_the_scaling_factor_is_one_over_the_deviation_of_the_latents(export, tiny_run, digits, tmp_path, name):
    """By hand, from draws of z of the same images: the error of a mean of n draws is about 1 / sqrt(n) deviations."""
    assert export(tiny_run(name), tmp_path / "out", "--num", 359, "--images", digits / "test").returncode == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    system = models.load(tiny_run(name))
    image = read(Shards(digits / "test"), np.arange(359), 32, 1).image.float() / 127.5 - 1
    mean, log_variance = (part.double() for part in system.posterior(image))
    draws = torch.stack([mean + (log_variance / 2).exp() * torch.randn_like(mean) for _ in range(100)]).flatten(0, 1)
    each = draws.transpose(0, 1).flatten(1)
    error = 5 / (each.shape[1] ** 0.5)
    assert config["scaling_factor"] == pytest.approx(1 / draws.std().item(), rel=error)
    assert config["shift_factor"] == pytest.approx(draws.mean().item(), abs=error * draws.std().item())
    assert config["latents_mean"] == pytest.approx(each.mean(1).tolist(), abs=error * each.std().item())
    assert config["latents_std"] == pytest.approx(each.std(1).tolist(), rel=error)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{config['scaling_factor']:.5g}" in card
    assert f"are those of each {'channel' if name == 'kl' else 'number'}." in card


def test_other_commands_accept_an_export(export, tiny_run, tmp_path, capsys):
    assert export(tiny_run("VAEGAN"), tmp_path / "out", "--num", 0).returncode == 0
    for place in (tiny_run("VAEGAN"), tmp_path / "out"):
        generate(["sample", str(place), "--out", str(tmp_path / place.name), "--num", "2"])
        evaluate([str(place), "--extractor", "demo-random", "--num", "2", "--metrics", "fid", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    scores = [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]
    assert scores[0] | {"checkpoint": ""} == scores[1] | {"checkpoint": ""}
    again = [(tmp_path / name / "000001.png").read_bytes() for name in (tiny_run("VAEGAN").name, "out")]
    assert again[0] == again[1]
    assert export(tmp_path / "out", tmp_path / "copy", "--num", 0).returncode == 0, "an export of an export"
    assert (tmp_path / "copy" / "decoder.safetensors").read_bytes() == (
        tmp_path / "out" / "decoder.safetensors"
    ).read_bytes()


def test_the_card_draws_new_images_and_a_missing_score_is_told(export, tiny_run, digits, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run("VAEGAN"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    done = export(run, "my out", "--num", 0)
    assert done.err.count("warning: ") == 1
    assert "step_00000003 has no scores" in done.err
    assert f"`python -m trainer.evaluate {run}/checkpoints/step_00000003`\n" in done.err
    card = (tmp_path / "my out" / "README.md").read_text()
    assert f"fingerprint of the shards {Shards(digits / 'train').fingerprint()}\n" in card
    photo, python, command = (
        part.strip() for part in re.findall(r"^```(?:python)?\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    )
    turned, exif = Image.new("RGB", (80, 40)), Image.Exif()
    turned.paste((255, 255, 255), (40, 0, 80, 40))
    exif[0x0112] = 6  # orientation: to be turned to the right, so that its white half comes below
    turned.save("photo.jpg", exif=exif)
    exec(photo, made := {})
    assert made["image"].shape == (1, 1, 32, 32)
    assert (made["image"][..., :12, :] < -0.9).all()
    assert (made["image"][..., 20:, :] > 0.9).all()
    exec(python, made)
    assert (made["reconstruction"].shape, made["new"].shape) == ((1, 1, 32, 32), (16, 1, 32, 32))
    _, _, _, *arguments = shlex.split(command)
    generate(arguments)
    assert len([*(tmp_path / "samples").rglob("*.png")]) == 100

    scored = run / "checkpoints" / "step_00000002"
    scored.mkdir()
    (scored / "scores.json").write_text(json.dumps({"scores": {"eval/fid9/a": 1.0}, "evaluation": {}}))
    assert f"or export {scored}, the newest that has some\n" in export(run, "more", "--num", 0).err
    shutil.copy(scored / "scores.json", run / "checkpoints" / "step_00000003")
    assert "warning" not in export(run, "last", "--num", 0).err


def test_training_goes_on_from_a_full_export_as_from_the_run(export, here, tiny_run, tmp_path):
    """The next step gives the same networks, averages and optimizers to the bit."""
    run = shutil.copytree(tiny_run("VAEGAN"), tmp_path / "run")
    assert export(run, tmp_path / "out", "--num", 0, "--full").returncode == 0
    training = tmp_path / "out" / "training"
    for place in (run, training):
        done = here("--config", place / "config.yaml", "--trainer.run_dir", place, "--trainer.steps", 4, small=[])
        assert done.returncode == 0, done.stderr
        assert "Resuming at step 3 of 4" in done.stderr
    (tensors, manifest), (others, other) = (
        files.load(place / "checkpoints" / "step_00000004") for place in (run, training)
    )
    assert {"discriminator_binary", "ema.encoder", "optimizer.binary", "optimizer.autoencoder"} < tensors.keys()
    assert tensors.keys() == others.keys()
    for file, content in tensors.items():
        assert content.keys() == others[file].keys()
        assert all(torch.equal(value, others[file][name]) for name, value in content.items()), file
    assert manifest["data"] == other["data"]
    assert all(map(torch.equal, outputs(models.load(training)), outputs(models.load(run))))
    assert not all(map(torch.equal, outputs(models.load(training)), outputs(models.load(tmp_path / "out"))))
    assert f"{training} has been trained in" in export(run, tmp_path / "out", "--num", 0, "--overwrite").err


@pytest.mark.parametrize("name", ["checkpoints/step_00000003/optimizer.binary.safetensors", "demo-cnn-v1.safetensors"])
def test_no_link_out_of_a_strangers_run_is_followed(export, tiny_run, tmp_path, name):
    """Whoever publishes a stranger's run with all its files must not publish others of this machine."""
    run, private = shutil.copytree(tiny_run("VAEGAN"), tmp_path / "run"), tmp_path / "private"
    private.write_text("a secret")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(private)
    refused = export(run, tmp_path / "out", "--num", 0, "--full")
    assert refused.returncode == 2
    assert f"{run / name} is a link or another special file, and is not copied" in refused.err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "private"}


def test_a_damaged_file_is_not_copied(export, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run("VAEGAN"), tmp_path / "run")
    with (checkpoint_of(run) / "optimizer.binary.safetensors").open("ab") as file:
        file.write(b"x")
    refused = export(run, tmp_path / "out", "--num", 0, "--full")
    assert refused.err.startswith("error: optimizer.binary.safetensors does not match its checksum")
    assert not (tmp_path / "out").exists()


def test_an_older_export_is_replaced_on_request_alone(export, tiny_run, tmp_path):
    run, out = tiny_run("GAN"), tmp_path / "out"
    out.mkdir()
    assert export(run, out, "--num", 0).returncode == 0
    (out / "old").touch()
    refused = export(run, out, "--num", 0)
    assert refused.returncode == 2
    assert refused.err == f"error: {out} is an export already: replace it with --overwrite, or name a new folder\n"
    assert export(run, out, "--num", 0, "--overwrite").returncode == 0
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for other in (run, checkpoint_of(run)):
        refused = export(run, other, "--num", 0, "--overwrite")
        assert refused.err == f"error: {other} exists and is no export: name a new folder\n"
        assert models.load(run)


def test_a_failure_leaves_nothing_behind_and_the_older_export_in_place(export, tiny_run, tmp_path, monkeypatch):
    run, out = tiny_run("GAN"), tmp_path / "out"
    assert export(run, out, "--num", 0).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "card", full)
    for place in (out, tmp_path / "other"):
        assert export(run, place, "--num", 0, "--overwrite").err == "error: [Errno 28] No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("GAN", ["--images", "x", "--num", "0"], "--images has no effect with --num 0"),
        ("GAN", ["--overwrite"], "is the working directory: name a new folder"),
        ("GAN", ["--private"], "--private has no effect without --push"),
        ("GAN", ["--num", "-1"], "--num"),
        ("GAN", ["--images", "nowhere"], "nowhere"),
        ("CycleGAN", ["--images", "nowhere"], "--images names one set of images, but CycleGAN has two: leave it out"),
    ],
)
def test_mistakes_are_named(export, tiny_run, tmp_path, name, arguments, words):
    done = export(tiny_run(name), "." if "working directory" in words else tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert not [*tmp_path.iterdir()]


def test_without_the_training_data_the_message_names_the_options(export, tiny_run, digits, tmp_path):
    checkpoint = shutil.copytree(checkpoint_of(tiny_run("VAEGAN")), tmp_path / "checkpoint")
    configuration = json.loads((checkpoint / "manifest.json").read_text())["configuration"]
    configuration["data"]["train"] = str(tmp_path / "gone")
    reseal(checkpoint, configuration=configuration)
    done = export(checkpoint, tmp_path / "out")
    assert done.returncode == 2
    assert f"{tmp_path / 'gone'}" in done.err
    assert "with --images, or export without the latents' statistics and without real images by --num 0" in done.err
    assert export(checkpoint, tmp_path / "out", "--images", digits / "test", "--num", 10).returncode == 0
    assert export(checkpoint, tmp_path / "other", "--num", 0).returncode == 0
    assert "scaling_factor" not in json.loads((tmp_path / "other" / "config.json").read_text())


def test_without_an_encoder_the_training_data_are_not_read(export, tiny_run, tmp_path):
    checkpoint = shutil.copytree(checkpoint_of(tiny_run("GAN")), tmp_path / "checkpoint")
    configuration = json.loads((checkpoint / "manifest.json").read_text())["configuration"]
    configuration["data"]["train"] = str(tmp_path / "gone")
    reseal(checkpoint, configuration=configuration)
    done = export(checkpoint, tmp_path / "out")
    assert done.returncode == 0, done.err
