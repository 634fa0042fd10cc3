"""CUDA without a GPU: every system's step on tensors that have a device and no values, by CUDA's rules of autocast.

torch's FakeTensorMode refuses tensors of two devices in one operation, and values that are read; autocast refuses what
it forbids on CUDA; `Cuda` refuses the rest of what would make the host wait. Only backward passes are left out, as
autograd's engine wants a real device: gradients are made up for the weights that a graph reaches.
"""

import functools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from systems_under_test import PLAIN, SYSTEMS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy
from torch.utils._pytree import tree_leaves

from models import System
from models.networks.blocks import ResidualBranch
from trainer.batch import Batch
from trainer.ema import EMA
from trainer.metrics.images import Codes, laplacian_variance, psnr
from trainer.metrics.inception_score import InceptionScore
from trainer.metrics.prdc import neighbours, radii
from trainer.metrics.statistics import Moments
from trainer.networks import set_memory_format
from trainer.step import TrainStep

DEVICE = torch.device("cuda", 0)
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Generator(torch.Generator):
    """One of the host, for whatever device: fake draws are of the device that they name."""

    def __new__(cls, device=None):
        return super().__new__(cls)


# Between devices these copy, which torch's fake tensors let pass; an index of bools is counted before it is used.
COPY = {"_to_copy", "copy_", "where", "index", "index_put", "index_put_"}
# On CUDA these add in whatever order threads come (torch.use_deterministic_algorithms has the list).
ATOMIC = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "bincount", "histc", "put_"}


class Cuda(FakeTensorMode):
    """Fake tensors; while `strict`, they refuse whatever would make the host wait for the device."""

    strict = False

    def __torch_dispatch__(self, function, types=(), args=(), kwargs=None):
        made = super().__torch_dispatch__(function, types, args, kwargs)
        name = function.overloadpacket.__name__
        if name in ATOMIC and made.device.type == "cuda":
            raise AssertionError(f"{function} adds in no fixed order")
        if self.strict and name in COPY:
            tensors = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor)]
            mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors)
            if mask or len({x.device.type for x in tensors}) > 1:
                raise AssertionError(f"{function} makes the host wait for the device")
        return made


def reached(output: torch.Tensor) -> set[object]:
    """The nodes of a graph, and the identities of its leaves, that a backward pass would come to."""
    found, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found |= {node, id(getattr(node, "variable", None))}
            nodes += [following for following, _ in node.next_functions]
    return found


def backward(loss, inputs):
    found = reached(loss)
    for weight in inputs:
        assert id(weight) in found, "a weight of the player has no part in its loss"
        made = torch.zeros_like(weight)
        weight.grad = made if weight.grad is None else weight.grad + made


def grad(output, of, grad_outputs=None, create_graph=False, retain_graph=None):
    assert (of.grad_fn or id(of)) in reached(output), "what the gradient is of has no part in it"
    return (torch.zeros_like(of, requires_grad=create_graph),)


@pytest.fixture
def cuda(monkeypatch):
    """Fake tensors on a device "cuda", and no values of theirs."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.autograd.backward", backward)
    monkeypatch.setattr("torch.autograd.grad", grad)
    monkeypatch.setattr("torch.Generator", Generator)
    with Cuda(allow_non_fake_inputs=True) as mode:
        yield mode


def moved(system: System) -> System:
    """What `system.to(device)` does, which torch has not for fake tensors; what is no parameter or buffer stays."""
    for module in system.modules():
        for kept, make in ((module._parameters, torch.nn.Parameter), (module._buffers, lambda value: value)):
            there = {key: value for key, value in kept.items() if value is not None}
            kept |= {key: make(torch.empty(v.shape, dtype=v.dtype, device=DEVICE)) for key, v in there.items()}
    return system


def convolutions(system: System) -> list[torch.nn.Module]:
    """Those of the networks that are to compute in channels_last; their outputs are checked in every pass."""

    def check(module, _, output):
        # Without a GPU, torch takes it that cuDNN has no bf16.
        if not (torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16):
            assert output.is_contiguous(memory_format=torch.channels_last), (
                f"{module} computes in another memory format"
            )

    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, ResidualBranch)
    networks = [[*network.modules()] for network in system.networks().values()]
    found = [
        module
        for modules in networks
        if not any(isinstance(module, torch.nn.InstanceNorm2d) for module in modules)
        for module in modules
        # Heads end in GroupNorm, which on CUDA returns torch's default format.
        if isinstance(module, kinds) and not type(module).__module__.endswith(".heads")
    ]
    for module in found:
        module.register_forward_hook(check)
    return found


def one_step(cuda: Cuda, system: System, precision="no", parts=1) -> TrainStep:
    """One in which every player moves and every penalty is due; it refuses to make the host wait."""
    autocast = nullcontext if precision == "no" else functools.partial(torch.autocast, "cuda", DTYPES[precision])
    accelerator = SimpleNamespace(
        device=DEVICE, mixed_precision=precision, num_processes=1, autocast=autocast, reduce=lambda x, _: x
    )
    train_step, ema = TrainStep(accelerator, system, 4), EMA(system, 20, 4)
    rows = 4 * parts
    images = tuple(torch.empty(rows, 1, 32, 32, device=DEVICE) for _ in range(2))
    label = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    cuda.strict = True
    train_step(Batch(images, slice(0, rows), rows, 0, 2, label).split(4), 2)
    train_step.meter.fold()
    ema.update(3)
    return train_step


# fp16 has the most to refuse: memory formats, which are not checked in bf16, autocast and a loss scaler.
STEPS = [(name, "fp16", 1) for name in SYSTEMS if name not in PLAIN]
STEPS += [(name, *rest) for name in ("adaptive, scheduled", "kl", "cyclegan") for rest in (("no", 1), ("bf16", 2))]


# EMA copies a system, and torch asks a tensor without values where its values are.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("name", "precision", "parts"), STEPS)
def test_every_system_trains_on_a_gpu_in_channels_last_without_waiting_for_it(cuda, name, precision, parts):
    system = moved(SYSTEMS[name]())
    set_memory_format(system)
    assert convolutions(system) or name.startswith("cyclegan")
    train_step = one_step(cuda, system, precision, parts)
    assert {f"{player.name}/grad_norm" for player in system.players()} <= train_step.meter.sums.keys(), "all moved"
    assert all(m.scaler is None or m.scaler.is_enabled() for m in train_step.player_states)
    for value in [train_step.failure, *train_step.meter.sums.values(), *system.state_dict().values()]:
        assert value.device == DEVICE
    assert all(p.dtype == torch.float32 for p in system.parameters())


FAULTS = {
    "a value that is read": (lambda loss, image: loss * loss.item(), "_local_scalar_dense"),
    "a branch on a value": (lambda loss, image: loss if loss > 0 else -loss, "_local_scalar_dense"),
    "a choice by values": (lambda loss, image: loss + image[image > 0].sum(), "nonzero"),
    "an assignment by values": (lambda loss, image: loss + image.clone().index_put_([image > 0], loss).sum(), "wait"),
    "a tensor of the host": (lambda loss, image: loss * torch.ones(4, 1, 32, 32), "same device"),
    "a number that is copied": (lambda loss, image: loss * torch.tensor(2.0, device=loss.device), "wait"),
    "an index that is copied": (lambda loss, image: loss + image[[0, 2]].sum(), "wait"),
    "an operation without autocast": (
        lambda loss, image: binary_cross_entropy(image, image) + loss,
        "unsafe to autocast",
    ),
    "a weight without a part": (lambda loss, image: image.detach().sum().requires_grad_(), "no part in its loss"),
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_only_a_gpu_would_tell_is_found(cuda, fault):
    system = moved(SYSTEMS["ae"]())
    change, words = FAULTS[fault]
    right = system.loss

    def wrong(batch, passes):
        loss = right(batch, passes)
        return loss._replace(value=change(loss.value, passes))

    system.loss = wrong
    with pytest.raises(Exception, match=words):
        one_step(cuda, system, "bf16")


def test_scores_are_summed_on_the_device_in_a_fixed_order(cuda):
    features, logits = torch.empty(8, 16, device=DEVICE), torch.empty(8, 5, device=DEVICE)
    moments, score, codes = Moments(16, DEVICE), InceptionScore(20, 5, device=DEVICE), Codes(4, DEVICE)
    moments.update(features)
    score.update(logits, torch.arange(8))
    codes.update(torch.empty(8, 4, 2, 2, device=DEVICE), torch.empty(8, 4, 2, 2, device=DEVICE))
    pixels = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device=DEVICE)
    found = radii(features, [slice(0, 8)])
    counts = neighbours(features, features, found, found, [slice(0, 8)])
    sums = [moments.parts, score.parts, codes.parts, *counts, psnr(pixels, pixels), laplacian_variance(pixels)]
    assert all(x.device == DEVICE and x.dtype in (torch.float64, torch.int64) for x in sums)
