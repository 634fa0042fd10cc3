"""What an export states and shows of images: the statistics of their latents, and a picture."""

import torch

from data.errors import DataError
from data.images import LIMITS
from data.loader import Samples
from trainer.blocks import Blocks
from trainer.evaluate.target import open_images
from trainer.export.folder import TrainedCheckpoint
from trainer.latents import LatentEncoder, LatentStatistics, latent_statistics
from trainer.log.pictures import Panels, grid_inputs, panel_size, panels


def open_sets(source: TrainedCheckpoint, named: str | None, num: int) -> tuple[list[Samples], list[Samples]]:
    """Return the sets of images to measure latents on, and those to show.

    They are `named`, a folder of images or shards, or else the run's training and held-out sets; none if `num` is 0.

    Raises:
        ValueError, DataError: they cannot be read; says how to name others.
    """
    system, data = source.system, source.data_config
    if not num:
        if named:
            raise ValueError("--images has no effect with --num 0, which reads no images: leave one out")
        return [], []
    if named:
        if system.domains > 1:
            raise ValueError(f"--images names one set of images, but {type(system).__name__} has two: leave it out")
        images: Samples = open_images(named, LIMITS)
        return [images], [images]
    try:
        measured = data.open(data.trains, data.on_error, by_user=False) if system.can("posterior") else []
        shown = data.open(data.tests, by_user=False) if data.tests else []
        return [*measured], [*(shown or measured or data.open(data.trains, data.on_error, by_user=False))]
    except DataError as error:
        raise DataError(
            f"the run's images cannot be read: {error}. Name a folder of images or shards with --images, or export "
            "without the latents' statistics and without real images by --num 0"
        ) from error


def measure(source: TrainedCheckpoint, sets: list[Samples], num: int, device: str | None) -> LatentStatistics | None:
    """Return the statistics of the latents of images; None without images or without an encoder."""
    if not sets or not source.system.can("posterior"):
        return None
    data = source.data_config
    return latent_statistics(LatentEncoder(source.system, data.size, data.channels, device, data.bits), sets, num)


def pictures(source: TrainedCheckpoint, sets: list[Samples], device: str | None) -> Panels:
    """Return images and what the system makes of them; without images, samples alone.

    Raises:
        ValueError: an image is not finite.
    """
    system, seed = source.system, source.saved.configuration.trainer.seed
    blocks = Blocks(system, source.data_config.size, device)
    draws = system.can("sample") and source.saved.configuration.evaluate.num != 0
    if not sets and not draws:
        return {}
    _, number = panel_size(system.classes, source.image_shape)
    inputs = grid_inputs(sets, source.data_config, seed, system, torch.device(blocks.device), draws).part(slice(number))
    try:
        num = min(map(len, [*inputs.real, *([] if inputs.z is None else [inputs.z])]))
        made = [panels(system, inputs.part(slice(rows.start, rows.stop))) for rows in blocks.rows(num)]
    except FloatingPointError as error:
        raise ValueError(f"{error}: the run has diverged, choose an earlier checkpoint") from error
    return {title: torch.cat([part[title] for part in made]) for title in made[0]}
