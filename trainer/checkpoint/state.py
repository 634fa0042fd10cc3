"""What a run keeps between its processes' lives, by name, and whether it may go on from what was kept."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from data.order import Order
from data.shards.reader import Shards
from models import System
from models import manifest as manifests
from trainer import schemas
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint import state as checkpoint_state
from trainer.config.parser import Config
from trainer.config.resume import RESUMABLE_SETTINGS, differences
from trainer.ema import EMA
from trainer.step import PlayerState


def optimizer_tensors(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state, by the names of its weights."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def optimizer_shapes(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Tensors of the names and shapes that `optimizer_tensors` gives once Adam has made a step."""
    step = torch.empty((), dtype=torch.float32)
    return {
        f"{name}.{key}": step if key == "step" else parameter
        for name, parameter in parameters.items()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def load_optimizer(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took."""
    for name, value in tensors.items():
        weight, _, key = name.rpartition(".")
        parameter = parameters[weight]
        optimizer.state[parameter][key] = value.to(parameter.device)


# Settings of what steps see, with others of which a run may go on if told to.
NEW_DATA = frozenset({"data", "data.train", "data.crop", "data.flip", "trainer.batch_size"})


class TrainState:
    """Networks, their averages, statistics and optimizers, with what they came from.

    Args:
        config: of the run
        system: its networks may be wrapped
        networks: the same, not wrapped
        ema: their averages
        player_states: their optimizers and scalers
        trains, orders: of each training set
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
    ):
        self.config, self.system, self.networks, self.ema = config, system, networks, ema
        self.player_states, self.trains, self.orders = player_states, trains, orders

    def tensors(self) -> checkpoint_files.Tensors:
        """All tensors by file and name: the run's own, not copies."""
        tensors = self.trained()
        tensors |= {f"ema.{name}": network.state_dict() for name, network in self.ema.system.named_children()}
        return tensors | {
            f"optimizer.{player_state.player.name}": checkpoint_state.optimizer_tensors(
                player_state.parameters, player_state.optimizer
            )
            for player_state in self.player_states
        }

    def trained(self) -> checkpoint_files.Tensors:
        """Networks and statistics alone."""
        tensors = {name: network.state_dict() for name, network in self.networks.items()}
        if statistics := dict(self.system.named_buffers(recurse=False)):
            tensors["statistics"] = statistics
        return tensors

    def manifest(self) -> dict[str, Any]:
        """The rest, as plain data."""
        return {
            "configuration": self.config.resolved(),
            "data": self._data(),
            "frozen": frozen_checksums(self.system),
            "scalers": {
                player_state.player.name: player_state.scaler.state_dict() | {"overflows": int(player_state.overflows)}
                for player_state in self.player_states
                if player_state.scaler
            },
        }

    def load(self, tensors: checkpoint_files.Tensors, manifest: dict[str, Any]) -> None:
        """Put back what `tensors` and `manifest` gave.

        Raises:
            ValueError: tensors are missing, or of other names or shapes than the settings give.
        """
        self._check_tensors(tensors)
        self.load_networks(tensors)
        for name, network in self.ema.system.named_children():
            network.load_state_dict(tensors[f"ema.{name}"])
        for player_state in self.player_states:
            checkpoint_state.load_optimizer(
                player_state.parameters, player_state.optimizer, tensors[f"optimizer.{player_state.player.name}"]
            )
            if player_state.scaler:
                scaler = dict(manifest["scalers"][player_state.player.name])
                player_state.overflows.fill_(scaler.pop("overflows"))
                player_state.scaler.load_state_dict(scaler)

    def _check_tensors(self, tensors: checkpoint_files.Tensors) -> None:
        expected = self.tensors()
        for player_state in self.player_states:  # an optimizer knows no tensors yet
            file = f"optimizer.{player_state.player.name}"
            moved = {name.rpartition(".")[0] for name in tensors.get(file, {})}  # late starters have not moved yet
            expected[file] = checkpoint_state.optimizer_shapes(
                {n: p for n, p in player_state.parameters.items() if n in moved}
            )
        for name, own in expected.items():
            try:
                manifests.check_tensors(f"{name}.safetensors", tensors.get(name, {}), own)
            except ValueError as error:
                raise ValueError(f"the checkpoint in {self.config.run_dir} cannot be gone on from: {error}") from error

    def load_networks(self, tensors: checkpoint_files.Tensors) -> None:
        """Put back what `trained` gave."""
        for name, network in self.networks.items():
            network.load_state_dict(tensors[name])
        for name, buffer in self.system.named_buffers(recurse=False):
            buffer.copy_(tensors["statistics"][name])

    def check(self, manifest: dict[str, Any], speaks: bool) -> None:
        """A run goes on with the settings and data that it began with.

        Args:
            manifest: a checkpoint's
            speaks: whether this process says which changes are accepted

        Raises:
            ValueError: names what is other, less what may be and what the settings accept.
        """
        where, steps = self.config.run_dir, self.config.trainer.steps
        kept = schemas.checked(manifest, schemas.Kept, f"the manifest of the checkpoint in {where}")
        changed = self._changes(manifest)
        accepted = [line for line in changed if self.config.trainer.accept_new_data and _is_new_data(line)]
        if accepted and speaks:
            print("accepted:", *accepted, sep="\n  ", file=sys.stderr)
        changed = [line for line in changed if line not in accepted]
        if changed:
            raise ValueError(
                f"{where} holds a run with other settings, and cannot go on with these:\n  "
                + "\n  ".join(changed)
                + "\nTake the old settings, or another --trainer.run_dir"
                + "; or accept what steps see as it is now: --trainer.accept_new_data true"
                * all(map(_is_new_data, changed))
            )
        if kept.step > steps:
            raise ValueError(
                f"trainer.steps is {steps:,}, and {where} holds a run that has made {kept.step:,} already: raise it, "
                "or take another --trainer.run_dir"
            )
        if len(kept.data) != len(self.trains):
            raise ValueError(f"{where} holds a run on {len(kept.data)} sets of images, expected {len(self.trains)}")
        if (
            fp16 := {player_state.player.name for player_state in self.player_states if player_state.scaler}
            - kept.scalers.keys()
        ):
            raise ValueError(f"the manifest of the checkpoint in {where} lacks the loss scaler of {', '.join(fp16)}")

    def _changes(self, manifest: dict[str, Any]) -> list[str]:
        """What is other than when the run was saved, a line each, less what may be."""
        scheduled = any(player_state.player.optimizer.schedule != "constant" for player_state in self.player_states)
        free = RESUMABLE_SETTINGS - {"trainer.steps"} if scheduled else RESUMABLE_SETTINGS
        changed = differences(manifest["configuration"], self.config.resolved(), free=free)
        for shards, saved, now in zip(self.trains, manifest["data"], self._data(), strict=False):
            if saved["fingerprint"] != now["fingerprint"]:
                was, has = (f"{of['images']:,} images in {of['shards']:,} shards" for of in (saved, now))
                other = " (other ones)" if was == has else ""
                changed.append(f"data.train: {was}{other} in the checkpoint, {has} now in {shards.source}")
            elif saved["order"] != now["order"] and not changed:
                changed.append("data: another order of samples than in the checkpoint, by data.lanes or data.window")
        files, here = manifest["frozen"], frozen_checksums(self.system)
        return changed + [
            f"system.{name}_weights: a file of sha256 {files[name]} in the checkpoint, {here[name]} now"
            for name in files.keys() & here.keys()
            if files[name] != here[name]
        ]

    def _data(self) -> list[dict[str, Any]]:
        """Of each training set, what a step sees of it."""
        return [
            {
                "images": len(shards),
                "shards": len(shards.shards),
                "fingerprint": shards.fingerprint(),
                "order": order.fingerprint(),
            }
            for shards, order in zip(self.trains, self.orders, strict=True)
        ]


def frozen_checksums(system: System) -> dict[str, str]:
    """sha256 of the files of networks that nobody moves."""
    return {name: str(network.sha256) for name, network in system.named_children() if name in system.frozen}


def _is_new_data(line: str) -> bool:
    """Whether a difference is of what steps see."""
    return line.partition(":")[0] in NEW_DATA
