"""Warnings about a run's data: damaged images, and steps that wait for images."""

from contextlib import suppress
from statistics import median

import numpy as np

from data.images import header, sides
from data.redact import redacted
from data.shards.reader import Shards
from models.networks.config import LARGEST, SMALLEST
from trainer.config.parser import Config
from trainer.config.settings import DataConfig
from trainer.errors import RunError
from trainer.log.health import WAITING

LEAST = 1000  # images; data.max_skipped is a share of at least this many
FIRST, ENLARGED = 8, 1.25  # images of a data set whose sizes are looked at, and the factor that is warned of


class DataHealth:
    """Counts the damaged images of a run that other images replaced, and warns once if steps wait for data.

    Args:
        config: the run's settings
        first_step: the step at which this process started or resumed
        replaced: damaged images before that step
    """

    def __init__(self, config: Config, first_step: int, replaced: int):
        self.config, self.first_step, self.replaced = config, first_step, replaced
        self.warned = False

    def check_replaced(self, step: int) -> None:
        """Check that no more images were damaged than data.max_skipped allows; raise RunError if there were."""
        data = self.config.data
        shown = step * self.config.trainer.batch_size * len(data.trains)
        if self.replaced > data.max_skipped * max(shown, LEAST):
            raise RunError(
                f"step {step}: {self.replaced} of {shown:,} images were damaged, more than data.max_skipped "
                f"{data.max_skipped:g} allows: repair the data (python -m data.inspect FOLDER --verify lists what is "
                "wrong), or raise --data.max_skipped"
            )

    def slow_data_warning(self, step: int, data_wait: float) -> str | None:
        """Return a warning if steps wait for data for a share `data_wait`, in [0, 1], of the time that is too large.

        None in the first log lines, and after the first warning.
        """
        data = self.config.data
        if data_wait <= WAITING or self.warned or step <= self.first_step + self.config.trainer.log_every:
            return None
        self.warned = True
        return (
            f"steps wait for data {data_wait:.0%} of the time: raise --data.workers (now {data.workers}), or prepare "
            f"smaller images (python -m data.prepare --size {min(sides(data.size))})"
        )


def size_warning(shards: Shards, data: DataConfig) -> str | None:
    """Return a warning if data.size hardly suits a data set's first images, None if it does.

    Most of them are much smaller, or data.size has its default and all are squares of another size, as prepared ones.
    Images that are too small for any network are meant to be enlarged. Of remote shards none is looked at, as a whole
    one would be fetched. Damaged images are left to the run.
    """
    if not len(shards) or shards.remote[0]:
        return None
    (height, width), found = sides(data.size), list[tuple[float, tuple[int, int]]]()
    for content in shards.images(np.arange(min(FIRST, len(shards))))[0]:
        with suppress(ValueError):
            (columns, rows), _ = header(content, shards.limits)
            if min(rows, columns) >= SMALLEST:
                found.append((max(height / rows, width / columns), (rows, columns)))
    if not found:
        return None
    rows, columns = max(found)[1]
    if median(factor for factor, _ in found) >= ENLARGED:
        return (
            f"data.size is {data.size}, but the first images of {redacted(shards.source)} are smaller, such as "
            f"{rows} x {columns} pixels: they are enlarged, which adds no detail. Lower --data.size, or prepare larger "
            "images"
        )
    prepared = {size for _, size in found} == {(rows, rows)} and rows <= LARGEST
    if data.size == DataConfig.size and prepared and rows > height and data.crop != "random":
        return (
            f"data.size is {data.size}, and the images of {redacted(shards.source)} have {rows} x {rows} pixels: they "
            f"are shrunk. If that is not meant, add --data.size {rows}"
        )
    return None
