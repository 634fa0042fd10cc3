"""What a run shows: TensorBoard, metrics.jsonl, a progress bar or lines, pictures."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from trainer.pictures import Panels, grid

PLAIN_TERMS = ("judge", "fool", "reconstruction", "kl")


class Record:
    """Writes into a run's folder from its main process; on others every method returns at once.

    Args:
        folder: the run's
        step: the run goes on from here; what an earlier try recorded after it is removed
        steps: of the whole run
        is_main: whether this process writes
    """

    def __init__(self, folder: Path, step: int, steps: int, is_main: bool):
        self.folder, self.steps, self.is_main = folder, steps, is_main
        if not is_main:
            return
        self.metrics = folder / "metrics.jsonl"
        if self.metrics.exists():
            lines = self.metrics.read_text().splitlines(keepends=True)
            self.metrics.write_text("".join(line for line in lines if _step_of(line) <= step))
        self.board = SummaryWriter(str(folder), purge_step=step + 1)
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.began, self.first = time.monotonic(), step

    def layout(self, modes: list[str]) -> None:
        """Charts that put FID beside rFID, each discriminator's loss beside chance, its accuracies together, and the
        rows of a ternary one's confusion matrix."""
        if self.is_main:
            layout = {"scores": {"FID and rFID": ["Multiline", ["eval/fid.*", "eval/rfid.*"]]}}
            for mode in modes:
                layout[mode] = {
                    "loss and chance": ["Multiline", [f"{mode}/(./)?judge", f"{mode}/(./)?chance"]],
                    "accuracy": ["Multiline", [f"{mode}/.*accuracy/.*"]],
                }
            if "ternary" in modes:
                for kind in ("real", "reconstructed", "generated"):
                    layout["ternary"][f"{kind} images are named"] = ["Multiline", [f"ternary/named/{kind}/.*"]]
            self.board.add_custom_scalars(layout)

    def configuration(self, text: str) -> None:
        if self.is_main:
            (self.folder / "config.yaml").write_text(text)
            self.board.add_text("configuration", f"```yaml\n{text}\n```", 0)

    def advance(self) -> None:
        if self.is_main:
            self.bar.update()

    def say(self, text: str) -> None:
        """A line for the terminal, above the bar if there is one."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def scalars(self, step: int, values: dict[str, float], **facts: Any) -> None:
        """Scores or terms at a step; `facts` go into metrics.jsonl only."""
        if not self.is_main:
            return
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": step, **values, **facts}) + "\n")

    def terms(self, step: int, values: dict[str, float], **facts: Any) -> None:
        """A log line's terms: recorded, and the main ones shown."""
        self.scalars(step, values, **facts)
        if not self.is_main:
            return
        shown = {name: f"{value:.3g}" for name, value in values.items() if name.split("/")[1] in PLAIN_TERMS}
        shown |= {
            "images/s": f"{values['speed/images_per_second']:.0f}",
            "data wait": f"{values['speed/data_wait']:.0%}",
        }
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        if self.bar.disable:
            left = (time.monotonic() - self.began) / (step - self.first) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {text}  eta {tqdm.format_interval(left)}")
        else:
            self.bar.set_postfix_str(text)

    def pictures(self, step: int, panels: Panels) -> None:
        """A grid as `samples/step_<8 digits>.png` and in TensorBoard."""
        if self.is_main:
            picture = grid(panels)
            (self.folder / "samples").mkdir(exist_ok=True)
            picture.save(self.folder / "samples" / f"step_{step:08d}.png")
            self.board.add_image(" | ".join(panels), np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            self.board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut short by a kill
        return math.inf
