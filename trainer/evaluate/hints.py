"""Hints at divergence or mode collapse in the scores of several evaluations."""

from collections.abc import Sequence
from typing import Any


def hints(past: Sequence[dict[str, Any]], scores: dict[str, float], facts: dict[str, Any]) -> list[str]:
    """Return messages about scores that became much worse than the best before.

    A FID that doubles, of what the run is judged by, hints at divergence; a recall or inception score that falls by
    half hints at mode collapse.

    Args:
        past: earlier evaluations in order, with their steps and facts
        scores: scores of this evaluation
        facts: facts of this evaluation; past ones with other facts are not comparable and are ignored
    """
    comparable = [line for line in past if all(line.get(name) == value for name, value in facts.items())]
    messages, judged_by = [], f"eval/{facts.get('judged_by', 'fid')}"
    for name, value in scores.items():
        known = [(line[name], line["step"]) for line in comparable if name in line]
        if not known:
            continue
        previous = known[-1][0]
        if name.startswith(judged_by):
            best, step = min(known)
            worse, change = value > 2 * best >= previous, "more than doubled"
            advice = "the run may be diverging. Its best checkpoint is kept; lower the lr, or stop here"
        elif name.startswith(("eval/recall", "eval/is")) and not name.startswith("eval/is_std"):
            best, step = max(known)
            lowest = 1.0 if name.startswith("eval/is") else 0.0  # the inception score of images that are all alike
            worse, change = value < (lowest + best) / 2 <= previous and best - lowest > 0.1, "fallen by more than half"
            advice = "the samples may be collapsing to few kinds of images. Look at them before you train on"
        else:
            continue
        if worse:
            messages.append(f"{name} has {change}, from its best {best:.4g} at step {step} to {value:.4g}: {advice}")
    return messages
