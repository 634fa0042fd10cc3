"""Family kl is diffusers' AutoencoderKL: the same outputs, settings and weights, both ways."""

import json

import pytest
import torch

from models import AE, GAN, GANVAE, VAE, VAEGAN, NetworkConfig
from models.diffusers import settings_of, split, to_diffusers
from models.networks.kl import level_widths


def peer(latent_channels: int = 4, quant: bool = True, **settings) -> torch.nn.Module:
    """Stable Diffusion's autoencoder, or FLUX's with 16 channels and no quant_conv, a quarter as wide."""
    from diffusers import AutoencoderKL  # importing it takes seconds in each process of the tests

    torch.manual_seed(7)
    levels = len(settings.setdefault("block_out_channels", (32, 64, 128, 128)))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    settings = {"layers_per_block": 2, "latent_channels": latent_channels} | settings
    return AutoencoderKL(**blocks, use_quant_conv=quant, use_post_quant_conv=quant, **settings).eval()


def ours(settings: dict, kind=VAEGAN, size: int = 32):
    networks = dict(settings["networks"])
    networks["multipliers"] = tuple(networks["multipliers"])
    return kind(size, settings["channels"], settings["latent_dim"], NetworkConfig(**networks))


PEERS = {
    "stable diffusion": lambda: peer(),
    "flux": lambda: peer(16, quant=False),
    "grey, without attention": lambda: peer(
        in_channels=1, out_channels=1, mid_block_add_attention=False, block_out_channels=(32, 96), layers_per_block=1
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_diffusers_weights_give_diffusers_outputs(name):
    theirs = PEERS[name]()
    system = ours(settings_of(json.loads(theirs.to_json_string())))
    for network, weights in split(theirs.state_dict()).items():
        system.get_submodule(network).load_state_dict(weights)
    image = torch.rand(2, theirs.config.in_channels, 32, 32) * 2 - 1
    z = torch.randn(2, *system.latent_shape)
    # The same operations in the same order; in float64 a hundred layers of sums round to far below 1e-10.
    for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        theirs, system, image, z = (value.to(dtype) for value in (theirs, system, image, z))
        with torch.no_grad():
            latents = theirs.encode(image).latent_dist
            found = (*system.posterior(image), system.sample(z))
            for own, expected in zip(found, (latents.mean, latents.logvar, theirs.decode(z).sample), strict=True):
                torch.testing.assert_close(own, expected, rtol=0, atol=error)


@pytest.mark.parametrize("kind", [VAE, GANVAE])
def test_diffusers_opens_what_we_make(kind, tmp_path):
    from diffusers import AutoencoderKL

    system = kind(32, 3, 4, NetworkConfig("kl", 32, latent_stride=4, blocks=1))
    config, weights = to_diffusers(system, scaling_factor=0.5)
    theirs = AutoencoderKL.from_config(config)
    theirs.load_state_dict(weights)
    assert (theirs.config.scaling_factor, theirs.config.sample_size) == (0.5, 32)
    assert settings_of(config) == settings_of(json.loads(theirs.to_json_string()))
    assert level_widths(ours(settings_of(config), kind).encoder.config) == [32, 64, 128]
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(system.sample(z), theirs.eval().decode(z).sample, rtol=0, atol=1e-5)


def test_older_names_of_attention_are_understood():
    weights = peer().state_dict()
    old = {}
    for name, value in weights.items():
        for now, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            if f".{now}." in name:
                name, value = name.replace(now, before), value[..., None, None] if value.dim() == 2 else value
        old[name] = value
    assert old.keys() != weights.keys()
    new, found = split(weights), split(old)
    assert all(torch.equal(value, found[part][name]) for part in new for name, value in new[part].items())
    assert {part: found[part].keys() for part in found} == {part: new[part].keys() for part in new}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel', expected AutoencoderKL"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16, expected 32"),
        ({"act_fn": "relu"}, "act_fn is 'relu', expected 'silu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv is False, expected True"),
        ({"out_channels": 1}, "out_channels is 1, expected 3"),
        ({"in_channels": 0, "out_channels": 0}, "in_channels is 0, expected 1 to 1024"),
        ({"block_out_channels": [64, 96, 128, 128]}, "block_out_channels"),
        ({"temporal": True}, "temporal is True"),
        ({"block_out_channels": "wide"}, "block_out_channels"),
    ],
)
def test_what_family_kl_cannot_represent_is_refused_by_name(entry, words):
    with pytest.raises(ValueError, match=words):
        settings_of(json.loads(peer().to_json_string()) | entry)


def test_systems_without_such_networks_are_refused():
    kl = NetworkConfig("kl", 32, latent_stride=4)
    for system in (AE(32, 3, 4, kl), GAN(32, 3, 4, kl), VAE(32, 3)):
        with pytest.raises(ValueError, match="AutoencoderKL has an encoder"):
            to_diffusers(system)
