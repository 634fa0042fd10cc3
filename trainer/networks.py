"""How a run calls its networks: the memory layout of their weights, compilation, and distribution."""

import os
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import System
from models.networks import Discriminator
from models.networks.blocks import ResidualBranch
from trainer.config.settings import TrainerConfig

GRAPHS = 64  # most graphs of one kind of network


def set_memory_format(system: System) -> None:
    """Lay out the weights of convolutions in channels_last where it pays, so that convolutions compute in it.

    It does on CUDA, and on CPUs in networks with grouped convolutions (docs/benchmarks.md), unless there is instance
    normalization, with which it was not measured.
    """
    for network in system.children():
        modules, cpu = [*network.modules()], all(weight.device.type == "cpu" for weight in network.parameters())
        pays = not cpu or any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in modules)
        if pays and not any(isinstance(module, nn.InstanceNorm2d) for module in modules):
            for weight in (weight for weight in network.parameters() if weight.dim() == 4):
                weight.data = weight.data.to(memory_format=torch.channels_last)


def checkpoint_activations(system: System, which: bool | list[str]) -> None:
    """Keep of residual blocks only what enters them, and compute the rest again in backward passes.

    Args:
        system: the system
        which: names of its networks; True: all that have residual blocks

    Raises:
        ValueError: there are no such blocks.
    """
    blocks = {
        name: [module for module in network.modules() if isinstance(module, ResidualBranch) and module.recomputable]
        for name, network in system.networks().items()
    }
    able = [name for name, found in blocks.items() if found]
    chosen = able if which is True else which or []
    if (which and not chosen) or not {*chosen} <= {*able}:
        expected = f"true, or some of [{', '.join(able)}]" if able else "false, as no network has residual blocks"
        raise ValueError(f"trainer.activation_checkpointing is {which}, expected {expected}")
    for block in (block for name in chosen for block in blocks[name]):  # no random numbers are drawn in them
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again


def prepare_networks(
    system: System, accelerator: Accelerator, settings: TrainerConfig, frozen: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Change how a system's networks are called, as configured; return them by name, without DDP's wrapper.

    Args:
        system: the system; calls of its networks are changed in place
        accelerator: gives the processes
        settings: of the run
        frozen: networks that no player changes

    Raises:
        ValueError: trainer.activation_checkpointing does not fit the system, or trainer.compile the device.
    """
    graphs, device = settings.compile == "cuda_graphs", accelerator.device.type
    if graphs and device != "cuda":
        raise ValueError(
            f"trainer.compile is cuda_graphs, expected true or false on {device}, which has no CUDA graphs"
        )
    checkpoint_activations(system, settings.activation_checkpointing)
    networks = system.networks()
    if settings.compile:
        keep_compiled_code()
    for name, network in networks.items():
        if settings.compile:
            compile_network(network, graphs)
        # In evaluation mode, accelerate does not wrap a network in DDP.
        alone = settings.grad_sync == "flat" or name in frozen
        setattr(system, name, accelerator.prepare_model(network, evaluation_mode=alone))
    return networks


def keep_compiled_code() -> None:
    """Keep compiled code for the next start, in TORCH_HOME/inductor or where TORCHINDUCTOR_CACHE_DIR says.

    The run folder is no place for it: torch runs what it finds there, and run folders are handed on.
    """
    folder = Path(torch.hub.get_dir()).parent / "inductor"
    with suppress(OSError):  # then torch keeps it in its folder in /tmp
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compile_network(network: nn.Module, graphs: bool = False) -> None:
    """Compile a network's forward passes in place, but for passes of a discriminator that are differentiated twice.

    A pass is compiled once for each size of its batch and for frozen and for trained weights, which players take in
    turns, so that a run compiles in its first steps only.

    Args:
        network: its `forward` is replaced
        graphs: record each compiled pass as a CUDA graph, which the host then launches at once
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    torch._functorch.config.donated_buffer = False  # system.adaptive takes gradients of a graph more than once
    eager = network.forward
    compiled = torch.compile(eager, dynamic=False, mode="reduce-overhead" if graphs else None)
    if not isinstance(network, Discriminator):
        network.forward = compiled
        return

    def forward(image: Tensor, *label: Tensor | None, **options: Any) -> Tensor:
        return (eager if network.differentiated_twice(image) else compiled)(image, *label, **options)

    network.forward = forward  # type: ignore[assignment]
