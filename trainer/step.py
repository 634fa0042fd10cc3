"""The training step: every player updates its own networks once, by its own loss and its own optimizer."""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from models import Player, System
from trainer.batch import Batch
from trainer.errors import memory_errors


def _not_finite(value: Tensor) -> Tensor:
    """Return whether a scalar is infinite or NaN, in two operations on the device; `isfinite` takes four."""
    return (value.detach() * 0).isnan()


@dataclass(eq=False)
class PlayerState:
    """A player with its networks and its optimizer."""

    player: Player
    networks: list[nn.Module]  # the networks that it may change, as they are called in training
    parameters: dict[str, nn.Parameter]  # their weights by name, without DDP's prefix
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # the loss scaler under fp16, else None
    overflows: Tensor  # scalar tensor, the updates in a row that the scaler has skipped

    @classmethod
    def create(cls, player: Player, system: System, scaler: torch.amp.GradScaler | None) -> "PlayerState":
        networks = [system.get_submodule(name) for name in player.networks]
        parameters = {
            f"{name}.{key.removeprefix('module.')}": value
            for name, network in zip(player.networks, networks, strict=True)
            for key, value in network.named_parameters()
        }
        settings = player.optimizer
        algorithm = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.algorithm]
        optimizer = algorithm(
            parameters.values(),
            settings.rate(0, 1),
            settings.betas_at(0),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        overflows = torch.zeros((), device=next(iter(parameters.values())).device)
        return cls(player, networks, parameters, optimizer, scaler, overflows)


@dataclass
class TermMeans:
    """Sums terms on the device, where they stay until they are logged."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, Tensor] = field(default_factory=dict)  # not in the sums yet
    weight: float = 1.0  # of those that wait

    def add(self, terms: dict[str, Tensor], weight: float = 1.0) -> None:
        """Add scalars by their names, in a few operations on the device for all of a step."""
        if weight != self.weight or not self.waiting.keys().isdisjoint(terms):
            self.fold()
        self.weight = weight
        self.waiting |= {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def fold(self) -> None:
        """Add what waits to the sums."""
        if not self.waiting:
            return
        names, together = [*self.waiting], torch.stack([*self.waiting.values()])
        together = together.to(torch.float64 if together.device.type != "mps" else torch.float32) * self.weight
        values = dict(zip(names, together.unbind(), strict=True))
        known = [name for name in names if name in self.sums]
        if known:
            torch._foreach_add_([self.sums[name] for name in known], [values[name] for name in known])
        self.sums = values | self.sums
        self.counts |= {name: self.counts.get(name, 0.0) + self.weight for name in names}
        self.waiting = {}

    def state(self) -> dict[str, tuple[float, float]]:
        """Return this process's sums and counts by name."""
        self.fold()
        return {name: (total.item(), self.counts[name]) for name, total in self.sums.items()}

    def load(self, states: list[dict[str, tuple[float, float]]], device: torch.device) -> None:
        """Continue from the mean of the sums that some processes' `state` returned."""
        for name, (_, count) in states[0].items():
            sums = torch.tensor([state[name][0] for state in states], dtype=torch.float64, device=device)
            self.sums[name], self.counts[name] = sums.mean(), count

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means since the last reading, over all processes. Waits for the device."""
        self.fold()
        if not self.sums:
            return {}
        sums = accelerator.reduce(torch.stack(list(self.sums.values())), "mean").tolist()
        means = {name: total / self.counts[name] for name, total in zip(self.sums, sums, strict=True)}
        self.sums, self.counts = {}, {}
        return means


def frozen_networks(system: System, train_only: Collection[str] | None) -> frozenset[str]:
    """Return the networks that trainer.train_only leaves as they are: those of `System.averaged` that it does not name.

    Raises:
        ValueError: it names none or others, or the system cannot be trained without those that it leaves out.
    """
    if train_only is None:
        return frozenset()
    if not train_only or not {*train_only} <= {*system.averaged}:
        raise ValueError(
            f"trainer.train_only is [{', '.join(train_only)}], expected one or more of {', '.join(system.averaged)}"
        )
    frozen = frozenset(system.averaged) - {*train_only}
    system.check_frozen(frozen)
    return frozen


def players_without(system: System, frozen: Collection[str]) -> list[Player]:
    """Return a system's players with the networks that they train; those that train none are left out."""
    players = system.players()
    trained = [tuple(name for name in player.networks if name not in frozen) for player in players]
    return [replace(player, networks=names) for player, names in zip(players, trained, strict=True) if names]


class TrainStep:
    """Updates the players of a system once per call.

    A loss or gradient that is not finite blocks its own and every later update on the device, so the host need not
    wait for it: `failure` then holds the step and the player. All later losses become NaN, so that the other processes,
    which average their gradients with this one's, block their updates, too. Under fp16 an overflowing gradient skips
    only its own update; `overflows` of them in a row count as a failure. Twenty take the loss scale from its first
    value to below 1.

    Args:
        accelerator: gives device, precision and processes
        system: a system whose networks `accelerator.prepare_model` has prepared; the gradients of networks without DDP
            are averaged in one vector after each player's last backward pass
        steps: steps of the whole run, for the schedules of learning rates
        share_passes: make the system's forward passes once per step for all players, if the batch is not split
        overflows: updates in a row that a player's scaler may skip
        frozen: networks that no player changes
        graphs: the networks are recorded as CUDA graphs, whose results may be overwritten from one step to the next
    """

    def __init__(
        self,
        accelerator: Accelerator,
        system: System,
        steps: int,
        share_passes: bool = True,
        overflows: int = 20,
        frozen: Collection[str] = (),
        graphs: bool = False,
    ):
        self.accelerator, self.system, self.steps, self.share_passes = accelerator, system, steps, share_passes
        self.overflows, self.graphs = overflows, graphs
        fp16 = accelerator.mixed_precision == "fp16"
        self.player_states = [
            PlayerState.create(player, system, torch.amp.GradScaler(accelerator.device.type) if fp16 else None)
            for player in players_without(system, frozen)
        ]
        self.weights = {name: [*network.parameters()] for name, network in system.networks().items()}
        self.meter = TermMeans()
        self.failure = torch.full((), -1, dtype=torch.int64, device=accelerator.device)

    @memory_errors()
    def __call__(self, batches: list[Batch], step: int) -> None:
        """Update every player that moves at this step.

        Args:
            batches: this process's micro-batches of one global batch
            step: the step, counted from 0

        Raises:
            RunError: a GPU has too little memory.
        """
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        moving = [state for state in self.player_states if state.player.moves(step)]
        shared = None
        if self.share_passes and len(batches) == 1:
            # The graph covers the networks of all players that move; each backward pass stops at its player's weights.
            self._freeze_all_but([name for state in moving for name in state.player.networks])
            with self.accelerator.autocast():
                shared = self.system.passes(batches[0])
        for state in moving:
            self._freeze_all_but(state.player.networks)
            statistics: dict[str, Tensor] = {}
            rows: dict[str, list[Tensor]] = {}
            for i, batch in enumerate(batches):
                with ExitStack() as unsynchronized:
                    if i < len(batches) - 1:
                        for network in state.networks:
                            if isinstance(network, DistributedDataParallel):
                                unsynchronized.enter_context(network.no_sync())
                    observed, own = self._backward(state, batch, shared, len(batches), step)
                for name, value in observed.items():
                    statistics[name] = value / len(batches) + statistics.get(name, 0)
                for name, value in own.items():
                    rows.setdefault(name, []).append(value)
            self._average_gradients(state)
            self._update(state, step)
            if state.player.after is not None:
                means = {name: self.accelerator.reduce(value, "mean") for name, value in statistics.items()}
                state.player.after(means | {name: torch.cat(parts) for name, parts in rows.items()})

    def _backward(
        self, state: PlayerState, batch: Batch, shared: object, parts: int, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add a micro-batch's gradients to the player's weights; return the loss's statistics and by_position."""
        with self.accelerator.autocast():
            passes = self.system.passes(batch) if shared is None else shared
            loss, terms, observed, own = state.player.loss(batch, passes)
        self._block(_not_finite(loss), state, step)
        scaled = loss * torch.where(self.failure < 0, 1 / parts, torch.nan)
        if state.scaler is not None:
            scaled = state.scaler.scale(scaled)
        torch.autograd.backward(scaled, inputs=list(state.parameters.values()))
        self.meter.add({f"{state.player.name}/{name}": value for name, value in terms.items()}, 1 / parts)
        return observed, own

    @torch.no_grad()
    def _average_gradients(self, state: PlayerState) -> None:
        """Average the gradients of networks without DDP over processes, in one vector, which cannot miss any."""
        plain = [network for network in state.networks if not isinstance(network, DistributedDataParallel)]
        if self.accelerator.num_processes == 1 or not plain:
            return
        weights = [weight for network in plain for weight in network.parameters()]
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for weight, gradient, part in zip(weights, gradients, mean.split([w.numel() for w in weights]), strict=True):
            weight.grad = gradient.copy_(part.view_as(weight))  # in the weight's memory format, as Adam takes it to be

    def _update(self, state: PlayerState, step: int) -> None:
        optimizer, scaler, clip = state.optimizer, state.scaler, state.player.optimizer.clip
        for group in optimizer.param_groups:
            group["lr"] = state.player.optimizer.rate(step, self.steps)
            group["betas"] = state.player.optimizer.betas_at(step)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in state.parameters.values() if p.grad is not None])
        if clip is not None:
            clip_grads_with_norm_(state.parameters.values(), clip, norm)
        terms = {"grad_norm": norm}
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
            overflowed = norm.isfinite().logical_not()
            state.overflows = torch.where(overflowed, state.overflows + 1, 0.0)
            self._block(state.overflows >= self.overflows, state, step)
            # One skipped update would make the mean of a whole log window infinite.
            terms = {"grad_norm": norm.masked_fill(overflowed, 0), "skipped_updates": overflowed.float()}
        else:
            self._block(_not_finite(norm), state, step)
            # Fused Adam leaves weights and moments untouched where found_inf is 1.
            optimizer.grad_scale, optimizer.found_inf = None, (self.failure >= 0).float()  # type: ignore[attr-defined]
            optimizer.step()
        optimizer.zero_grad()
        self.meter.add({f"{state.player.name}/{name}": value for name, value in terms.items()})

    def _freeze_all_but(self, names: Collection[str]) -> None:
        for name, weights in self.weights.items():
            for weight in weights:
                weight.requires_grad = name in names

    def _block(self, bad: Tensor, state: PlayerState, step: int) -> None:
        code = step * len(self.player_states) + self.player_states.index(state)
        self.failure.masked_fill_((self.failure < 0) & bad, code)

    def failed(self) -> tuple[int, Player] | None:
        """Return the first step and player, over all processes, whose loss or gradient was not finite, or None.

        Waits for the device.
        """
        codes = [code for code in self.accelerator.gather(self.failure.reshape(1)).tolist() if code >= 0]
        if not codes:
            return None
        step, player = divmod(min(codes), len(self.player_states))
        return step, self.player_states[player].player
