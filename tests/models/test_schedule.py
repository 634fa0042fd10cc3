"""Settings that vary, by hand."""

import math

import pytest

from models import DiscriminatorConfig
from models.schedule import Schedule, at, largest


def test_a_schedule_goes_along_half_a_cosine_and_stays_at_its_end():
    gamma = Schedule(0.05, 0.005, 40)
    quarter = 0.005 + 0.045 * (2 + math.sqrt(2)) / 4  # (1 + cos(pi / 4)) / 2
    expected = {0: 0.05, 10: quarter, 20: 0.0275, 40: 0.005, 999: 0.005}
    assert {step: gamma.at(step) for step in expected} == pytest.approx(expected, rel=1e-12)
    assert (gamma.at(40), at(0.3, 7), at(gamma, 20)) == (0.005, 0.3, gamma.at(20))
    assert (largest(gamma), largest(Schedule(0, 2, 1)), largest(0.1)) == (0.05, 2, 0.1)


def test_an_optimizers_rates_and_logged_settings_vary():
    config = DiscriminatorConfig(
        Schedule(2e-4, 5e-5, 10), (0.0, Schedule(0.9, 0.99, 10)), warmup=4, r1_weight=Schedule(0.05, 0.005, 10)
    )
    assert config.rate(1, 100) == pytest.approx(2 / 4 * config.lr.at(1))
    assert config.rate(99, 100) == 5e-5
    falling = DiscriminatorConfig(Schedule(2e-4, 5e-5, 100), schedule="linear", hold=0.5, final=0.1)
    assert falling.rate(25, 100) == falling.lr.at(25)
    quarter = 5e-5 + 15e-5 * (2 - math.sqrt(2)) / 4  # (1 + cos(3 pi / 4)) / 2
    assert falling.rate(75, 100) == pytest.approx(quarter * 0.55)  # half of the way from 1 to `final`
    assert config.betas_at(99) == (0.0, 0.99)
    assert config.varying(5) == pytest.approx({"beta2": 0.945, "r1_weight": 0.0275})
    assert DiscriminatorConfig(0.1, r1_weight=Schedule(0.0, 1.0, 9)).penalized
