"""The step: sharing, accumulating and distributing change nothing; a non-finite loss blocks every update."""

import functools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from systems_under_test import PLAIN, SYSTEMS, TRAIN_ONLY, batch_of, cancelled, kl_vaegan

from models.schedule import Schedule
from trainer.batch import Batch
from trainer.distributed.accelerator import DDP_SETTINGS
from trainer.distributed.exit import run_errors, user_errors
from trainer.ema import EMA
from trainer.evaluate.periodic import PeriodicEvaluator
from trainer.networks import checkpoint_activations
from trainer.step import TermMeans, TrainStep, frozen_networks

STEPS = 3
# Also trained by trainer.grad_sync flat: a weight without dimensions, two discriminators, a late start, a frozen
# network, spectral norms.
FLAT = ["vae, all options", "both, both, classes", "adaptive, scheduled", "decoder alone", "cyclegan, lecam"]
WHOLE = ["both, both, classes", "residual", "cyclegan, lecam"]  # ranks train these without micro-batches, too
# How far sums in another order may lead. Of float64 gradients, clipped to a norm of 1 and with terms that are a hundred
# in all at most, rounding leaves 100 * 2^-53; where a gradient is 0 otherwise, Adam divides that by its 1e-8 alone, and
# a step is the learning rate of 1e-3 times the quotient. What a missed gradient does is of the order of 1e-3.
ROUNDING = STEPS * 1e-3 * 100 * 2**-53 / 1e-8


@functools.cache
def train(
    name: str,
    parts: int = 1,
    share: bool = True,
    rank: int = 0,
    world: int = 1,
    flat: bool = False,
    again: bool = False,
) -> dict[str, torch.Tensor]:
    """Weights and statistics after a few steps in float64 of 8 images a step, with R1 and clipping.

    Several parts compute in another memory format, which no result depends on. `again`: with activation checkpointing.
    """
    torch.manual_seed(0)
    system = SYSTEMS[name]().double()
    for network in system.children() if parts > 1 else ():
        network.to(memory_format=torch.channels_last)
    ema = EMA(system, Schedule(0, 20, STEPS), 8, ramp=1)
    checkpoint_activations(system, again)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DDP_SETTINGS])
    rows, frozen = slice(rank * 8 // world, (rank + 1) * 8 // world), frozen_networks(system, TRAIN_ONLY.get(name))
    system.hold(rows, 8)
    for child, network in system.networks().items():
        setattr(system, child, accelerator.prepare_model(network, evaluation_mode=flat or child in frozen))
    train_step = TrainStep(accelerator, system, STEPS, share, frozen=frozen)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = [torch.rand(8, 1, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2)]
        label = (torch.arange(8) + step) % 2
        batch = Batch(tuple(image[rows] for image in images), rows, 8, 0, step, label[rows])
        train_step(batch.split(8 // world // parts), step)
        ema.update(step + 1)
    assert train_step.failed() is None
    weights = {key.replace(".module.", "."): value.detach() for key, value in system.named_parameters()}
    weights |= {key.replace(".module.", "."): value.clone() for key, value in system.named_buffers()}
    terms = {key: torch.tensor(value) for key, value in train_step.meter.read(accelerator).items()}
    return weights | terms | {f"ema.{key}": value for key, value in ema.system.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[key] - b[key]).abs() / b[key].abs().clamp(min=1)).max().item() for key in a)


@pytest.mark.parametrize("name", ["adaptive, scheduled", "cyclegan, lecam"])  # accumulated ones are replayed, too
def test_shared_passes_equal_replayed_ones(name):
    assert distance(train(name), train(name, share=False)) < ROUNDING


@pytest.mark.parametrize("name", SYSTEMS)
def test_accumulating_four_parts_is_the_same(name):
    assert distance(train(name), train(name, parts=4)) < ROUNDING


def test_accumulating_single_images_is_the_same():
    assert distance(train("cyclegan, lecam"), train("cyclegan, lecam", parts=8)) < ROUNDING


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_moves_under_bf16(name):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        torch.manual_seed(0)
        system = SYSTEMS[name]()
        still = cancelled(system)
        before = {key: value.clone() for key, value in system.named_parameters()}
        train_step = TrainStep(Accelerator(cpu=True, mixed_precision="bf16"), system, STEPS)
        for step in range(3):
            images = tuple(torch.rand(4, 1, 32, 32) * 2 - 1 for _ in range(2))
            train_step([Batch(images, slice(0, 4), 4, 0, step, torch.tensor([0, 1, 1, 0]))], step)
        assert train_step.failed() is None
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for key, value in system.named_parameters():
        assert value.dtype == torch.float32
        if key.partition(".")[0] in system.frozen:
            assert torch.equal(value, before[key])
            continue
        assert key in still or not torch.equal(value, before[key]), f"{key} did not move"


def test_a_frozen_network_stays_as_it_is_without_a_graph_or_a_moment():
    system = kl_vaegan()
    before = {key: value.clone() for key, value in system.state_dict().items()}
    train_step = TrainStep(Accelerator(cpu=True), system, STEPS, frozen=frozen_networks(system, ["decoder"]))
    seen, passes = [], system.passes
    system.passes = lambda batch: seen.append(passes(batch)) or seen[-1]
    ema = EMA(system, 20, 8)
    for step in range(3):
        train_step(batch_of(step=step).split(2), step)
        ema.update(step + 1)
    assert len(seen) == 3 * 2 * 2, "of each player, for each micro-batch"
    assert not any(one.mean.requires_grad for one in seen)
    assert [one.reconstructed.requires_grad for one in seen] == [False, False, True, True] * 3
    moved = {key.partition(".")[0] for key, value in system.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"decoder", "discriminator_binary"}
    assert all(torch.equal(before[f"encoder.{key}"], value) for key, value in ema.system.encoder.state_dict().items())
    assert all(weight.grad is None for weight in system.encoder.parameters())
    assert {name.partition(".")[0] for state in train_step.player_states for name in state.parameters} == moved


def test_two_ranks_equal_one(forked, tmp_path):
    """Shared and accumulated passes, under the real process group, by DDP; some whole or with flat averages."""
    here = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nimport test_step\n"
    done = forked(f"{here}test_step.train_as_a_rank({str(tmp_path)!r})", processes=2).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    for name in SYSTEMS.keys() - PLAIN:
        one = train(name)
        for parts in (1, 2) if name in WHOLE else (2,):
            ranks = [torch.load(tmp_path / f"{name}.{parts}.{rank}.pt", weights_only=True) for rank in (0, 1)]
            for key in SYSTEMS[name]().by_position:
                ranks[0][key] = ranks[1][key] = torch.cat([rank[key] for rank in ranks])
            assert distance(*ranks) == 0, f"{name}: the ranks drifted apart"
            assert distance(ranks[0], one) < ROUNDING, f"{name} in {parts} parts"
    for name in FLAT:
        flat = torch.load(tmp_path / f"{name}.2.flat.1.pt", weights_only=True)
        assert distance(flat, train(name)) < ROUNDING, f"{name}: an average was missed"
    again = torch.load(tmp_path / "residual.again.1.pt", weights_only=True)
    assert distance(again, torch.load(tmp_path / "residual.1.1.pt", weights_only=True)) == 0
    first, second = (torch.load(tmp_path / f"broken.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["failed"] == second["failed"] == [1, "binary"], "a loss that is broken on rank 1 blocks both"
    assert all(torch.equal(first["weights"][key], first["before"][key]) for key in first["before"])
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["before"])


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")


def test_a_step_that_does_not_fit_into_a_gpus_memory_names_what_saves_memory(here, monkeypatch, tmp_path):
    monkeypatch.setattr(TrainStep, "_backward", full)
    done = here("--system", "VAE", "--trainer.run_dir", tmp_path / "run")
    assert done.returncode == 1
    message = "error: a step does not fit into the GPU's memory: CUDA out of memory. Tried to allocate 2.00 GiB. Lower"
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_evaluation_that_does_not_fit_is_one_message_and_leaves_its_checkpoint(here, monkeypatch, tmp_path):
    monkeypatch.setattr(PeriodicEvaluator, "__call__", full)
    command = ["--system", "VAE", "--trainer.steps", "2", "--trainer.run_dir", tmp_path / "run"]
    done = here(*command, "--evaluate.every", "2", "--evaluate.extractor", "demo-random")
    assert done.returncode == 1
    *_, message = done.stderr.splitlines()
    assert message.startswith("error: the GPU has too little free memory: end other programs")
    assert message.endswith("which resumes. CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("context", [user_errors, run_errors])
def test_a_gpu_without_memory_is_one_message_and_no_traceback(context, capsys):
    with pytest.raises(SystemExit, match="1"), context():
        full()
    said = capsys.readouterr().err
    assert said.startswith("error: the GPU has too little free memory")
    assert "Tried to allocate 2.00 GiB." in said
    assert "GPU 0" not in said


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_loss_or_gradient_blocks_every_later_update(where):
    torch.manual_seed(0)
    system = SYSTEMS["binary"]()
    train_step = TrainStep(Accelerator(cpu=True), system, 99)
    image = torch.rand(4, 1, 32, 32)
    train_step([Batch((image,), slice(0, 4), 4, 0, 0)], 0)
    before = {key: value.clone() for key, value in system.state_dict().items()}
    moments = {
        key: value.clone()
        for key, value in train_step.player_states[1].optimizer.state[system.decoder.stem.bias].items()
    }
    if where == "loss":
        broken = torch.where(torch.arange(4)[:, None, None, None] == 2, torch.nan, image)
        train_step([Batch((broken,), slice(0, 4), 4, 0, 1)], 1)
        expected = "binary"
    else:
        system.decoder.stem.bias.register_hook(lambda gradient: gradient * torch.inf)
        kept = {key: value.clone() for key, value in system.discriminator_binary.state_dict().items()}
        train_step([Batch((image,), slice(0, 4), 4, 0, 1)], 1)
        assert not torch.equal(kept["head.weight"], system.discriminator_binary.head.weight), "it moved before that"
        before |= {f"discriminator_binary.{k}": v.clone() for k, v in system.discriminator_binary.state_dict().items()}
        expected = "autoencoder"
    train_step([Batch((image,), slice(0, 4), 4, 0, 2)], 2)
    failed = train_step.failed()
    assert failed is not None
    assert (failed[0], failed[1].name) == (1, expected)
    assert all(torch.equal(value, before[key]) for key, value in system.state_dict().items())
    after = train_step.player_states[1].optimizer.state[system.decoder.stem.bias]
    assert all(torch.equal(after[key], moments[key]) for key in moments)


def test_a_player_moves_at_its_own_steps_only():
    from dataclasses import replace

    system = SYSTEMS["binary"]()
    train_step = TrainStep(Accelerator(cpu=True), system, 99)
    train_step.player_states[0].player = replace(train_step.player_states[0].player, every=2, start=1)
    for step in range(4):
        before = system.discriminator_binary.head.weight.clone()
        train_step([Batch((torch.rand(4, 1, 32, 32),), slice(0, 4), 4, 0, step)], step)
        assert torch.equal(before, system.discriminator_binary.head.weight) == (step % 2 == 0)


def test_a_loss_scaler_changes_no_gradient_and_skips_an_overflow():
    """The path of fp16, with the same scaler on a CPU in fp32; its factor is a power of two, which rounds nothing."""
    plain, scaled = [], []
    for out, scale in ((plain, None), (scaled, 2.0**16)):
        torch.manual_seed(0)
        system = SYSTEMS["vae"]()
        train_step = TrainStep(Accelerator(cpu=True), system, 99)
        if scale:
            train_step.player_states[0].scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(2):
            train_step([Batch((torch.rand(4, 1, 32, 32),), slice(0, 4), 4, 0, step)], step)
        out.append(torch.cat([p.detach().flatten() for p in system.parameters()]))
    assert torch.equal(plain[0], scaled[0])
    before = scaled[0]
    system.decoder.stem.bias.register_hook(lambda gradient: gradient * torch.inf)
    train_step([Batch((torch.rand(4, 1, 32, 32),), slice(0, 4), 4, 0, 2)], 2)
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in system.parameters()]))
    assert train_step.player_states[0].scaler.get_scale() == 2.0**15
    assert train_step.failed() is None
    means = train_step.meter.read(Accelerator(cpu=True))
    assert means["autoencoder/skipped_updates"] == pytest.approx(1 / 3)
    assert 0 < means["autoencoder/grad_norm"] < float("inf")
    for step in range(3, 25):
        train_step([Batch((torch.rand(4, 1, 32, 32),), slice(0, 4), 4, 0, step)], step)
    assert train_step.failed()[0] == 21, "twenty in a row are a failure"


def test_ema_by_hand():
    system = SYSTEMS["ae"]()
    ema = EMA(system, half_life=100, batch_size=10)
    old = system.decoder.stem.bias.detach().clone()
    torch.nn.init.constant_(system.decoder.stem.bias, 1.0)
    ema.update(1000)
    keep = 0.5 ** (10 / 100)
    torch.testing.assert_close(ema.system.decoder.stem.bias, keep * old + (1 - keep))
    ema.half_life = Schedule(0, 100, 4)
    torch.nn.init.constant_(system.decoder.stem.bias, 3.0)
    ema.update(1)
    assert torch.equal(ema.system.decoder.stem.bias, system.decoder.stem.bias), "a half-life of 0 averages nothing"
    torch.nn.init.constant_(system.decoder.stem.bias, 5.0)
    ema.ramp = 10.0
    ema.update(3)  # after step 2 of 4, at half of the end's half-life
    torch.testing.assert_close(ema.system.decoder.stem.bias, 5.0 - 2 * 0.5 ** (10 / 50) * torch.ones_like(old))
    assert not any(p.requires_grad for p in ema.system.parameters())


def test_ema_holds_averaged_networks_only():
    assert set(dict(EMA(SYSTEMS["both"](), 10, 1).system.named_children())) == {"encoder", "decoder"}


def test_meter_averages_since_its_last_reading():
    meter, accelerator = TermMeans(), Accelerator(cpu=True)
    for value in (1.0, 2.0, 6.0):
        meter.add({"a": torch.tensor(value)})
    meter.add({"b": torch.tensor(4.0)}, 0.5)
    meter.add({"b": torch.tensor(2.0)}, 0.5)
    assert meter.read(accelerator) == {"a": 3.0, "b": 3.0}
    assert meter.read(accelerator) == {}


def break_rank_one(rank: int) -> dict:
    """Three steps, the second of which sees a NaN on rank 1 only."""
    torch.manual_seed(0)
    system, accelerator = SYSTEMS["both"](), Accelerator(cpu=True)
    for child, network in system.networks().items():
        setattr(system, child, accelerator.prepare_model(network))
    train_step, rows = TrainStep(accelerator, system, 99), slice(rank * 4, rank * 4 + 4)
    before = {}
    for step in range(3):
        image = torch.rand(4, 1, 32, 32)
        if step == 1:
            before = {key: value.clone() for key, value in system.state_dict().items()}
            image[0, 0, 0, 0] = torch.nan if rank == 1 else 0
        train_step([Batch((image,), rows, 8, 0, step)], step)
    failed = train_step.failed()
    assert failed is not None
    return {"failed": [failed[0], failed[1].name], "before": before, "weights": system.state_dict()}


def train_as_a_rank(out: str) -> None:
    """One rank of test_two_ranks_equal_one."""
    rank = Accelerator(cpu=True).process_index
    torch.save(break_rank_one(rank), f"{out}/broken.{rank}.pt")
    for name in sorted(SYSTEMS.keys() - PLAIN):
        for parts, way in [(2, "")] + [(1, "")] * (name in WHOLE) + [(2, ".flat")] * (name in FLAT):
            trained = train(name, parts, rank=rank, world=2, flat=bool(way))
            torch.save(trained, f"{out}/{name}.{parts}{way}.{rank}.pt")
    torch.save(train("residual", rank=rank, world=2, again=True), f"{out}/residual.again.{rank}.pt")
    torch.distributed.barrier()
