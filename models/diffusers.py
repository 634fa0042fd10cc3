"""Settings and weights of family kl as diffusers' AutoencoderKL has them, both ways; diffusers itself is not needed."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from torch import Tensor

from models.networks.kl import GROUPS, KLDecoder, KLEncoder, level_widths
from models.system import System

Positive = Annotated[int, Meta(ge=1, le=2**16)]
CLASS, DOWN, UP = "AutoencoderKL", "DownEncoderBlock2D", "UpDecoderBlock2D"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
# diffusers' names of weights outside of encoder and decoder, and ours.
QUANT = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # its names before 2023, and now


class ConfigFile(msgspec.Struct):
    """What a config.json says of the networks, with diffusers' own defaults."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: Positive = 4
    layers_per_block: Positive = 1
    block_out_channels: Annotated[list[Positive], Meta(min_length=1, max_length=16)] = msgspec.field(
        default_factory=lambda: [64]
    )
    down_block_types: list[str] = msgspec.field(default_factory=lambda: [DOWN])
    up_block_types: list[str] = msgspec.field(default_factory=lambda: [UP])
    act_fn: str = "silu"
    norm_num_groups: int = GROUPS
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


# What neither encoder nor decoder depends on.
OTHERS = {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return our settings of a config.json: `channels`, `latent_dim` and `networks`, plain data.

    Raises:
        ValueError: it is of another class, or has a value that family kl has not; names it.
    """
    _check(config.get("_class_name") == CLASS, "_class_name", config.get("_class_name"), CLASS)
    for name, value in config.items():
        known = name.startswith("_") or name in OTHERS or name in ConfigFile.__struct_fields__ or value is None
        _check(known, name, value, "a setting that AutoencoderKL is known to have")
    try:
        found = msgspec.convert(config, ConfigFile)
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE}: {error}") from error
    widths, quant = found.block_out_channels, found.use_quant_conv
    fixed = _fixed(len(widths)) | {"out_channels": found.in_channels, "use_post_quant_conv": quant}
    for name, expected in fixed.items():
        value = getattr(found, name)
        same = value == expected or (name, value) == ("act_fn", "swish")  # another name of silu
        _check(same, name, value, f"{expected!r} in family kl")
    _check(1 <= found.in_channels <= 1024, "in_channels", found.in_channels, "1 to 1024")
    multiples = all(wide % widths[0] == 0 for wide in widths)
    _check(multiples, "block_out_channels", widths, "multiples of the first number")
    networks = {"family": "kl", "width": widths[0], "multipliers": [wide // widths[0] for wide in widths]}
    networks |= {"blocks": found.layers_per_block, "quant_conv": quant, "mid_attention": found.mid_block_add_attention}
    return {"channels": found.in_channels, "latent_dim": found.latent_channels, "networks": networks}


def to_diffusers(system: System, **statistics: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of config.json and of the file of weights with which diffusers opens encoder and decoder.

    Args:
        system: has an encoder of means and log-variances and a decoder of family kl
        statistics: further entries of config.json: scaling_factor, shift_factor, latents_mean, latents_std

    Raises:
        ValueError: the system has other networks.
    """
    encoder, decoder = (system.networks().get(name) for name in ("encoder", "decoder"))
    if not isinstance(encoder, KLEncoder) or not isinstance(decoder, KLDecoder):
        raise ValueError(f"{CLASS} has an encoder and a decoder of system.networks.family kl")
    latent_channels = decoder.conv_in.in_channels
    if encoder.conv_out.out_channels != 2 * latent_channels:
        raise ValueError(f"{CLASS} has an encoder of means and log-variances, and a {type(system).__name__} has not")
    networks, channels = encoder.config, encoder.channels
    widths = level_widths(networks)
    config = {"_class_name": CLASS, **_fixed(len(widths)), "block_out_channels": widths}
    config |= {"in_channels": channels, "out_channels": channels, "latent_channels": latent_channels}
    config |= {"layers_per_block": networks.blocks, "mid_block_add_attention": networks.mid_attention}
    config |= {"use_quant_conv": networks.quant_conv, "use_post_quant_conv": networks.quant_conv}
    parts = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    return config | {"sample_size": encoder.image_size} | statistics, join(parts)


def join(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weights of networks by our names as one set of weights by diffusers' names."""
    tensors = {f"{part}.{name}": value for part, weights in parts.items() for name, value in weights.items()}
    return {_renamed(name, {ours: theirs for theirs, ours in QUANT.items()}): value for name, value in tensors.items()}


def split(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return weights by diffusers' names, today's or older ones, as those of networks by our names.

    Weights whose names begin with no network of AutoencoderKL come under the name "".
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        network, dot, rest = _renamed(name, QUANT).partition(".")
        if network not in ("encoder", "decoder") or not dot:
            network, rest = "", name
        elif ".attentions." in rest:
            layer, _, kind = rest.rpartition(".")
            before, _, last = layer.rpartition(".")
            rest = f"{before}.{ATTENTION.get(last, last)}.{kind}"
            value = value[..., 0, 0] if value.dim() == 4 else value  # a 1x1 convolution in yet older files
        parts.setdefault(network, {})[rest] = value
    return parts


def _fixed(levels: int) -> dict[str, Any]:
    """What is the same in each config.json with that number of levels."""
    blocks = {"down_block_types": [DOWN] * levels, "up_block_types": [UP] * levels}
    return {**blocks, "act_fn": "silu", "norm_num_groups": GROUPS}


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)


def _check(fits: bool, name: str, value: object, expected: str) -> None:
    if not fits:
        raise ValueError(f"{CONFIG_FILE}: {name} is {value!r}, expected {expected}")
