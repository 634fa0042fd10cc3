"""Why a run has diverged: the error for the user, and RUN_DIR/failures for whoever looks for the cause."""

import json
import math
from contextlib import suppress

from data.errors import DataError
from data.loader import read
from data.redact import redacted_all
from models import Player
from trainer.errors import DivergedError
from trainer.log.logger import RunLogger
from trainer.log.pictures import GRID, Panels, grid
from trainer.parts import RunParts
from trainer.run_folder import RunFolder


class FailureReports:
    """Makes the error that ends a diverged run, and sets the run's status to "diverged"."""

    def __init__(self, parts: RunParts, folder: RunFolder, logger: RunLogger):
        self.parts, self.folder, self.logger = parts, folder, logger

    def not_finite(self, step: int, player: Player, terms: dict[str, float]) -> DivergedError:
        """Return the error for a loss or gradient that is not finite.

        The step's samples, terms and weights become `failures/step_<8 digits>.json`, and its first images a PNG.

        Args:
            step: the step, counted from 0
            player: the player whose update was blocked
            terms: means of all players' terms since the last log line
        """
        self._set_status()
        bad = [name for name, value in terms.items() if name.startswith(f"{player.name}/") and not math.isfinite(value)]
        message = f"step {step + 1}: player {player.name}: not finite: {', '.join(bad) or 'its gradient'}"
        if self.logger.is_main:
            self._write(step, message, terms)
        return DivergedError(
            f"{message}. No weight has changed since. {self._checkpoints()}The step's samples, terms and weights are "
            f"in {self.folder.path / 'failures'}. Start again in another run folder with a lower "
            f"--system.{player.name}.lr, or with --system.{player.name}.clip"
        )

    def unusable_images(self, step: int, reason: str) -> DivergedError:
        """Return the error for averaged networks whose images are not finite, though all losses and gradients were."""
        self._set_status()
        return DivergedError(
            f"step {step}: the averaged networks' images cannot be used: {reason}. {self._checkpoints()}Start again in "
            "another run folder with lower learning rates (--system.PLAYER.lr), or with --system.PLAYER.clip"
        )

    def _set_status(self) -> None:
        with suppress(OSError):  # the error that follows says more than one about this file
            self.folder.set_status("diverged")

    def _checkpoints(self) -> str:
        path = self.folder.checkpoints
        return f"The checkpoints in {path} are intact. " if path.exists() else ""

    def _write(self, step: int, message: str, terms: dict[str, float]) -> None:
        data, sets = self.parts.config.data, list(zip(self.parts.trains, self.parts.orders, strict=True))
        samples = [shards.names(order[step]) for shards, order in sets]
        images: Panels = {}
        with suppress(DataError):
            for i, (shards, order) in enumerate(sets):
                images[f"set {i}"] = read(shards, order[step][:GRID], *data.format).image
        weights = {
            f"{name}.{key}": {"largest": value.abs().max().item(), "finite": bool(value.isfinite().all())}
            for name, network in self.parts.networks.items()
            for key, value in network.named_parameters()
        }
        facts = {"step": step + 1, "message": message, "terms": terms, "samples": redacted_all(samples)}
        path = self.folder.path / "failures" / f"step_{step + 1:08d}.json"
        with self.logger.tolerate_disk_errors("failures"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(facts | {"weights": weights}, indent=1))
            if images:
                grid(images).save(path.with_suffix(".png"))
