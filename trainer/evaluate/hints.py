"""Hints at divergence or mode collapse, from the scores of several evaluations."""

from collections.abc import Sequence
from typing import Any

# A collapse is told where a score falls below half of its best, and a divergence where FID doubles.
FALLEN, DOUBLED = 0.5, 2.0


def hints(past: Sequence[dict[str, Any]], scores: dict[str, float], facts: dict[str, Any]) -> list[str]:
    """What a step's scores hint at, beside those before: a run that diverges, or that collapses to few images.

    Args:
        past: earlier evaluations, in order, with their steps and facts
        scores: of this one
        facts: of this one; what was measured in another way does not count
    """
    alike = [line for line in past if all(line.get(name) == value for name, value in facts.items())]
    told = []
    for name, value in scores.items():
        known = [(line[name], line["step"]) for line in alike if name in line]
        if not known:
            continue
        before = known[-1][0]
        if name.startswith("eval/fid"):
            best, step = min(known)
            if value > DOUBLED * best >= before:
                told.append(
                    f"{name} has more than doubled, from its best {best:.4g} at step {step} to {value:.4g}: the run "
                    "may be diverging. Its best checkpoint is kept; a lower lr, or to stop here, may be better"
                )
        elif name.startswith(("eval/recall", "eval/is")) and not name.startswith("eval/is_std"):
            best, step = max(known)
            # An inception score of 1 is of images that are all alike; how far it is above that is what may collapse.
            floor = 1.0 if name.startswith("eval/is") else 0.0
            limit = floor + FALLEN * (best - floor)
            if value < limit <= before and best - floor > 0.1:
                told.append(
                    f"{name} has fallen by more than half, from its best {best:.4g} at step {step} to {value:.4g}: the "
                    "samples may be collapsing to few kinds of images; look at them before going on"
                )
    return told
