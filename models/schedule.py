"""Settings that vary over a run, as pure functions of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` along half a cosine, and stays there.

    At step k of `steps` it is end + (start - end) (1 + cos(pi k / steps)) / 2, as the settings of R3GAN vary (Huang et
    al. 2024, "The GAN is dead; long live the GAN!", appendix on hyperparameters).

    Args:
        start: its value at step 0
        end: its value from step `steps` on
        steps: steps from the one to the other, more than 0
    """

    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        """Return its value at a step, counted from 0."""
        risen = (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2
        return self.end + (self.start - self.end) * risen

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g} in {self.steps:,} steps"


Varying = float | Schedule  # a setting that is the same at every step, or that varies


def at(setting: Varying, step: int) -> float:
    """Return a setting's value at a step, counted from 0."""
    return setting.at(step) if isinstance(setting, Schedule) else setting


def largest(setting: Varying) -> float:
    """Return the largest value of a setting in any run."""
    return max(setting.start, setting.end) if isinstance(setting, Schedule) else setting
