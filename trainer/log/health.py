"""Whether a run looks healthy: six ways in which training of the VAE/GAN family goes wrong, told by what it logged.

Each is judged by a threshold on metrics.jsonl, which is a convention: the evidence says what was found.
"""

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from data.dataset import FEW
from trainer.log.metrics_file import Line, is_evaluation

# A discriminator whose loss L is a cross-entropy gives the right class the probability exp(-L) (geometric mean). A
# fifth of the chance level ln 2 (ternary: ln 3) makes that 0.87 (0.80): little gradient is left for its opponents
# (Goodfellow et al. 2014, section 3). 98 % of it makes that 0.51 (0.34), hardly above 1/2 (1/3).
STRONG, ASLEEP = 0.2, 0.98
# Share of the code's numbers that are active (Burda et al. 2016, section 5.2: the variance of the mean is above 0.01).
ACTIVE = 0.1
NATS = 1.0  # of KL per image, with which a code tells e images apart; judged if nothing was evaluated
# Share of the held-out images that lie near a sample (recall, Kynkaanniemi et al. 2019), while as many samples lie near
# a held-out image (precision): samples that are no images at all are another problem.
RECALL = 0.1
WORSE = 2.0  # how many times its best an FID, or its lowest a reconstruction loss, must be
WAITING = 0.1  # share of the time
DISCRIMINATOR = "/discriminator_loss"
LEAST = 3  # log lines, for a verdict on losses


class Verdict(NamedTuple):
    """Whether a run has a symptom: what that means, what was found in the log, and what to change."""

    symptom: str
    found: bool
    meaning: str
    evidence: str
    cure: str


def verdicts(lines: Sequence[Line], settings: dict[str, Any], status: str = "") -> list[Verdict]:
    """Return a verdict on each symptom that the run has logged enough to judge.

    Args:
        lines: of metrics.jsonl
        settings: the run's, as in config.yaml
        status: the run's; "diverged" is a symptom
    """
    logs, evaluations = [line for line in lines if not is_evaluation(line)], [*filter(is_evaluation, lines)]
    latest = logs[-(-len(logs) * 2 // 3) :] if len(logs) >= LEAST else []  # the last third
    return [
        *_collapse(latest, evaluations, settings),
        *_discriminators(latest),
        *(_mode_collapse(evaluations) if any(name.endswith(DISCRIMINATOR) for line in logs for name in line) else ()),
        *_starved(latest),
        *_diverging(logs, evaluations, status),
    ]


def few_images(number: int) -> str:
    """Return a warning about scores by a number of held-out images below FEW."""
    return (
        f"only {number} images are held out, and scores by fewer than {FEW} say little: judge by the pictures, or hold "
        "out more"
    )


def unjudged(judged: Sequence[Verdict]) -> str:
    """Return which symptom of a run with a discriminator could not be judged, and why; "" if all were."""
    symptoms = {one.symptom for one in judged}
    if "mode collapse" in symptoms or not any(symptom.startswith("discriminator") for symptom in symptoms):
        return ""
    return (
        f"Mode collapse is not judged: it is told by the precision and recall of two evaluations, on {FEW} or more "
        "held-out images."
    )


def _collapse(latest: list[Line], evaluations: list[Line], settings: dict[str, Any]) -> Iterator[Verdict]:
    kl = _mean(latest, _one(latest, r".*/kl"))
    if kl is None:
        return
    found, evidence = kl < NATS, f"KL is {kl:.3g} nats per image"
    active = _last(evaluations, r"eval/active_units\d.*")
    size = ((settings.get("system") or {}).get("init_args") or {}).get("latent_dim")
    if active is not None and isinstance(size, int) and size:
        found, evidence = active < ACTIVE * size, f"{active:g} of {size} latent dimensions are active; {evidence}"
    yield Verdict(
        "posterior collapse",
        found,
        "the decoder ignores the code",
        evidence,
        "lower --system.kl_weight, raise --system.kl_warmup, or set --system.free_bits",
    )


def _discriminators(latest: list[Line]) -> Iterator[Verdict]:
    for name in [name for name in (latest[-1] if latest else ()) if name.endswith(DISCRIMINATOR)]:
        player, prefix = name.partition("/")[0], name.removesuffix("discriminator_loss")
        loss, chance = _mean(latest, name), _mean(latest, f"{prefix}chance")
        if loss is None or not chance:
            continue
        of, share = prefix.rstrip("/").replace("/", " of domain "), loss / chance
        evidence = f"the {of} discriminator's loss is {share:.2f} of its chance level"
        yield Verdict(
            "discriminator too strong",
            share < STRONG,
            "its opponents get little gradient",
            evidence,
            f"lower --system.{player}.lr, raise --system.{player}.r1_weight, or set --system.{player}.augment",
        )
        yield Verdict(
            "discriminator asleep",
            share > ASLEEP,
            "it cannot tell images apart, so it teaches nothing",
            evidence,
            f"raise --system.{player}.lr, or lower --system.{player}.r1_weight",
        )


def _mode_collapse(evaluations: list[Line]) -> Iterator[Verdict]:
    recall, precision = (_last(evaluations, rf"eval/{name}\d.*") for name in ("recall", "precision"))
    few = any(line.get("held_out_images", FEW) < FEW for line in evaluations)
    if recall is None or precision is None or len(evaluations) < 2 or few:
        return
    best = max(value for line in evaluations if (value := _last([line], r"eval/recall\d.*")) is not None)
    fallen = recall < best / 2 and best > RECALL
    low = recall < RECALL <= precision
    evidence = f"recall is {recall:.2f} (its best was {best:.2f}), precision {precision:.2f}"
    yield Verdict(
        "mode collapse",
        fallen or low,
        "samples cover few kinds of images",
        evidence,
        "go back to an earlier checkpoint, lower the discriminator's lr, raise its "
        "r1_weight, or set its minibatch_stddev",
    )


def _starved(latest: list[Line]) -> Iterator[Verdict]:
    waits = [line["speed/data_wait"] for line in latest if "speed/data_wait" in line]
    if waits:
        wait = statistics.median(waits)
        yield Verdict(
            "starved by data",
            wait > WAITING,
            "the device idles until images are read",
            f"steps wait for data {wait:.0%} of the time",
            "raise --data.workers, or prepare smaller images (python -m data.prepare --size)",
        )


def _diverging(logs: list[Line], evaluations: list[Line], status: str) -> Iterator[Verdict]:
    evidence, found = [], status == "diverged"
    if found:
        evidence.append("the run stopped at a value that is not finite")
    fids = {tag: [line[tag] for line in evaluations if tag in line] for tag in (evaluations[-1] if evaluations else ())}
    judged_by = evaluations[-1].get("judged_by", "fid") if evaluations else ""
    for tag, values in fids.items():
        if tag.startswith(f"eval/{judged_by}") and len(values) > 1:
            found |= not values[-1] <= WORSE * min(values)
            evidence.append(f"{tag} is {values[-1]:.4g}, its best {min(values):.4g}")
    third = len(logs) // 3
    parts = [_mean(part, _one(part, ".*/reconstruction")) for part in (logs[:third], logs[third:-third], logs[-third:])]
    known = [value for value in parts if value is not None] if third else []
    if len(known) == 3 and min(known) > 0:
        found |= not known[-1] <= WORSE * min(known)
        evidence.append(f"the reconstruction loss is {known[-1]:.4g}, its lowest {min(known):.4g} (means of thirds)")
    if evidence:
        cure = "go back to the best checkpoint, and lower the lr of the players (--system.PLAYER.lr), or set their clip"
        yield Verdict("diverging", bool(found), "the run gets worse", "; ".join(evidence), cure)


def _one(lines: list[Line], pattern: str) -> str:
    """Return the first name in the last line that matches, or "" if there is none."""
    return next((name for name in (lines[-1] if lines else ()) if re.fullmatch(pattern, name)), "")


def _mean(lines: list[Line], name: str) -> float | None:
    values = [line[name] for line in lines if name in line]
    return statistics.mean(values) if values else None


def _last(evaluations: list[Line], pattern: str) -> float | None:
    value = evaluations[-1].get(_one(evaluations, pattern)) if evaluations else None
    return None if value is None or math.isnan(value) else value
