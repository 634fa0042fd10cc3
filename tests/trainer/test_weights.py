"""Runs that start from weights: what is loaded, implied, refused and recorded; and networks that stay as they were."""

import hashlib
import json
import os
import shutil
import unittest.mock
from pathlib import Path

import huggingface_hub
import msgspec
import pytest
import safetensors.torch
import torch
from test_run import alike

import models
from models import VAEGAN, NetworkConfig
from models.manifest import checkpoints
from trainer.checkpoint import files
from trainer.config.parser import parser
from trainer.export.command import main as export
from trainer.weights import implied_settings, start_from

SMALL = NetworkConfig("dcgan", 8)
KL_NETWORKS = NetworkConfig("kl", multipliers=(1, 1, 1), patches=True)
KL = ["--system", "VAEGAN", "--system.networks.patches", "true", "--trainer.batch_size", "4"]
# A decoder alone is trained, with the rate of 1e-2, so that even a few steps change it visibly.
FINE = ["--trainer.train_only", "decoder", "--system.autoencoder.lr", "1e-2", "--trainer.ema_half_life", "8"]


SAY_WRAPPED = """
import sys
from trainer.train import Run
from torch.nn.parallel import DistributedDataParallel as DDP
announce = Run._announce
def say(self):
    children = self.parts.system.named_children()
    print("wrapped:", sorted(name for name, child in children if isinstance(child, DDP)), file=sys.stderr)
    announce(self)
Run._announce = say
"""


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Path:
    """A folder of diffusers: an AutoencoderKL of grey images in two sizes, as light as can be."""
    from diffusers import AutoencoderKL  # importing it takes seconds in each process of the tests

    torch.manual_seed(3)
    levels = {"block_out_channels": (32, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 3}
    levels["up_block_types"] = ("UpDecoderBlock2D",) * 3
    network = AutoencoderKL(1, 1, latent_channels=2, mid_block_add_attention=True, **levels)
    network.save_pretrained(folder := tmp_path_factory.mktemp("weights") / "grey")
    return folder


def trained(run: Path) -> dict[str, torch.Tensor]:
    tensors, _ = files.load(checkpoints(run / "checkpoints")[0])
    return {f"{file}/{name}": value for file, part in tensors.items() for name, value in part.items()}


def differing(one: dict, other: dict) -> set[str]:
    """The files in which two checkpoints differ."""
    assert one.keys() == other.keys()
    return {key.partition("/")[0] for key in one if not torch.equal(one[key], other[key])}


def test_a_decoder_is_fine_tuned_from_a_folder_of_diffusers_which_a_resumed_run_does_not_need(here, grey, tmp_path):
    from diffusers import AutoencoderKL

    folder = shutil.copytree(grey, tmp_path / "grey")
    run, whole = ([*KL, *FINE, "--trainer.init_from", folder, "--trainer.run_dir", tmp_path / name] for name in "ab")
    first = here(*run, "--trainer.steps", "1", small=[])
    assert first.returncode == 0, first.stderr
    at_1 = trained(tmp_path / "a")
    assert here(*whole, "--trainer.steps", "2", small=[]).returncode == 0
    shutil.rmtree(folder)
    second = here(*run, "--trainer.steps", "2", small=[])
    assert second.returncode == 0, second.stderr
    assert "weights of" not in second.stderr
    at_2 = trained(tmp_path / "a")
    assert not differing(at_2, trained(tmp_path / "b")), "a resumed run equals an uninterrupted one"

    theirs = AutoencoderKL.from_pretrained(grey)
    encoder = theirs.encoder.state_dict()
    encoder |= {f"quant_conv.{name}": value for name, value in theirs.quant_conv.state_dict().items()}
    for state in (at_1, at_2):
        for prefix in ("encoder/", "ema.encoder/"):
            assert all(torch.equal(state[prefix + name], value) for name, value in encoder.items()), "bit-identical"
    assert differing(at_1, at_2) == {
        *("decoder", "ema.decoder", "discriminator_binary", "optimizer.autoencoder", "optimizer.binary")
    }
    assert {name.split(".")[0] for name in at_2 if name.startswith("optimizer.autoencoder")} == {"optimizer"}
    assert all("/decoder." in name for name in at_2 if name.startswith("optimizer.autoencoder"))
    assert "encoder 1" in first.stderr
    assert "\n  frozen    encoder " in first.stderr
    assert f"loaded: encoder ({len(encoder)} tensors); decoder" in first.stderr
    assert "missing, so drawn from the seed: discriminator_binary (" in first.stderr
    manifest = json.loads((checkpoints(tmp_path / "a" / "checkpoints")[0] / "manifest.json").read_text())
    assert list(manifest["initial"]["sha256"]) == ["diffusion_pytorch_model.safetensors"]
    assert manifest["configuration"]["system"]["init_args"]["networks"]["multipliers"] == [1, 1, 1]

    other = here(*KL, *FINE, "--trainer.init_from", grey, "--trainer.run_dir", tmp_path / "a", small=[])
    assert other.returncode == 2
    assert f"trainer.init_from: {folder} in the checkpoint, {grey} now" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--system.latent_dim", "3"], "system.latent_dim is 3, and 2 in the weights"),
        (["--system.networks.width", "64"], "system.networks.width is 64, and 32 in the weights"),
        (["--data.channels", "3"], "data.channels is 3, and 1 in the weights"),
        (["--trainer.init_from", "nowhere/at/all/of/it"], "is no folder"),
        (["--trainer.init_averages", "false"], "is no checkpoint with averages"),
        (["--trainer.train_only", "discriminator_binary"], "expected one or more of encoder, decoder"),
        (["--trainer.train_only", "[]"], "expected one or more of encoder, decoder"),
        (["--trainer.train_only", "encoder", "--system.adaptive", "true"], "system.adaptive is true, expected false"),
    ],
)
def test_what_contradicts_the_weights_is_refused_by_name(here, grey, tmp_path, arguments, words):
    run = here(*KL, "--trainer.init_from", grey, "--trainer.run_dir", tmp_path / "run", *arguments, small=[])
    assert run.returncode == 2
    assert words in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("averages", [True, False])
def test_a_run_starts_from_anothers_averages_or_from_its_raw_weights(here, tiny_run, tmp_path, averages):
    source, run = tiny_run("VAE"), tmp_path / "run"
    start = ["--trainer.init_from", source, "--trainer.init_averages", averages, "--trainer.run_dir", run]
    made = here("--system", "VAEGAN", "--system.autoencoder.lr", "1e-12", *start, "--trainer.steps", "1", small=[])
    assert made.returncode == 0, made.stderr
    assert "drawn from the seed: discriminator_binary (" in made.stderr
    before, after = trained(source), trained(run)
    for prefix, same in (("ema.", averages), ("", not averages)):
        tensors = [("encoder", "head.weight"), ("decoder", "stem.weight"), ("decoder", "last.weight")]
        close = [  # an optimizer's step of 1e-12 is nothing beside weights of 1e-2
            torch.allclose(after[f"{network}/{name}"], before[f"{prefix}{network}/{name}"], 1e-5, 1e-9)
            for network, name in tensors
        ]
        assert all(close) == any(close) == same


def test_two_processes_start_from_the_same_weights_and_train_a_decoder_as_one_does(here, ranks, tiny_run, tmp_path):
    source = tiny_run("VAE")
    start = ["--system", "VAEGAN", "--trainer.init_from", source, "--trainer.train_only", "[decoder]"]
    start += ["--trainer.steps", "3", "--trainer.run_dir"]
    assert here(*start, tmp_path / "one").returncode == 0
    two = ranks(*start, tmp_path / "two", processes=2, faults={0: SAY_WRAPPED}).wait()
    assert two.returncode == 0, two.stderr
    assert "wrapped: ['decoder', 'discriminator_binary']" in two.stderr, "DDP would keep buckets for frozen networks"
    assert two.stderr.count("weights of") == 1
    assert alike(tmp_path / "one", tmp_path / "two")
    before, after = trained(source), trained(tmp_path / "two")
    encoder = [name for name in before if name.startswith("ema.encoder/")]
    assert all(torch.equal(after[name], before[name]) for name in encoder)
    assert all(torch.equal(after[name.removeprefix("ema.")], before[name]) for name in encoder)


def test_files_of_single_networks_and_of_other_shapes(tmp_path):
    system, other = VAEGAN(32, 1, 4, SMALL), VAEGAN(32, 3, 4, SMALL)
    for name, tensors in {
        "encoder": {name: value.half() for name, value in other.encoder.state_dict().items()},
        "decoder": other.decoder.state_dict() | {"more": torch.zeros(2)},
        "teacher": {"weight": torch.zeros(3)},
    }.items():
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    first, last = "trunk.0.0.weight", "last.weight"
    kept = system.encoder.state_dict()[first].clone()
    initial = start_from(str(tmp_path), True, system.networks(), VAEGAN)
    _, _, missing, reshaped, unused = initial.lines
    assert unused == "not used: decoder: more; teacher"
    assert f"encoder: {first} [8, 3, 4, 4], expected [8, 1, 4, 4]; decoder: {last} [8, 3, 4, 4]" in reshaped
    assert missing.startswith("missing, so drawn from the seed: discriminator_binary (")
    assert torch.equal(system.encoder.state_dict()[first], kept)
    assert torch.equal(system.encoder.head.weight, other.encoder.head.weight.half().float())
    assert torch.equal(system.decoder.stem.weight, other.decoder.stem.weight)
    digest = hashlib.sha256((tmp_path / "encoder.safetensors").read_bytes()).hexdigest()
    assert initial.record["sha256"]["encoder.safetensors"] == digest
    with pytest.raises(ValueError, match=r"no tensor fits translator_ab.* not used: decoder; encoder; teacher"):
        start_from(str(tmp_path), True, {"translator_ab": system.encoder}, VAEGAN)


def test_pickles_pipelines_and_folders_without_weights_are_refused_with_what_to_do(grey, tmp_path):
    pickle, folder, empty, pipeline = (tmp_path / name for name in ("vae.ckpt", "bin", "empty", "pipeline"))
    pickle.write_bytes(b"a pickle")
    empty.mkdir()
    shutil.copytree(grey, folder)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    shutil.copytree(grey, pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    for path, words in {
        pickle: "is a pickle.* Convert it .*from_single_file",
        folder: "diffusion_pytorch_model.bin is a pickle, .*use_safetensors=False",
        empty: "it has no config.json, manifest.json or NETWORK.safetensors",
        pipeline: "is a pipeline of diffusers: name its autoencoder, such as .*/pipeline/vae",
        grey / "diffusion_pytorch_model.safetensors": "is a file, expected a folder",
    }.items():
        with pytest.raises(ValueError, match=f"{path}: .*{words}"):
            start_from(str(path), True, VAEGAN(32, 1, 2, KL_NETWORKS).networks(), VAEGAN)
    os.mkfifo(pipeline / "vae" / "blocked")
    (pipeline / "vae" / "config.json").unlink()
    (pipeline / "vae" / "blocked").rename(pipeline / "vae" / "config.json")
    with pytest.raises(ValueError, match=r"is a FIFO, and no regular file"):
        implied_settings(str(pipeline / "vae"), True, VAEGAN)


def test_weights_of_the_hub_are_those_of_its_cache_where_there_is_no_network(grey, tmp_path, monkeypatch):
    """The cache is written here as huggingface_hub lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for absent in (", and there is no folder some/vae here", ""):
        with pytest.raises(
            ValueError, match=rf"init_from hf://some/vae: it cannot be had .*\){absent}: download it where"
        ):
            implied_settings("hf://some/vae", True, VAEGAN)
        (tmp_path / "some" / "vae").mkdir(parents=True, exist_ok=True)
    revision = "0" * 40
    (tmp_path / "models--some--vae" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--vae" / "refs" / "main").write_text(revision)
    shutil.copytree(grey, tmp_path / "models--some--vae" / "snapshots" / revision / "vae")
    settings = implied_settings("hf://some/vae/vae", True, VAEGAN)
    assert settings["system"]["init_args"]["latent_dim"] == 2
    with pytest.raises(ValueError, match="has no config"):
        implied_settings("hf://some/vae", True, VAEGAN)
    (tmp_path / "models--some--vae" / "snapshots" / revision / "model_index.json").write_text("{}")
    with (
        unittest.mock.patch("huggingface_hub.snapshot_download", wraps=huggingface_hub.snapshot_download) as download,
        pytest.raises(ValueError, match="is a pipeline of diffusers: name its autoencoder, such as hf://some/vae/vae"),
    ):
        implied_settings("hf://some/vae", True, VAEGAN)
    assert [call.kwargs["allow_patterns"] for call in download.mock_calls] == ["*.json"], "not the pipeline's weights"


def test_a_name_of_the_hub_is_told_from_a_path(tmp_path, monkeypatch):
    def named(value: str) -> str:
        words = ["--system", "VAE", "--data.train", "x", "--trainer.init_from", value]
        return parser().parse_args(words).trainer.init_from

    monkeypatch.chdir(tmp_path)
    assert named("some/vae") == "hf://some/vae"
    assert named("some/model/vae") == "hf://some/model/vae"
    assert named("./some/vae") == str(tmp_path / "some" / "vae")
    (tmp_path / "some" / "vae").mkdir(parents=True)
    assert named("some/vae") == str(tmp_path / "some" / "vae")


def test_an_export_goes_through_diffusers_and_back_into_a_run_unchanged(tiny_run, tmp_path):
    from diffusers import AutoencoderKL

    run, out, back = tiny_run("kl"), tmp_path / "out", tmp_path / "back"
    export([str(run), str(out), "--num", "0"])
    AutoencoderKL.from_pretrained(out).save_pretrained(back)
    trained = models.load(run)
    image = torch.rand(2, 1, 32, 32) * 2 - 1
    for folder in (out, back):
        settings = implied_settings(str(folder), True, VAEGAN)["system"]["init_args"]
        networks = msgspec.convert(settings["networks"], NetworkConfig)
        system = VAEGAN(32, 1, settings["latent_dim"], networks).requires_grad_(False)
        initial = start_from(str(folder), True, system.networks(), VAEGAN)
        assert initial.lines[1].startswith("loaded: encoder (")
        assert [*initial.record["sha256"]] == ["diffusion_pytorch_model.safetensors"]
        assert torch.equal(system.reconstruct(image), trained.reconstruct(image))
