"""How long a training step takes on this machine, measured in trial steps on images of noise."""

import math
import statistics
import time
from collections import Counter
from typing import Any

import torch

from trainer.batch import Batch
from trainer.config.parser import Config
from trainer.distributed.accelerator import keep_freed_memory
from trainer.errors import memory_errors
from trainer.flops import kind_of_move
from trainer.networks import checkpoint_activations, set_memory_format
from trainer.step import TrainStep, frozen_networks
from trainer.step_memory import fake_accelerator

LONG = 0.5  # seconds of a step from which on its time grows with the number of images
ROUNDS, SECONDS = 4, 5.0  # of measured steps at most
CYCLE = 64  # steps in which players and penalties that are not due in every step return


@memory_errors()
def seconds_per_image(config: Config, device: str, micro_batch: int, share_passes: bool) -> tuple[float, int]:
    """Return the seconds that a step takes for each image of a process, and the number of images that were tried.

    Steps are tried with ever more images, up to a micro-batch, until one takes half a second. Each kind of step, by the
    players that move and the penalties that are due, counts as often as it occurs once all players have begun. Reading
    images, waiting for other processes and trainer.compile are left out.

    Args:
        config: the run's settings
        device: "cpu" or "cuda"
        micro_batch: images that pass through the networks at once
        share_passes: whether players share passes, as they do in steps of one micro-batch

    Raises:
        RunError: the GPU has too little memory.
    """
    if device == "cpu":
        keep_freed_memory()
    trial = Trial(config, torch.device(device), share_passes)
    players = [state.player for state in trial.step.player_states]
    begin = max(start for player in players for start in player.starts)
    kinds = {n: tuple(kind_of_move(player, n) for player in players) for n in range(begin, begin + CYCLE)}
    examples = {kind: n for n, kind in reversed(kinds.items())}  # the first step of each kind

    size = min(micro_batch, math.lcm(*trial.system.groups.values()))
    # The first step of a size also loads and chooses kernels.
    while min(trial.seconds(size, begin), trial.seconds(size, begin)) < LONG and size < micro_batch:
        size = min(2 * size, micro_batch)
    for number in examples.values():
        trial.seconds(size, number)
    rounds = list[list[float]]()
    while not rounds or (len(rounds) < ROUNDS and sum(map(sum, rounds)) < SECONDS):
        rounds.append([trial.seconds(size, number) for number in examples.values()])
    means, counts = map(statistics.mean, zip(*rounds, strict=True)), Counter(kinds.values())
    mean = sum(mean * counts[kind] for kind, mean in zip(examples, means, strict=True)) / CYCLE
    return mean / size, size


class Trial:
    """A system and its step, on one process and without a run.

    Args:
        config: the run's settings
        device: where steps are taken
        share_passes: whether players share passes
    """

    def __init__(self, config: Config, device: torch.device, share_passes: bool):
        settings, self.shape, self.device = config.trainer, config.data.shape, device
        self.system = config.system().to(device)
        set_memory_format(self.system)
        checkpoint_activations(self.system, settings.activation_checkpointing)
        self.system.hold(slice(0, settings.batch_size), settings.batch_size)
        frozen = frozen_networks(self.system, settings.train_only)
        alone: Any = fake_accelerator(1, settings.precision, device)
        self.step = TrainStep(alone, self.system, settings.steps, share_passes, frozen=frozen)

    def seconds(self, size: int, number: int) -> float:
        """Return the seconds that step `number` takes with `size` images."""
        made = (torch.rand(size, *self.shape, device=self.device) for _ in range(self.system.domains))
        images, label = tuple(one * 2 - 1 for one in made), torch.zeros(size, dtype=torch.int64, device=self.device)
        began = time.perf_counter()
        self.step([Batch(images, slice(0, size), size, 0, number, label)], number)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began
