"""Each symptom is found in a log that has it, and in no other; each sits at its stated threshold."""

import math

import pytest

from trainer.log.health import unjudged, verdicts

SETTINGS = {"system": {"init_args": {"latent_dim": 16}}}
HEALTHY = {
    "autoencoder/kl": 18.0,
    "autoencoder/reconstruction": 30.0,
    "ternary/discriminator_loss": 0.9,
    "ternary/chance": math.log(3),
    "speed/data_wait": 0.03,
}
SCORES = {
    "eval/fid2k/demo-cnn-v1": 3.0,
    "eval/rfid359/demo-cnn-v1": 2.0,
    "eval/precision2k/demo-cnn-v1": 0.5,
    "eval/recall2k/demo-cnn-v1": 0.8,
    "eval/active_units359": 16.0,
}


def symptoms(late: dict | None = None, last: dict | None = None, status: str = "", scored: bool = True) -> set[str]:
    """The symptoms of 12 log lines and 2 evaluations, given what differs late in the log and in the last evaluation."""
    lines = [{"step": step, **HEALTHY, **((late or {}) if step > 6 else {})} for step in range(1, 13)]
    facts = {"extractor": "demo-cnn-v1"}
    if scored:
        lines[6:6] = [{"step": 6, **SCORES, **facts}]
        lines += [{"step": 12, **SCORES, **facts, **(last or {})}]
    return {verdict.symptom for verdict in verdicts(lines, SETTINGS, status) if verdict.found}


def test_a_healthy_run_has_no_symptom():
    assert symptoms() == set()
    assert verdicts([], {}) == []
    judged = verdicts([{"step": step, **HEALTHY} for step in range(3)], {})
    assert [verdict.symptom for verdict in judged] == [
        *("posterior collapse", "discriminator too strong", "discriminator asleep", "starved by data", "diverging")
    ]
    assert unjudged(judged).startswith("Mode collapse is not judged: it is told by the precision and")
    assert not unjudged([*judged, judged[0]._replace(symptom="mode collapse")])
    assert not unjudged(judged[:1])  # nothing tells of a discriminator


RECALL, PRECISION = "eval/recall2k/demo-cnn-v1", "eval/precision2k/demo-cnn-v1"


@pytest.mark.parametrize(
    ("symptom", "has", "has_not"),
    [
        ("posterior collapse", {"last": {"eval/active_units359": 1.0}}, {"last": {"eval/active_units359": 2.0}}),
        (
            "posterior collapse",
            {"late": {"autoencoder/kl": 0.9}, "scored": False},
            {"late": {"autoencoder/kl": 1.1}, "scored": False},
        ),
        (
            "discriminator too strong",
            {"late": {"ternary/discriminator_loss": 0.19 * math.log(3)}},
            {"late": {"ternary/discriminator_loss": 0.21 * math.log(3)}},
        ),
        (
            "discriminator asleep",
            {"late": {"ternary/discriminator_loss": 0.99 * math.log(3)}},
            {"late": {"ternary/discriminator_loss": 0.97 * math.log(3)}},
        ),
        ("mode collapse", {"last": {RECALL: 0.39}}, {"last": {RECALL: 0.41}}),
        ("mode collapse", {"last": {RECALL: 0.09}}, {"last": {RECALL: 0.41, PRECISION: 0.0}}),
        ("starved by data", {"late": {"speed/data_wait": 0.11}}, {"late": {"speed/data_wait": 0.09}}),
        (
            "diverging",
            {"last": {"eval/fid2k/demo-cnn-v1": 6.1}},
            {"last": {"eval/fid2k/demo-cnn-v1": 5.9, "eval/rfid359/demo-cnn-v1": 99.0}},
        ),
        (
            "diverging",
            {"last": {"judged_by": "rfid", "eval/rfid359/demo-cnn-v1": 99.0}},
            {"last": {"judged_by": "rfid", "eval/fid2k/demo-cnn-v1": 99.0}},
        ),
        ("diverging", {"last": {"eval/fid2k/demo-cnn-v1": math.nan}}, {}),
        ("diverging", {"late": {"autoencoder/reconstruction": 61.0}}, {"late": {"autoencoder/reconstruction": 59.0}}),
        ("diverging", {"late": {"autoencoder/reconstruction": math.nan}}, {}),
        ("diverging", {"status": "diverged"}, {"status": "failed"}),
    ],
)
def test_each_symptom_is_told_at_its_threshold(symptom, has, has_not):
    assert symptoms(**has) == {symptom}
    assert symptoms(**has_not) == set()


@pytest.mark.parametrize(("precision", "found"), [(0.5, True), (0.05, False)])
def test_samples_near_few_images_are_a_collapse_and_samples_near_none_are_not(precision, found):
    scores = {"step": 1, "extractor": "demo-cnn-v1", RECALL: 0.05, PRECISION: precision}
    lines = [{"step": 1, **HEALTHY}, scores, scores | {"step": 2}]
    judged = {one.symptom: one.found for one in verdicts(lines, {})}
    assert judged["mode collapse"] == found
    for too_few in (lines[:2], [*lines[:2], lines[2] | {"held_out_images": 99}]):
        assert "mode collapse" not in {one.symptom for one in verdicts(too_few, {})}, "one evaluation, or 99 images"
    judged = {one.symptom: one.found for one in verdicts([*lines[:2], lines[2] | {"held_out_images": 100}], {})}
    assert judged["mode collapse"] == found
