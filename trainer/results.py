"""The numbers of a comparison: what each run scored, and which of the family's promises the scores bear out."""

import json
import re
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from models.manifest import check_regular
from trainer import schemas

Line = dict[str, Any]
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided: the seeds overlap"
FAR = 2.0  # times a VAE's FID: far worse
NEAR = 0.9  # of z recovered: nearly all


class Measure(NamedTuple):
    """A column. In the scores' names `key` is followed by the count of images."""

    key: str
    head: str
    better: Literal["lower", "higher", "one"]
    digits: int

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑", "one": "→ 1"}[self.better]

    def of(self, line: Line) -> float | None:
        """Its value in an evaluation's line, None where the system cannot have it."""
        return next((value for name, value in line.items() if re.match(rf"eval/{self.key}\d", name)), None)


MEASURES = [
    Measure("fid", "FID", "lower", 2),
    Measure("is", "IS", "higher", 2),
    Measure("kid", "KID", "lower", 4),
    Measure("precision", "precision", "higher", 2),
    Measure("recall", "recall", "higher", 2),
    Measure("rfid", "rFID", "lower", 2),
    Measure("psnr", "PSNR", "higher", 1),
    Measure("ssim", "SSIM", "higher", 3),
    Measure("sharpness", "sharpness, samples", "one", 2),
    Measure("sharpness_reconstructed", "sharpness, reconstr.", "one", 2),
    Measure("prior_gap", "prior gap", "lower", 2),
    Measure("active_units", "active units", "higher", 1),
    Measure("z_recovered", "z recovered", "higher", 2),
    Measure("images_per_second", "images/s", "higher", 0),
]
TEXTS = {
    "fid": "Fréchet distance of the features of samples from the prior and of held-out images: are they alike?",
    "is": "inception score of the samples, by the extractor's classes: is each clearly of one, and are all made?",
    "kid": "the FID's question, by a kernel instead of a Gaussian, and without its bias for few images.",
    "precision": "share of the samples that are near some held-out image: are they likely?",
    "recall": "share of the held-out images that are near some sample: is nothing left out?",
    "rfid": "the FID of reconstructions of the held-out images.",
    "psnr": "of these reconstructions, in decibels: how near each pixel is.",
    "ssim": "of these reconstructions: how near their local structure is.",
    "sharpness": "variance of the Laplacian, as a ratio to real images': below 1 is blurrier. Noise counts as sharp.",
    "sharpness_reconstructed": "the same of reconstructions.",
    "prior_gap": "Fréchet distance of held-out images' codes and the prior N(0, I): 0 where both fill one space.",
    "active_units": "numbers of the code that differ between images; the rest tell nothing of them.",
    "z_recovered": "R² of reading a prior draw z back from its image G(z) by the encoder: 1 is exact, 0 a guess.",
    "images_per_second": "training speed, the median over log lines; runs that share a machine slow each other.",
}
BY_KEY = {measure.key: measure for measure in MEASURES}


def lines_of(folder: Path) -> list[Line]:
    """A run's metrics, less lines that are none."""
    path = folder / "metrics.jsonl"
    check_regular(path)
    texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line for text in texts if (line := line_of(text)) is not None]


def line_of(text: str) -> Line | None:
    """A line of metrics.jsonl; None for one that was cut short by a kill, or that no run writes."""
    try:
        line = json.loads(text)
        schemas.checked(line, schemas.MetricsLine, "a line")
        schemas.checked({name: value for name, value in line.items() if "/" in name}, dict[str, float], "a line")
        if "extractor" in line:
            schemas.checked(line, schemas.EvaluationLine, "a line")
    except (ValueError, RecursionError):
        return None
    return line


@dataclass(frozen=True)
class Scored:
    """A whole run."""

    seed: int
    folder: Path

    @cached_property
    def lines(self) -> list[Line]:
        return lines_of(self.folder)

    @property
    def evaluations(self) -> list[Line]:
        return [line for line in self.lines if "extractor" in line]

    @property
    def logs(self) -> list[Line]:
        return [line for line in self.lines if "speed/images_per_second" in line]

    @cached_property
    def scores(self) -> dict[str, float]:
        """The last evaluation's, by measure, and the speed."""
        found = {measure.key: measure.of(self.evaluations[-1]) for measure in MEASURES}
        found["images_per_second"] = statistics.median(line["speed/images_per_second"] for line in self.logs)
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class Entry:
    """A system of the comparison: its name, its class, its settings and its whole runs."""

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    runs: list[Scored] = field(default_factory=list)

    def values(self, key: str) -> list[float]:
        """A measure, by seed; empty where the system cannot have it."""
        return [run.scores[key] for run in self.runs if key in run.scores]

    def mean(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.mean(values) if values else None

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and means over the seeds of a measure's scores or of a log line's term."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for line in run.evaluations if key in BY_KEY else run.logs:
                value = BY_KEY[key].of(line) if key in BY_KEY else line.get(key)
                if value is not None:
                    found.setdefault(line["step"], []).append(value)
        steps = sorted(step for step, values in found.items() if len(values) == len(self.runs))
        return steps, [statistics.mean(found[step]) for step in steps]

    def confusion(self, which: Literal[0, -1]) -> tuple[int, list[list[float]]] | None:
        """What the ternary discriminator called each kind, at the first or the last log line: its step and shares."""
        kinds = ("real", "reconstructed", "generated")
        lines = [[line for line in run.logs if "ternary/named/real/real" in line] for run in self.runs]
        if not lines or not all(lines):
            return None
        return lines[0][which]["step"], [
            [statistics.mean(own[which][f"ternary/named/{kind}/{name}"] for own in lines) for name in kinds]
            for kind in kinds
        ]


def check_alike(entries: list[Entry]) -> None:
    """Refuse to lay scores side by side that were measured in different ways.

    Raises:
        ValueError: names two runs' folders.
    """
    ways: dict[tuple[str, ...], Path] = {}
    for run in (run for entry in entries for run in entry.runs):
        last = run.evaluations[-1]
        ways.setdefault((last["extractor_sha256"], last["held_out"]), run.folder)
    if len(ways) > 1:
        folders = " and ".join(str(folder) for folder in ways.values())
        raise ValueError(
            f"{folders} were scored with different extractor weights or held-out images, so their scores do not "
            "compare: remove the older ones, and run again"
        )


def best(entries: list[Entry], measure: Measure) -> set[str]:
    """The systems whose mean is the best, as shown: those that look equal are equal, and none is where all are."""
    means = {entry.name: mean for entry in entries if (mean := entry.mean(measure.key)) is not None}
    if len({number(mean, measure.digits) for mean in means.values()}) < 2:
        return set()
    loss = {"lower": lambda x: x, "higher": lambda x: -x, "one": lambda x: abs(x - 1)}[measure.better]
    top = number(means[min(means, key=lambda name: loss(means[name]))], measure.digits)
    return {name for name, mean in means.items() if number(mean, measure.digits) == top}


def number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


# ---- findings


class Part(NamedTuple):
    """One comparison: who with whom, the verdict, and the figures that it rests on."""

    about: str
    verdict: str
    figures: str


class Finding(NamedTuple):
    claim: str
    parts: list[Part]

    @property
    def verdict(self) -> str:
        verdicts = [part.verdict for part in self.parts]
        return verdicts[0] if len({*verdicts}) == 1 else f"holds in {verdicts.count(HOLDS)} of {len(verdicts)}"


def findings(entries: list[Entry]) -> list[Finding]:
    """What the scores say of the family's promises; one that needs a system which is not there is left out."""
    autoencoders, vaes, ganvaes = (_of(entries, kind) for kind in ("AE", "VAE", "GANVAE"))
    vaegans = _of(entries, "VAEGAN")
    binary, ternary = (_of(entries, "VAEGAN", discriminator=mode) for mode in ("binary", "ternary"))
    others = [entry for entry in entries if entry.kind != "GANVAE"]
    found = [
        Finding("A VAE's samples are blurrier than a VAE-GAN's", _lower("sharpness", vaes, vaegans)),
        Finding(
            "A VAE's reconstructions are blurrier than a VAE-GAN's", _lower("sharpness_reconstructed", vaes, vaegans)
        ),
        Finding(
            "Draws from the prior, decoded by a plain autoencoder, are no images: "
            f"its FID is more than {FAR:g} times a VAE's",
            _lower("fid", vaes, autoencoders, FAR),
        ),
        Finding("The ternary discriminator brings codes nearer to the prior", _lower("prior_gap", ternary, binary)),
        Finding("The ternary discriminator makes better samples", _lower("fid", ternary, binary)),
        Finding(
            f"A GAN-VAE reads z back from its images, more than {NEAR:g} of its variance",
            [_near(entry) for entry in ganvaes if entry.values("z_recovered")],
        ),
        Finding("A GAN-VAE reads z back better than the others", _lower("z_recovered", others, ganvaes)),
    ]
    return [finding for finding in found if finding.parts]


def below(low: list[float], high: list[float], times: float = 1.0) -> str:
    """Whether every `low`, taken some times, is less than every `high`."""
    if times * max(low) < min(high):
        return HOLDS
    return FAILS if times * min(low) >= max(high) else UNDECIDED


def spread(values: list[float], digits: int) -> str:
    """The mean, and the least and greatest of several."""
    if len(values) == 1:
        return number(values[0], digits)
    low, mean, high = (number(value, digits) for value in (min(values), statistics.mean(values), max(values)))
    return f"{mean} ({low} to {high})"


def _of(entries: list[Entry], kind: str, **settings: str) -> list[Entry]:
    return [
        entry
        for entry in entries
        if entry.kind == kind and all(entry.settings.get(key) == value for key, value in settings.items())
    ]


def _lower(key: str, lows: list[Entry], highs: list[Entry], times: float = 1.0) -> list[Part]:
    """For each pair in which both have the measure: whether the one's is lower than the other's."""
    measure = BY_KEY[key]
    parts = []
    for low in lows:
        for high in highs:
            a, b = low.values(key), high.values(key)
            if a and b:
                figures = f"{measure.head} {spread(a, measure.digits)} against {spread(b, measure.digits)}"
                if measure.better == "one" and min(a + b) > 1:
                    figures += " (all above 1: noise, not edges)"
                parts.append(Part(f"{low.name} and {high.name}", below(a, b, times), figures))
    return parts


def _near(entry: Entry) -> Part:
    values = entry.values("z_recovered")
    return Part(entry.name, below([NEAR], values), f"z recovered {spread(values, 2)}")
