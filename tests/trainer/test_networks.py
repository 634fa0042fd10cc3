"""How networks are called: compilation, activation checkpointing and memory formats change no result."""

import functools
import gzip
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from systems_under_test import DISCRIMINATOR, SYSTEMS, batch_of, cancelled, cyclegan, vaegan
from test_run import weights
from torch.profiler import ProfilerActivity, profile

from models import NetworkConfig
from models.losses import gradient_penalty
from models.networks import Discriminator
from trainer.checkpoint.state import load_optimizer, optimizer_tensors
from trainer.config.settings import TrainerConfig
from trainer.networks import checkpoint_activations, compile_network, prepare_networks, set_memory_format
from trainer.profiler import DATA, LOG, StepProfiler
from trainer.step import PlayerState, TrainStep

RESIDUAL = NetworkConfig("residual", 8, attention=(8,), blocks=1)


def moved(system, steps=range(3), parts=1) -> dict[str, torch.Tensor]:
    """The weights after a few steps, begun with nothing in pools."""
    system.hold(slice(0, 4), 4)
    train_step = TrainStep(Accelerator(cpu=True), system, 99)
    for step in steps:
        train_step(batch_of(step=step, dtype=next(system.parameters()).dtype).split(4 // parts), step)
    assert train_step.failed() is None
    return {name: weight.detach() for name, weight in system.named_parameters()}


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without generated code, which takes minutes; returns how many graphs it has made."""
    compile_ = torch.compile
    monkeypatch.setattr("torch.compile", functools.partial(compile_, backend="aot_eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def compiled(system):
    for network in system.networks().values():
        compile_network(network)
    return system


OTHERS = [name for name in SYSTEMS if name not in ("binary", "ternary", "both", "decoder only")]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_system_can_be_compiled(graphs, name):
    system = SYSTEMS[name]().double()
    still = cancelled(system)
    before = {key: value.clone() for key, value in system.state_dict().items()}
    eager = {key: value.clone() for key, value in moved(system).items()}
    system.load_state_dict(before)
    rounding = 3 * 1e-3 * 100 * 2**-53 / 1e-8  # as test_step.ROUNDING has it, in three steps
    differences = {key: (value - eager[key]).abs().max() for key, value in moved(compiled(system)).items()}
    assert max(differences[key] for key in differences.keys() - still) < rounding
    assert graphs() > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow  # torch.compile takes seconds
@pytest.mark.parametrize("parts", [1, 2])
def test_players_that_take_turns_compile_nothing_after_the_first_step_of_each_kind(graphs, parts):
    """Frozen and trained weights, shared or replayed passes, with a penalty, which stays eager, and without."""
    system = vaegan("both", config=replace(DISCRIMINATOR, penalty_every=2), adaptive=True)
    before = {key: value.clone() for key, value in system.state_dict().items()}
    eager = {key: value.clone() for key, value in moved(system, range(5), parts).items()}
    system.load_state_dict(before)
    moved(compiled(system), range(2), parts)
    made = graphs()
    system.load_state_dict(before)
    assert different(moved(system, range(5), parts), eager) == []
    assert graphs() == made > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_each_size_of_a_batch_is_compiled_for_itself(graphs):
    """Code for any size is slower, and a run has two sizes at most."""
    network = torch.nn.Linear(2, 2)
    compile_network(network)
    for count in (2, 3, 5, 2, 3, 5):
        network(torch.ones(count, 2))
    assert graphs() == 3


def test_attention_in_channels_last_passes_penalties_and_is_fused_elsewhere():
    """CPUs fuse attention in channels_last only; a fused kernel has no second derivative."""
    discriminator = Discriminator(RESIDUAL, 32, 1, 1).to(memory_format=torch.channels_last)
    for weights_move, kernel in ((True, "_scaled_dot_product_attention_math"), (False, "flash_attention_for_cpu")):
        image = torch.rand(2, 1, 32, 32, requires_grad=True)
        discriminator.requires_grad_(weights_move)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            logits = discriminator(image)
        assert any(kernel in event.name for event in recorded.events())
        if weights_move:
            gradient_penalty(image, logits).backward()
            assert discriminator.levels[0][0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("share", [True, False])
def test_activation_checkpointing_keeps_every_bit(share):
    """Of a step with R1 and attention; and it keeps less for the backward pass."""
    found, kept = [], []
    for which in (False, True, ["decoder"]):
        torch.manual_seed(0)
        system = vaegan("ternary", networks=RESIDUAL)
        checkpoint_activations(system, which)
        step = TrainStep(Accelerator(cpu=True), system, 9, share)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            step([batch_of()], 9)
        kept.append(sum(sizes))
        found.append({name: weight.detach() for name, weight in system.named_parameters()})
    assert different(found[0], found[1]) == different(found[0], found[2]) == []
    assert kept[1] < kept[2] < kept[0]


@pytest.mark.parametrize(
    ("system", "which", "words"),
    [
        (vaegan, True, "expected false, as no network has residual blocks"),
        (lambda: vaegan(networks=RESIDUAL), ["decoder", "head"], r"some of \[encoder, decoder, discriminator_binary\]"),
    ],
)
def test_activation_checkpointing_of_what_is_not_there_is_refused(system, which, words):
    with pytest.raises(ValueError, match=f"^trainer.activation_checkpointing is .*{words}"):
        checkpoint_activations(system(), which)


def test_cuda_graphs_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match=r"^trainer.compile is cuda_graphs, expected true or false on cpu"):
        prepare_networks(vaegan(), Accelerator(cpu=True), TrainerConfig(compile="cuda_graphs"))


def test_moments_of_a_checkpoint_take_the_memory_format_of_their_weights():
    """A checkpoint has torch's default format; the fused optimizers would mix up weights and moments."""
    torch.manual_seed(0)
    system = SYSTEMS["ae"]()
    for weight in (weight for weight in system.parameters() if weight.dim() == 4):
        weight.data = weight.data.to(memory_format=torch.channels_last)
    train_step = TrainStep(Accelerator(cpu=True), system, 9)
    (state,) = train_step.player_states
    train_step([batch_of()], 0)
    saved = {k: v.clone().contiguous() for k, v in optimizer_tensors(state.parameters, state.optimizer).items()}
    weights = {key: value.detach().clone() for key, value in system.state_dict().items()}
    train_step([batch_of()], 1)
    expected = {key: value.clone() for key, value in system.state_dict().items()}
    system.load_state_dict(weights)
    resumed = PlayerState.create(state.player, system, None)
    load_optimizer(resumed.parameters, resumed.optimizer, saved)
    train_step.player_states = [resumed]
    train_step([batch_of()], 1)
    assert different(dict(system.state_dict()), expected) == []


def test_memory_formats_are_those_that_pay():
    formats = {}
    for name, system in {
        "grouped": vaegan(networks=NetworkConfig("residual", 16, blocks=1)),
        "dcgan": vaegan(),
        "instance norm": cyclegan(),
    }.items():
        before = {key: value.clone() for key, value in system.state_dict().items()}
        set_memory_format(system)
        assert different(before, dict(system.state_dict())) == []
        formats[name] = {
            weight.is_contiguous(memory_format=torch.channels_last)
            for weight in system.parameters()
            if weight.dim() == 4 and min(weight.shape[1:]) > 1
        }
    assert formats == {"grouped": {True}, "dcgan": {False}, "instance norm": {False}}


def test_a_run_compiles_before_its_first_step_and_is_profiled_without_a_trace_in_its_weights(
    graphs, here, tmp_path, monkeypatch
):
    """trainer.compile and trainer.profile together; only the main process's time is spent on."""
    made, before = [], StepProfiler.before
    monkeypatch.setattr(StepProfiler, "before", lambda self, step: (made.append(graphs()), before(self, step)))
    run = ["--system", "GAN", "--system.binary.penalty_every", "2", "--trainer.steps", "4"]
    plain = here(*run, "--trainer.run_dir", tmp_path / "plain")
    assert made == [0] * 4, plain.stderr
    more = ["--trainer.compile", "true", "--trainer.profile", "1:3", "--trainer.run_dir", tmp_path / "more"]
    told = here(*run, *more).stderr
    assert made[4:] == [graphs()] * 4, told
    assert graphs() > 0
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "more")
    assert different(one, other) == []
    assert "steps 2 to 3 took" in told
    shares = {row[:36].strip(): row[36:].split() for row in told.partition("a step  share")[2].splitlines()[1:8]}
    assert [float(shares[what][2]) for what in (DATA, LOG)] == [1, 1]
    assert float(shares["compute"][0]) > 0
    assert sum(float(row[0]) for row in shares.values()) == pytest.approx(
        float(told.partition("took ")[2].split()[0]), 0.05
    )
    (trace,) = (tmp_path / "more" / "profile").glob("steps_2_to_3.*.pt.trace.json.gz")
    names = [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count(DATA) >= 2
