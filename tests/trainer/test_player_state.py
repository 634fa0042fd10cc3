"""What moves a player: its weights' names, its loss scaler, its meter, and how a failure is told."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from systems_under_test import Line, cyclegan, line_batch
from torch import nn

from models import Loss, OptimizerConfig, Player
from trainer.batch import Batch
from trainer.step import TermMeans, TrainStep

CPU = torch.device("cpu")


def make_accelerator(precision: str = "no", processes: int = 1, codes=(), factor: float = 1.0) -> SimpleNamespace:
    """Of one process, or of several of which the others' values make means `factor` times this one's."""
    return SimpleNamespace(
        device=CPU,
        mixed_precision=precision,
        num_processes=processes,
        autocast=nullcontext,
        reduce=lambda value, how: value * {"mean": factor}[how],
        gather=lambda value: torch.cat([value, torch.tensor(codes, dtype=value.dtype)]),
    )


class Wrapped(nn.Module):
    """As DDP wraps a network; `synchronized` tells of each forward pass whether gradients would be sent."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.sends, self.synchronized = True, []

    def forward(self, x):
        self.synchronized.append(self.sends)
        return self.module(x)

    @contextmanager
    def no_sync(self):
        self.sends = False
        yield
        self.sends = True


def test_a_wrapped_networks_weights_keep_their_names():
    """By which a checkpoint saves an optimizer's state."""
    system = Line(OptimizerConfig())
    system.first = Wrapped(system.first)
    (player_state,) = TrainStep(make_accelerator(), system, 9).player_states
    assert list(player_state.parameters) == ["first.weight", "second.weight"]
    assert player_state.networks == [system.first, system.second]
    assert player_state.parameters["first.weight"] is system.first.module.weight


def test_a_player_moves_at_its_first_step_and_every_so_many_after_it():
    player = Player("player", (), lambda batch, passes: Loss(passes, {}), OptimizerConfig(), every=3, start=1)
    assert [step for step in range(9) if player.moves(step)] == [1, 4, 7]
    assert [step for step in range(9) if replace(player, start=5).moves(step)] == [5, 8]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradients_are_sent_with_the_last_micro_batch_alone(parts, monkeypatch):
    monkeypatch.setattr("trainer.step.DistributedDataParallel", Wrapped)
    system = Line(OptimizerConfig()).double()
    system.second = Wrapped(system.second)
    step = TrainStep(make_accelerator(processes=2, factor=0.5), system, 9)
    kept = system.second.module.weight.register_post_accumulate_grad_hook(
        lambda weight: sent.append(weight.grad.clone())
    )
    sent: list[torch.Tensor] = []
    step(line_batch(0).split(4 // parts), 0)
    kept.remove()
    assert system.second.synchronized == [False] * (parts - 1) + [True]
    assert sent[-1].item() == pytest.approx(12.0), "the sum of all parts, which DDP averages"
    norm = step.meter.read(make_accelerator())["player/grad_norm"]
    assert norm == pytest.approx((2.5**2 + 12**2) ** 0.5), "only the other network's is averaged flat"


@pytest.mark.parametrize("clip", [None, 15.0])
def test_fp16s_scaler_changes_no_update(clip):
    """Its scale is a power of two, so that scaled gradients have the same digits; and they are clipped unscaled."""
    found = []
    for precision in ("no", "fp16"):
        system = Line(OptimizerConfig(0.1, clip=clip, weight_decay=0.1)).double()
        accelerator = make_accelerator(precision)
        step = TrainStep(accelerator, system, 9)
        (player_state,) = step.player_states
        assert (player_state.scaler is not None) == (precision == "fp16")
        for k in range(3):
            step(line_batch(k).split(2), k)
        means = step.meter.read(accelerator)
        assert means.pop("player/skipped_updates", None) == (0 if precision == "fp16" else None)
        found.append((system.weights(), means))
        assert step.failed() is None
    assert found[0] == found[1]


def test_overflows_in_a_row_are_counted_by_player_and_forgotten_after_a_good_update():
    system = Line(OptimizerConfig(0.1)).double()
    step = TrainStep(make_accelerator("fp16"), system, 99, overflows=3)
    (player_state,) = step.player_states
    broken, counts = {1, 2, 4, 5, 6, 7}, []
    hook = None
    for k in range(9):
        if hook is not None:
            hook.remove()
        factor = torch.inf if k in broken else 1.0
        hook = system.first.weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        before = system.weights()
        step([line_batch(k)], k)
        counts.append(int(player_state.overflows))
        failed = step.failed()
        assert (failed is not None) == (k >= 6)
        assert (system.weights() == before) == (k in broken or k > 6)
    assert counts == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert failed == (6, player_state.player)


def test_a_processs_failure_is_that_of_all():
    """The first step, and of one step the first player, over all processes."""
    system = Line(OptimizerConfig())
    system.players = lambda: [one for name in "abc" for one in Line.players(system)]
    for codes, expected in (((), None), ((-1, -1), None), ((-1, 7), (2, 1)), ((9, 8), (2, 2))):
        step = TrainStep(make_accelerator(processes=3, codes=codes), system, 9)
        failed = step.failed()
        assert (failed is None) == (expected is None)
        if expected:
            assert failed == (expected[0], step.player_states[expected[1]].player)
    step.failure.fill_(3)
    assert step.failed() == (1, step.player_states[0].player)


def test_a_cyclegans_step_exchanges_gradients_alone(monkeypatch):
    """No process gets another's fakes, however many steps fill its pool."""
    sent = []
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "gather", "reduce", "send"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: pytest.fail("a step calls torch.distributed"))
    accelerator = make_accelerator(processes=1024)
    accelerator.reduce = lambda value, how: sent.append(value.numel()) or value
    accelerator.gather = lambda value: pytest.fail("a step gathers")
    system = cyclegan(pool=50)
    system.hold(rows := slice(4092, 4096), 4096)
    step = TrainStep(accelerator, system, 9)
    players = [sum(p.numel() for p in state.parameters.values()) for state in step.player_states]
    for k in range(3):
        images = tuple(torch.rand(4, 1, 32, 32) * 2 - 1 for _ in range(2))
        step(Batch(images, rows, 4096, 0, k).split(2), k)
        assert sent == players * (k + 1)
    assert system.pool_a.shape == (4, 1, 1, 32, 32), "slots of its own positions alone"
    assert (system.pool_a.abs().sum((1, 2, 3, 4)) > 0).all()
    assert system.pooled.tolist() == [1] * 4


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_the_first_players_failure_at_the_first_step_blocks_all_that_follows(precision):
    """A later failure does not take its place."""
    system = Line(OptimizerConfig(0.1)).double()
    step = TrainStep(make_accelerator(precision), system, 9)
    before = system.weights()
    for k in range(3):
        batch = line_batch(k)
        if k != 1:
            batch.images[0].fill_(torch.nan)
        step([batch], k)
        assert system.weights() == before
        assert step.failed() == (0, step.player_states[0].player)


def test_gradients_of_unwrapped_networks_are_averaged_over_processes():
    """Here the mean over processes is a quarter of this one's; weights without a gradient count as 0."""
    moved = []
    for processes, factor in ((2, 0.25), (1, 4.0)):
        system = Line(OptimizerConfig(0.1, clip=15.0)).double()
        system.first.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        system.passes = lambda batch, system=system: batch.image[:, :2] @ system.first.weight.T
        accelerator = make_accelerator(processes=processes, factor=factor)
        step = TrainStep(accelerator, system, 9)
        step([line_batch(4)], 4)
        moved.append(system)
        norm = step.meter.read(make_accelerator())["player/grad_norm"]
        assert norm == pytest.approx(5 * 5 * (0.25 if processes == 2 else 1))
        assert system.first.bias.item() == 0
    assert moved[0].second.weight.item() == 1.5


def test_statistics_are_means_over_parts_and_processes():
    seen = []
    system = Line(OptimizerConfig())
    (player,) = system.players()

    def loss(batch, passes):
        statistic = {"first": batch.image[:, :1].mean(0), "rows": torch.tensor(float(batch.rows.start))}
        return player.loss(batch, passes)._replace(statistics=statistic)

    system.players = lambda: [replace(player, loss=loss, after=seen.append)]
    system.double()
    TrainStep(make_accelerator(processes=2, factor=0.5), system, 9)(line_batch(0).split(1), 0)
    (statistics,) = seen
    assert statistics["first"].tolist() == [3.0 / 2]
    assert statistics["rows"].item() == (0 + 1 + 2 + 3) / 4 / 2


def test_passes_are_made_once_a_step_only_where_they_may_be_shared():
    for share, parts, expected in (((), 1, 1), ((True,), 1, 1), ((False,), 1, 2), ((True,), 2, 4), ((False,), 2, 4)):
        made = []
        system = Line(OptimizerConfig())
        (player,) = system.players()
        system.players = lambda player=player: [replace(player, networks=(one,)) for one in player.networks]
        system.passes = lambda batch, made=made, system=system: made.append(batch) or Line.passes(system, batch)
        TrainStep(make_accelerator(), system.double(), 9, *share)(line_batch(0).split(4 // parts), 0)
        assert len(made) == expected, (share, parts)


def test_a_meter_sums_in_double_precision():
    meter = TermMeans()
    meter.add({"a": torch.tensor(2.0**24, requires_grad=True)})
    meter.add({"a": torch.tensor(1.0)})
    assert meter.state() == {"a": (2.0**24 + 1, 2.0)}
    assert not meter.sums["a"].requires_grad
    assert meter.read(make_accelerator()) == {"a": (2.0**24 + 1) / 2}
    assert meter.state() == {}


def test_a_meter_goes_on_from_the_mean_of_all_processes_sums():
    meters = [TermMeans(), TermMeans()]
    for i, meter in enumerate(meters):
        for value in (1.0, 2.0, 4.0):
            meter.add({"a": torch.tensor(value + i)})
        meter.add({"b": torch.tensor(5.0)}, 0.5)
    restored = TermMeans()
    restored.load([meter.state() for meter in meters], CPU)
    assert restored.state() == {"a": ((7.0 + 10.0) / 2, 3.0), "b": (2.5, 0.5)}
    alone = TermMeans()
    alone.load([{"a": (2.0**24 + 1, 3.0)}], CPU)
    assert alone.state() == {"a": (2.0**24 + 1, 3.0)}, "in double precision, of one process"
    restored.add({"a": torch.tensor(11.5)})
    assert restored.read(make_accelerator(factor=3.0)) == {"a": 3 * 20.0 / 4, "b": 3 * 5.0}
