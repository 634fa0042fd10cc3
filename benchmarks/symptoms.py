"""Make symptoms of docs/troubleshooting.md: short runs on scikit-learn's digits, each with settings that are wrong.

Prints what trainer.log.health says about each run, and draws the curve that tells it beside that of a healthy run.
`python -m benchmarks.symptoms OUT.png` takes 4 minutes on one CPU core; runs that have ended are not repeated.
"""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from data.prepare import prepare
from trainer.log.health import Verdict, verdicts
from trainer.report.results import Run

SETTINGS = (
    "--config launch/recipes/digits-vaegan-ternary.yaml --system.networks.width 8 --data.workers 0 "
    "--trainer.steps 240 --trainer.batch_size 32 --trainer.log_every 10 "
    "--evaluate.every 40 --evaluate.num 300 --evaluate.metrics [fid,prdc] --evaluate.extractor demo-random"
)
TERNARY = "ternary/discriminator_loss"
CHANCE = math.log(3)  # the loss of a ternary discriminator that guesses
HEALTHY, ENDED = "healthy", ("finished", "diverged")


class Case(NamedTuple):
    """A run that has a symptom: the curve that tells it, its axis, and the settings that are wrong."""

    symptom: str
    curve: str
    axis: str
    wrong: str


STRONG = "--system.ternary.r1_weight 0 --system.ternary.lr 0.01 --system.autoencoder.lr 0.0001"
ALONE = "--system.reconstruction_weight 0 --system.kl_weight 0 --system.ternary.r1_weight 0"  # a GAN without R1
MOMENTUM = "--system.autoencoder.betas [0.9,0.99] --system.ternary.betas [0.9,0.99]"
CASES = [
    Case("posterior collapse", "autoencoder/kl", "KL, nats per image", "--system.kl_weight 300"),
    Case("discriminator too strong", TERNARY, "discriminator's loss", STRONG),
    Case("discriminator asleep", TERNARY, "discriminator's loss", "--system.ternary.r1_weight 300"),
    Case(
        "starved by data",
        "speed/data_wait",
        "share of time waiting",
        "--data.train {large}/train --data.test {large}/test",
    ),
    Case("mode collapse", "eval/recall300/demo-random-v1", "recall", f"{ALONE} --system.ternary.lr 0.01"),
    Case("diverging", "eval/fid300/demo-random-v1", "FID", f"{ALONE} --system.autoencoder.lr 0.01 {MOMENTUM}"),
]


def train(folder: Path, changes: str) -> None:
    """Train a run unless it has ended."""
    if Run(folder).status in ENDED:
        return
    command = [sys.executable, "trainer/main.py", *SETTINGS.split(), "--trainer.run_dir", str(folder), *changes.split()]
    done = subprocess.run(command, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    if Run(folder).status not in ENDED:
        raise SystemExit(done.stderr)


def judged(folder: Path) -> list[Verdict]:
    """Return the symptoms that a run has."""
    run = Run(folder)
    return [one for one in verdicts(run.lines, run.settings, run.status) if one.found]


def draw(runs: Path, out: Path) -> None:
    """Draw the curve of each symptom, and of the healthy run, into one picture."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(12, 5.6), layout="constrained")
    for case, panel in zip(CASES, panels.flat, strict=True):
        for name, colour in ((case.symptom, "#d62728"), (HEALTHY, "#7f7f7f")):
            points = [(line["step"], line[case.curve]) for line in Run(runs / name).lines if case.curve in line]
            panel.plot(*zip(*points, strict=True), color=colour, label=name)
        if case.curve == TERNARY:
            panel.axhline(CHANCE, color="#1f77b4", linestyle="--")
            panel.margins(y=0.15)  # room for its name
            panel.text(250, CHANCE + 0.02, "chance, ln 3", ha="right", color="#1f77b4")
        panel.set(title=case.symptom, ylabel=case.axis, xlabel="step")
        if case.symptom in ("posterior collapse", "diverging"):
            panel.set_yscale("log")
    panels[0, 0].legend(["with the symptom", HEALTHY])
    figure.savefig(out, dpi=80)


def main() -> None:
    """Run the command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path, help="the picture to draw")
    options.add_argument("--runs", type=Path, default=Path("runs/symptoms"), help="folder of the runs (runs/symptoms)")
    given = options.parse_args()
    large = given.runs.absolute() / "large-digits"
    if not large.exists():
        prepare("digits", large, size=256)
    train(given.runs / HEALTHY, "")
    for case in CASES:
        train(given.runs / case.symptom, case.wrong.format(large=large))
        for verdict in judged(given.runs / case.symptom):
            print(f"{case.symptom}: {verdict.symptom}: {verdict.evidence}", flush=True)
    print(f"{HEALTHY}: {[verdict.symptom for verdict in judged(given.runs / HEALTHY)]}")
    draw(given.runs, given.out)


if __name__ == "__main__":
    main()
