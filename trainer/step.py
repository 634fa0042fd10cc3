"""One step: every player moves once, on its own loss, its own networks and its own optimizer."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from models import Player, System
from models.system import freeze_all_but
from trainer.batch import Batch


@dataclass
class PlayerState:
    """A player with what moves it."""

    player: Player
    networks: list[nn.Module]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    overflows: Tensor  # updates in a row that its scaler has skipped

    @classmethod
    def of(cls, player: Player, system: System, scaler: torch.amp.GradScaler | None) -> "PlayerState":
        networks = [system.get_submodule(name) for name in player.networks]
        parameters = {
            f"{name}.{key.removeprefix('module.')}": value
            for name, network in zip(player.networks, networks, strict=True)
            for key, value in network.named_parameters()
        }
        settings = player.optimizer
        algorithm = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.algorithm]
        optimizer = algorithm(
            parameters.values(), settings.lr, settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        overflows = torch.zeros((), device=next(iter(parameters.values())).device)
        return cls(player, networks, parameters, optimizer, scaler, overflows)


@dataclass
class TermMeans:
    """Sums of terms on the device, read when logged only."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        value = value.detach().to(torch.float64 if value.device.type != "mps" else torch.float32) * weight
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0.0) + weight

    def state(self) -> dict[str, tuple[float, float]]:
        """Sums and counts by name, of this process."""
        return {name: (total.item(), self.counts[name]) for name, total in self.sums.items()}

    def load(self, states: list[dict[str, tuple[float, float]]], device: torch.device) -> None:
        """Go on from the mean of some processes' sums."""
        for name, (_, count) in states[0].items():
            sums = torch.tensor([state[name][0] for state in states], dtype=torch.float64, device=device)
            self.add(name, sums.mean())
            self.counts[name] = count

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last reading, over all processes. The one place where the host waits for the device."""
        if not self.sums:
            return {}
        sums = accelerator.reduce(torch.stack(list(self.sums.values())), "mean").tolist()
        means = {name: total / self.counts[name] for name, total in zip(self.sums, sums, strict=True)}
        self.sums, self.counts = {}, {}
        return means


class TrainStep:
    """Moves the players of a system whose networks are wrapped for distribution already.

    A non-finite loss or gradient blocks its own and every later update, without the host's waiting: `failure` then
    holds the step and the player, and the loss of every later move is made non-finite, so that all processes, which
    share their gradients, block alike. Under fp16 an overflowing gradient skips only its own update, by its scaler;
    `overflows` of them in a row are a failure: 20 take the scale from its first value to under 1.

    Args:
        accelerator: gives device, precision and processes
        system: its networks prepared by `accelerator.prepare_model`; those that are not wrapped by DDP have their
            gradients averaged flat
        steps: of the whole run, for the schedules of learning rates
        share_passes: keep one set of passes a step for all players, where the batch is not split
        overflows: updates in a row that a player's scaler may skip
    """

    def __init__(
        self, accelerator: Accelerator, system: System, steps: int, share_passes: bool = True, overflows: int = 20
    ):
        self.accelerator, self.system, self.steps, self.share_passes = accelerator, system, steps, share_passes
        self.overflows = overflows
        fp16 = accelerator.mixed_precision == "fp16"
        self.player_states = [
            PlayerState.of(player, system, torch.amp.GradScaler(accelerator.device.type) if fp16 else None)
            for player in system.players()
        ]
        self.meter = TermMeans()
        self.failure = torch.full((), -1, dtype=torch.int64, device=accelerator.device)

    def __call__(self, batches: list[Batch], step: int) -> None:
        """Move every player whose turn it is, on this process's micro-batches of one global batch."""
        moving = [player_state for player_state in self.player_states if player_state.player.moves(step)]
        shared = None
        if self.share_passes and len(batches) == 1:
            # Made with a graph for the player_states' own networks; each backward stops at its player_state's weights.
            freeze_all_but(self.system, [name for player_state in moving for name in player_state.player.networks])
            with self.accelerator.autocast():
                shared = self.system.passes(batches[0])
        for player_state in moving:
            freeze_all_but(self.system, player_state.player.networks)
            statistics: dict[str, Tensor] = {}
            for i, batch in enumerate(batches):
                with ExitStack() as unsynchronized:
                    if i < len(batches) - 1:
                        for network in player_state.networks:
                            if isinstance(network, DistributedDataParallel):
                                unsynchronized.enter_context(network.no_sync())
                    self._gradients(player_state, batch, shared, len(batches), step, statistics)
            self._average(player_state)
            self._update(player_state, step)
            if player_state.player.after is not None:
                player_state.player.after({name: self.accelerator.reduce(v, "mean") for name, v in statistics.items()})

    def _gradients(
        self,
        player_state: PlayerState,
        batch: Batch,
        shared: object,
        parts: int,
        step: int,
        statistics: dict[str, Tensor],
    ) -> None:
        with self.accelerator.autocast():
            passes = self.system.passes(batch) if shared is None else shared
            loss, terms, observed = player_state.player.loss(batch, passes)
        self._block(~loss.isfinite(), player_state, step)
        scaled = loss * torch.where(self.failure < 0, 1.0, torch.nan) / parts
        if player_state.scaler is not None:
            scaled = player_state.scaler.scale(scaled)
        torch.autograd.backward(scaled, inputs=list(player_state.parameters.values()))
        for name, value in terms.items():
            self.meter.add(f"{player_state.player.name}/{name}", value, 1 / parts)
        for name, value in observed.items():
            statistics[name] = value / parts + statistics.get(name, 0)

    @torch.no_grad()
    def _average(self, player_state: PlayerState) -> None:
        """The mean over processes of all gradients of networks without DDP, as one vector: none can be missed."""
        plain = [network for network in player_state.networks if not isinstance(network, DistributedDataParallel)]
        if self.accelerator.num_processes == 1 or not plain:
            return
        weights = [weight for network in plain for weight in network.parameters()]
        own = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in own]), "mean")
        for weight, part in zip(weights, mean.split([weight.numel() for weight in weights]), strict=True):
            weight.grad = part.view_as(weight)

    def _update(self, player_state: PlayerState, step: int) -> None:
        optimizer, scaler, clip = player_state.optimizer, player_state.scaler, player_state.player.optimizer.clip
        for group in optimizer.param_groups:
            group["lr"] = player_state.player.optimizer.rate(step, self.steps)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in player_state.parameters.values() if p.grad is not None])
        if clip is not None:
            clip_grads_with_norm_(player_state.parameters.values(), clip, norm)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
            player_state.overflows = torch.where(norm.isfinite(), 0.0, player_state.overflows + 1)
            self._block(player_state.overflows >= self.overflows, player_state, step)
        else:
            self._block(~norm.isfinite(), player_state, step)
            # Fused AdamW leaves weights and moments untouched where found_inf is 1.
            optimizer.grad_scale, optimizer.found_inf = None, (self.failure >= 0).float()  # type: ignore[attr-defined]
            optimizer.step()
        optimizer.zero_grad()
        self.meter.add(f"{player_state.player.name}/grad_norm", norm)

    def _block(self, bad: Tensor, player_state: PlayerState, step: int) -> None:
        code = step * len(self.player_states) + self.player_states.index(player_state)
        self.failure = torch.where((self.failure < 0) & bad, code, self.failure)

    def failed(self) -> tuple[int, Player] | None:
        """The first step and player, over all processes, with a non-finite loss or gradient."""
        codes = [code for code in self.accelerator.gather(self.failure.reshape(1)).tolist() if code >= 0]
        if not codes:
            return None
        step, player = divmod(min(codes), len(self.player_states))
        return step, self.player_states[player].player
