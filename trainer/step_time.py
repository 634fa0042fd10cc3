"""How long a training step takes on this machine, measured in trial steps on images of noise."""

import math
import time
from itertools import count
from typing import Any

import torch

from trainer.batch import Batch
from trainer.config.parser import Config
from trainer.networks import checkpoint_activations, set_memory_format
from trainer.step import TrainStep, frozen_networks
from trainer.step_memory import fake_accelerator

LONG = 0.5  # seconds of a step from which on its time grows with the number of images
STEPS, SECONDS = 16, 5.0  # that are measured at most


def seconds_per_image(config: Config, device: str, micro_batch: int) -> tuple[float, int]:
    """Return the seconds that a step takes for each image of a process, and the number of images that were tried.

    Steps are tried with ever more images, up to a micro-batch, until one takes half a second. The mean is of steps in
    which all players train; it leaves out what processes wait for each other, and trainer.compile.

    Args:
        config: the run's settings
        device: "cpu" or "cuda"
        micro_batch: images that pass through the networks at once

    Raises:
        RunError: the device has too little memory.
    """
    settings, data, place = config.trainer, config.data, torch.device(device)
    system = config.system().to(place)
    set_memory_format(system)
    checkpoint_activations(system, settings.activation_checkpointing)
    frozen = frozen_networks(system, settings.train_only)
    alone: Any = fake_accelerator(1, settings.precision, place)
    step = TrainStep(alone, system, settings.steps, settings.share_passes, frozen=frozen)
    numbers = count(max(start for one in step.player_states for start in one.player.starts))

    def seconds(size: int) -> float:
        rows, number = slice(0, size), next(numbers)
        images = tuple(torch.rand(size, *data.shape, device=place) * 2 - 1 for _ in range(system.domains))
        label = torch.zeros(size, dtype=torch.int64, device=place)
        began = time.perf_counter()
        step([Batch(images, rows, size, 0, number, label)], number)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - began

    size = min(micro_batch, math.lcm(4, *system.groups.values()))
    system.hold(slice(0, micro_batch), micro_batch)
    while seconds(size) < LONG and size < micro_batch:
        size = min(2 * size, micro_batch)
    taken = [seconds(size)]
    while len(taken) < STEPS and sum(taken) < SECONDS:
        taken.append(seconds(size))
    return sum(taken) / len(taken) / size, size
