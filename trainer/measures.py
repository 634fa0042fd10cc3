"""The measures by which runs are compared: their names in metrics.jsonl and on pages, and which way is better."""

import re
import statistics
from typing import Any, Literal, NamedTuple

MISSING = "\N{EN DASH}"  # in place of a score that a system cannot have


class Measure(NamedTuple):
    """A column of the table of scores; metrics.jsonl has its values as eval/KEY and the number of images."""

    key: str
    head: str
    better: Literal["lower", "higher", "near 1"]
    digits: int  # decimal places to show

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑", "near 1": "→\N{NO-BREAK SPACE}1"}[self.better]

    def tags(self, line: dict[str, Any]) -> list[str]:
        """Return its names in an evaluation's line: one, none if the system cannot have it, two of two directions."""
        return [name for name in line if re.match(rf"eval/{self.key}\d", name)]

    @classmethod
    def of(cls, tag: str) -> "Measure | None":
        """Return the measure of a score by its name in an evaluation's line, None of others."""
        key = re.match(r"eval/([a-z_]+)\d", tag)
        return NAMED.get(key[1]) if key else None

    def text(self, value: float | None) -> str:
        """Return a value as it is shown."""
        if value is None:
            return MISSING
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{self.digits}f}"

    def spread(self, values: list[float]) -> str:
        """Return the mean and, of several values, the range as they are shown."""
        mean = self.text(statistics.mean(values))
        return mean if len(values) == 1 else f"{mean} ({self.range(values)})"

    def range(self, values: list[float]) -> str:
        return f"{self.text(min(values))} to {self.text(max(values))}"


COLUMNS = [
    Measure("fid", "FID", "lower", 2),
    Measure("is", "IS", "higher", 2),
    Measure("kid", "KID", "lower", 4),
    Measure("precision", "precision", "higher", 2),
    Measure("recall", "recall", "higher", 2),
    Measure("density", "density", "higher", 2),
    Measure("coverage", "coverage", "higher", 2),
    Measure("rfid", "rFID", "lower", 2),
    Measure("psnr", "PSNR", "higher", 1),
    Measure("ssim", "SSIM", "higher", 3),
    Measure("sharpness", "sharpness, samples", "near 1", 2),
    Measure("sharpness_reconstructed", "sharpness, reconstructed", "near 1", 2),
    Measure("prior_gap", "prior gap", "lower", 2),
    Measure("active_units", "active units", "higher", 1),
    Measure("z_recovered", "z recovered (R²)", "higher", 2),
    Measure("images_per_second", "images/s", "higher", 0),
]
MEASURES = {measure.key: measure for measure in COLUMNS}
NAMED = MEASURES | {
    one.key: one
    for one in (
        Measure("cycle_psnr", "PSNR of cycles", "higher", 1),
        Measure("lpips_vgg", "LPIPS (VGG16)", "lower", 3),
        Measure("spectrum", "spectrum", "lower", 2),
    )
}
# Of neighbours among samples and held-out images: of fewer than FEW they flatter noise, and are left out.
OF_NEIGHBOURS = {"precision", "recall", "density", "coverage"}
