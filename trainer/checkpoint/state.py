"""What a checkpoint holds, by name, and whether a run may resume from it."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.order import Order
from data.redact import printable
from data.shards.reader import Shards
from models import System
from models import manifest as manifests
from trainer import schemas
from trainer.checkpoint.files import Tensors
from trainer.config.parser import Config
from trainer.config.resume import NEW_DATA_SETTINGS, RESUMABLE_SETTINGS, differences, flatten
from trainer.ema import EMA
from trainer.step import PlayerState

Parameters = dict[str, nn.Parameter]  # by name


class TrainState:
    """All that a training step changes, with what it was made from.

    Args:
        config: of the run
        system: its networks may be wrapped
        networks: the same networks, not wrapped
        ema: their averages
        player_states: optimizers and loss scalers
        trains: training sets
        orders: the order of each training set
        initial: what the run started from, as `Initial.record` of trainer/weights.py has it
    """

    def __init__(
        self,
        config: Config,
        system: System,
        networks: dict[str, nn.Module],
        ema: EMA,
        player_states: list[PlayerState],
        trains: list[Shards],
        orders: list[Order],
        initial: dict[str, Any] | None = None,
    ):
        self.config, self.system, self.networks, self.ema = config, system, networks, ema
        self.players = {state.player.name: state for state in player_states}
        self.trains, self.orders, self.initial = trains, orders, initial

    def tensors(self) -> Tensors:
        """Return all tensors by file and name; they are the run's own, not copies.

        Of `by_position`, they are the rows that this process holds.
        """
        averages = {name: network.state_dict() for name, network in self.ema.networks().items()}
        optimizers = {
            f"optimizer.{name}": optimizer_tensors(state.parameters, state.optimizer)
            for name, state in self.players.items()
        }
        return self.trained() | averages | optimizers

    def trained(self) -> Tensors:
        """Return the tensors of networks, statistics and `by_position`."""
        tensors: Tensors = {name: network.state_dict() for name, network in self.networks.items()}
        by_position = {name: self.system.get_buffer(name) for name in self.system.by_position}
        kept = {"statistics": self.system.statistics(), "by_position": by_position}
        return tensors | {file: content for file, content in kept.items() if content}

    def whole(self) -> Tensors:
        """Return tensors as `tensors` does, but of `by_position` the shapes of all processes' rows, without memory."""
        size, tensors = self.config.trainer.batch_size, self.tensors()
        for name, own in (rows := dict(tensors.get("by_position", {}))).items():
            rows[name] = torch.empty(size, *own.shape[1:], dtype=own.dtype, device="meta")
        return tensors | ({"by_position": rows} if rows else {})

    def manifest(self) -> dict[str, Any]:
        """Return the rest as plain data."""
        return {
            "configuration": self.config.resolved(),
            "data": self._data(),
            "frozen": frozen_checksums(self.system),
            **({"initial": self.initial} if self.initial else {}),
            "scalers": {
                name: state.scaler.state_dict() | {"overflows": int(state.overflows)}
                for name, state in self.players.items()
                if state.scaler
            },
        }

    def load(self, tensors: Tensors, manifest: dict[str, Any]) -> None:
        """Restore what `tensors` and `manifest` returned, with all processes' rows of `by_position`.

        Those of another batch size, which trainer.accept_new_data accepts, are left out: their positions are others.

        Raises:
            ValueError: tensors are missing, or have other names or shapes than the settings give.
        """
        expected = self.whole()
        if manifest["configuration"]["trainer"]["batch_size"] != self.config.trainer.batch_size:
            tensors, expected = ({k: v for k, v in of.items() if k != "by_position"} for of in (tensors, expected))
        self._check_tensors(tensors, expected)
        self.initial = manifest.get("initial")
        own = {name: value[self.system.rows] for name, value in tensors.get("by_position", {}).items()}
        self.load_networks(tensors | {"by_position": own})
        for name, network in self.ema.networks().items():
            network.load_state_dict(tensors[name])
        for name, state in self.players.items():
            load_optimizer(state.parameters, state.optimizer, tensors[f"optimizer.{name}"])
            if state.scaler:
                scaler = dict(manifest["scalers"][name])
                state.overflows.fill_(scaler.pop("overflows"))
                state.scaler.load_state_dict(scaler)

    def load_networks(self, tensors: Tensors) -> None:
        """Restore what `trained` returned."""
        for name, network in self.networks.items():
            network.load_state_dict(tensors[name])
        for file in ("statistics", "by_position"):
            for name, value in tensors.get(file, {}).items():
                self.system.get_buffer(name).copy_(value)

    def _check_tensors(self, tensors: Tensors, expected: Tensors) -> None:
        for name, state in self.players.items():  # a new optimizer has no tensors yet
            file = f"optimizer.{name}"
            updated = {key.rpartition(".")[0] for key in tensors.get(file, {})}  # not those of a later `start`
            expected[file] = optimizer_shapes({key: p for key, p in state.parameters.items() if key in updated})
        for name, own in expected.items():
            try:
                manifests.check_tensors(f"{name}.safetensors", tensors.get(name, {}), own)
            except ValueError as error:
                raise ValueError(f"the checkpoint in {self.config.run_dir} cannot be resumed from: {error}") from error

    def check(self, manifest: dict[str, Any], verbose: bool) -> None:
        """Check that the run has the settings and data with which the checkpoint was trained.

        Args:
            manifest: of a checkpoint
            verbose: print the differences that trainer.accept_new_data accepts

        Raises:
            ValueError: the manifest has another shape; or names all other differences but resumable ones.
        """
        where, steps = self.config.run_dir, self.config.trainer.steps
        saved = schemas.checked(manifest, schemas.ResumeManifest, f"the manifest of the checkpoint in {where}")
        self._check_settings(saved, verbose)
        if saved.step > steps:
            raise ValueError(
                f"trainer.steps is {steps:,}, but the run in {where} has already made {saved.step:,}: raise it, or "
                "choose another --trainer.run_dir"
            )
        if len(saved.data) != len(self.trains):
            raise ValueError(f"{where} has a run on {len(saved.data)} training sets; expected {len(self.trains)}")
        if missing := {name for name, state in self.players.items() if state.scaler} - saved.scalers.keys():
            raise ValueError(f"the manifest of the checkpoint in {where} lacks loss scalers: {', '.join(missing)}")

    def _check_settings(self, saved: schemas.ResumeManifest, verbose: bool) -> None:
        changed = self._changes(saved)
        new_data = [line for line in changed if line.partition(":")[0] in NEW_DATA_SETTINGS]
        if self.config.trainer.accept_new_data:
            changed = [line for line in changed if line not in new_data]
            if new_data and verbose:
                print("accepted:", *map(printable, new_data), sep="\n  ", file=sys.stderr)
        if changed:
            accept = "; or accept the new data with --trainer.accept_new_data true" if changed == new_data else ""
            raise ValueError(
                f"{self.config.run_dir} has a run with other settings:\n  " + "\n  ".join(changed) + "\nRestore them, "
                f"or choose another --trainer.run_dir{accept}. With the same networks, another run may start from this "
                "one's weights: --trainer.init_from"
            )

    def _changes(self, saved: schemas.ResumeManifest) -> list[str]:
        """Return one line for each difference to a checkpoint that is not resumable."""
        resumable = RESUMABLE_SETTINGS if self._same_rates(saved) else RESUMABLE_SETTINGS - {"trainer.steps"}
        changed = differences(saved.configuration, self.config.resolved(), resumable)
        for shards, was, now in zip(self.trains, saved.data, self._data(), strict=False):
            if was.fingerprint != now["fingerprint"]:
                before, after = (
                    f"{images:,} images in {count:,} shards"
                    for images, count in ((was.images, was.shards), (now["images"], now["shards"]))
                )
                other = " (other ones)" if before == after else ""
                changed.append(f"data.train: {before}{other} in the checkpoint, {after} now in {shards.source}")
            elif was.order != now["order"] and not changed:
                changed.append("data: data.lanes or data.window gives another order of samples than in the checkpoint")
        frozen = frozen_checksums(self.system)
        return changed + [
            f"{getattr(self.system, name).setting}: a file with sha256 {saved.frozen[name]} in the checkpoint, "
            f"{frozen[name]} now"
            for name in saved.frozen.keys() & frozen.keys()
            if saved.frozen[name] != frozen[name]
        ]

    def _same_rates(self, saved: schemas.ResumeManifest) -> bool:
        """Return whether the steps so far had the learning rates that a run of today's length has in them."""
        length, last = flatten(saved.configuration).get("trainer.steps"), saved.step - 1
        if not isinstance(length, int) or length < 1:
            return False
        optimizers = [state.player.optimizer for state in self.players.values()]
        # A run's length enters by `schedule` alone, whose factor goes on falling once it has begun to: rates that
        # differed earlier differ in the last step, too.
        return all(one.rate(last, length) == one.rate(last, self.config.trainer.steps) for one in optimizers)

    def _data(self) -> list[dict[str, Any]]:
        return [
            {
                "images": len(shards),
                "shards": len(shards.shards),
                "fingerprint": shards.fingerprint(),
                "order": order.fingerprint(),
            }
            for shards, order in zip(self.trains, self.orders, strict=True)
        ]


def optimizer_tensors(parameters: Parameters, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state by the names of its weights."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def optimizer_shapes(parameters: Parameters) -> dict[str, Tensor]:
    """Return tensors with the names and shapes that `optimizer_tensors` returns after Adam's first step."""
    step = torch.empty((), dtype=torch.float32)
    return {
        f"{name}.{key}": step if key == "step" else parameter
        for name, parameter in parameters.items()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def load_optimizer(parameters: Parameters, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned."""
    for name, value in tensors.items():
        weight, _, key = name.rpartition(".")
        parameter = parameters[weight]
        # The fused optimizers take moments to have the memory format of their weight, without a check on CPUs.
        layout = torch.empty_like(parameter if value.dim() else value, device=parameter.device, requires_grad=False)
        optimizer.state[parameter][key] = layout.copy_(value)


def frozen_checksums(system: System) -> dict[str, str]:
    """Return the sha256 of the file of each network that no player changes."""
    return {name: str(network.sha256) for name, network in system.named_children() if name in system.frozen}
