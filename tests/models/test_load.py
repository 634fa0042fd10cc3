"""models.load of checkpoints that are written here: which weights it takes, and which settings it understands."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from systems_under_test import aligned, vit_file

import models
from models import GAN, VAE, VAEGAN, CodesConfig, CycleGAN, DiscriminatorConfig, NetworkConfig, OptimizerConfig
from models.load import checkpoint_of, find_system, import_paths, settings_types, system_names
from trainer.checkpoint import writer
from trainer.ema import EMA

NETWORKS = {"family": "dcgan", "width": 8}
SMALL = NetworkConfig("dcgan", 8)


def saved(folder: Path, system: models.System, settings: dict, step: int = 3, averaged: float | None = 0.5) -> Path:
    """A checkpoint of a system, whose averaged weights are all the same number."""
    tensors = {name: network.state_dict() for name, network in system.networks().items()}
    if averaged is not None:
        ema = EMA(system, 10, 1).system
        for parameter in ema.parameters():
            torch.nn.init.constant_(parameter, averaged)
        tensors |= {f"ema.{name}": network.state_dict() for name, network in ema.named_children()}
    if statistics := system.statistics():
        tensors["statistics"] = statistics
    stated = {"class_path": f"models.{type(system).__name__}", "init_args": settings}
    return writer.save(folder / "checkpoints", step, tensors, {"configuration": {"system": stated}})


def test_averaged_weights_are_taken_where_there_are_any(tmp_path):
    system = VAEGAN(
        *((32, 48), 1, 4, SMALL, "both"),
        binary=DiscriminatorConfig(lecam_weight=0.1, spectral_norm=True),
        ternary=DiscriminatorConfig(lr=1e-3, augment=("color",)),
        class_weights=(2.0, 1.0, 1.0),
    )
    torch.nn.init.constant_(system.lecam_discriminator_binary, 0.75)
    settings = {"image_size": [32, 48], "channels": 1, "latent_dim": 4, "networks": NETWORKS, "discriminator": "both"}
    settings |= {"binary": {"lecam_weight": 0.1, "spectral_norm": True}, "ternary": {"lr": 1e-3, "augment": ["color"]}}
    settings |= {"class_weights": [2.0, 1.0, 1.0], "feature_layer": None, "perceptual": "lpips"}
    settings |= {"perceptual_weight": 0.0, "perceptual_weights": None}
    path = saved(tmp_path, system, settings)
    loaded = models.load(tmp_path)
    assert type(loaded) is VAEGAN
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name in ("encoder", "decoder"):
        assert all((value == 0.5).all() for value in loaded.get_submodule(name).parameters())
    for name in ("discriminator_binary", "discriminator_ternary"):
        own = system.get_submodule(name).state_dict()
        found = loaded.get_submodule(name).state_dict()
        assert found.keys() == own.keys()
        assert all(torch.equal(found[key], value) for key, value in own.items())
    assert loaded.lecam_discriminator_binary.tolist() == [0.75, 0.75]
    binary, ternary, _ = loaded.players()
    assert (binary.optimizer, ternary.optimizer) == (
        DiscriminatorConfig(lecam_weight=0.1, spectral_norm=True),
        DiscriminatorConfig(lr=1e-3, augment=("color",)),
    )
    assert loaded.adversaries["ternary"].class_weights == (2.0, 1.0, 1.0)
    assert torch.equal(models.load(path).encoder.head.bias, loaded.encoder.head.bias)


def test_weights_are_taken_as_they_are_where_there_is_no_average(tmp_path):
    system = GAN(32, 1, 4, SMALL)
    saved(tmp_path, system, {"image_size": 32, "channels": 1, "latent_dim": 4, "networks": NETWORKS}, averaged=None)
    loaded = models.load(tmp_path)
    assert torch.equal(loaded.decoder.stem.bias, system.decoder.stem.bias)


def test_a_trained_perceptual_loss_is_needed_no_more(tmp_path):
    system = VAEGAN(32, 1, 4, SMALL)
    settings = {"image_size": 32, "channels": 1, "latent_dim": 4, "networks": NETWORKS}
    saved(tmp_path, system, settings | {"perceptual": "convnext", "perceptual_weight": 1, "perceptual_weights": "gone"})
    assert models.load(tmp_path).perceptual_weight == 0


def test_a_file_of_features_is_needed_no_more(tmp_path):
    networks, codes = replace(SMALL, latent_stride=8), aligned(CodesConfig())
    config = DiscriminatorConfig(r1_weight=0.0, dino_weights=vit_file())
    system = VAEGAN(32, 1, 4, networks, binary=config, codes=codes)
    settings = {"image_size": 32, "channels": 1, "latent_dim": 4, "networks": NETWORKS | {"latent_stride": 8}}
    settings |= {
        "binary": {"r1_weight": 0, "dino_weights": "gone"},
        "codes": {"alignment": 0.1, "dino_weights": "gone"},
    }
    saved(tmp_path, system, settings)
    loaded = models.load(tmp_path)
    assert dict(loaded.named_children()).keys() == {"encoder", "decoder"}
    assert loaded.alignment_weight == 1


def test_the_newest_checkpoint_is_a_runs(tmp_path):
    settings = {"image_size": 32, "channels": 1, "latent_dim": 4, "networks": NETWORKS}
    paths = [saved(tmp_path, VAE(32, 1, 4, SMALL), settings, step, averaged=step) for step in (9, 100, 20)]
    assert checkpoint_of(tmp_path) == checkpoint_of(str(tmp_path)) == paths[1]
    assert checkpoint_of(paths[0]) == paths[0]
    assert (models.load(tmp_path).decoder.stem.bias == 100).all()
    with pytest.raises(ValueError, match=r"checkpoints is neither a checkpoint nor a run's folder with one"):
        checkpoint_of(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_dims": 4}, "system.init_args: Object contains unknown field `latent_dims`"),
        ({"networks": {"widths": 8}}, "system.init_args.networks has unknown settings: widths"),
        ({"latent_dim": "4"}, r"system.init_args: Expected `int`, got `str` - at `\$.latent_dim`"),
        ({"likelihood": "cauchy"}, "system.init_args: Invalid enum value 'cauchy'"),
        (
            {"latent_dim": 5},
            "ema.encoder.safetensors does not fit the system's settings: "
            r"head.bias is float32 \[8\] in the file, expected float32 \[10\]",
        ),
        ({"latent_dim": 0}, "system.latent_dim is 0, expected more than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, change, words):
    settings = {"image_size": 32, "channels": 1, "latent_dim": 4, "networks": NETWORKS} | change
    path = saved(tmp_path, VAE(32, 1, 4, SMALL), settings)
    with pytest.raises(ValueError, match=f"^checkpoint {path} cannot be loaded: {words}") as refused:
        models.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_setting_that_must_be_stated_is_named(tmp_path):
    saved(tmp_path, VAE(32, 1, 4, SMALL), {"image_size": 32})
    with pytest.raises(ValueError, match="Object missing required field `channels`"):
        models.load(tmp_path)


def test_a_system_has_the_names_that_it_is_imported_by():
    assert system_names() == ["AE", "CycleGAN", "GAN", "GANVAE", "VAE", "VAEGAN"]
    for name in ("CycleGAN", "models.CycleGAN", "models.systems.cyclegan.CycleGAN"):
        assert find_system(name) is CycleGAN
    assert import_paths(CycleGAN) == [
        *("models.CycleGAN", "models.systems.CycleGAN", "models.systems.cyclegan.CycleGAN")
    ]
    with pytest.raises(
        ValueError, match=r"^system.class_path is 'gan.GAN', expected one of AE, CycleGAN, GAN, GANVAE, VAE, VAEGAN$"
    ):
        find_system("gan.GAN")


def test_settings_within_settings_are_found():
    assert settings_types(VAE) == [NetworkConfig, OptimizerConfig, CodesConfig]
    discriminators = [DiscriminatorConfig, DiscriminatorConfig]
    of_vaegan = [NetworkConfig, OptimizerConfig, *discriminators, CodesConfig]
    assert settings_types(VAEGAN) == of_vaegan, "those that may be unset, too"
