"""Averages by power functions follow their closed form, and others are made of them after training."""

import json

import numpy as np
import pytest
import torch
from generating import run_command
from safetensors.torch import load_file
from systems_under_test import SYSTEMS

from trainer.ema import EMA
from trainer.export.command import main as export
from trainer.posthoc import coefficients, exponent, misfit, product


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.28])
def test_a_length_is_the_standard_deviation_of_its_profile(length):
    """Of (gamma + 1) s^gamma in [0, 1], which is Beta(gamma + 1, 1)."""
    a = exponent(length) + 1
    assert np.sqrt(a / (a + 1) ** 2 / (a + 2)) == pytest.approx(length, rel=1e-9)


def test_a_product_of_profiles_is_its_integral():
    s, by_hand = np.linspace(0, 3, 300_001), []
    for step, gamma in ((3.0, 2.5), (2.0, 4.0)):
        by_hand.append(np.where(s <= step, (gamma + 1) * s**gamma / step ** (gamma + 1), 0))
    # The trapezoid rule errs by the jump of the second profile at its end, in one of its intervals.
    expected = np.trapezoid(by_hand[0] * by_hand[1], s)
    for arguments in ((3.0, 2.5, 2.0, 4.0), (2.0, 4.0, 3.0, 2.5)):
        assert product(*arguments) == pytest.approx(expected, abs=1e-5 * max(by_hand[0]) * max(by_hand[1]))


def test_averages_by_power_functions_are_their_closed_form():
    """Of weights that are s after step s: kept by (1 - 1 / s)^(gamma + 1), eq. 127, the average is their recurrence."""
    system = SYSTEMS["ae"]()
    ema, expected = EMA(system, 100, 1, lengths=[0.05, 0.1]), dict.fromkeys((0.05, 0.1), 0.0)
    for step in range(1, 30):
        torch.nn.init.constant_(system.decoder.stem.bias, step)
        ema.update(step)
        for length in expected:
            kept = (1 - 1 / step) ** (exponent(length) + 1)
            expected[length] = kept * expected[length] + (1 - kept) * step
    for length, value in expected.items():
        found = ema.networks()[f"power{length:g}.decoder"].stem.bias
        assert found.mean().item() == pytest.approx(value, rel=29 * 2**-23)  # each step rounds once
    # As the steps grow many, it is (gamma + 1) / (gamma + 2) of the last; the sum differs from the integral by a step.
    gamma = exponent(0.1)
    assert expected[0.1] == pytest.approx((gamma + 1) / (gamma + 2) * 29, abs=1)


def test_an_average_is_combined_from_snapshots_of_others():
    steps, lengths, target = range(50, 801, 50), (0.05, 0.1), 0.07
    snapshots = [(step, length) for step in steps for length in lengths]
    assert np.isclose(sum(coefficients(snapshots, 800, target)), 1)
    # A length that was kept is its own snapshot.
    own = coefficients(snapshots, 800, 0.1)
    assert own == pytest.approx([float(one == (800, 0.1)) for one in snapshots], abs=1e-6)

    near = misfit(snapshots, [float(one == (800, 0.05)) for one in snapshots], 800, target)
    assert misfit(snapshots, coefficients(snapshots, 800, target), 800, target) < 0.1 * near


def test_a_misfit_is_the_distance_of_profiles():
    """By the trapezoid rule."""
    snapshots, weights, (step, length) = [(2, 0.2), (3, 0.1)], [0.5, 0.7], (3, 0.15)
    s = np.linspace(0, 3, 300_001)

    def profile(at: float, of: float) -> np.ndarray:
        gamma = exponent(of)
        return np.where(s <= at, (gamma + 1) * s**gamma / at ** (gamma + 1), 0)

    wanted = profile(step, length)
    difference = sum(weight * profile(*one) for weight, one in zip(weights, snapshots, strict=True)) - wanted
    expected = np.sqrt(np.trapezoid(difference**2, s) / np.trapezoid(wanted**2, s))
    # The rule errs by the jump at the first snapshot's end, in one interval: squared, 1e-5 of values up to about 4.
    assert misfit(snapshots, weights, step, length) == pytest.approx(expected, abs=1e-4)
    assert misfit([(3, 0.15)], [1.0], step, length) == pytest.approx(0, abs=1e-6)


def test_an_export_has_the_average_of_the_length_that_is_named(here, tiny_run, tmp_path, capsys):
    run = ["--system", "AE", "--trainer.steps", "4", "--trainer.save_every", "2", "--trainer.run_dir", tmp_path / "run"]
    done = here(*run, "--trainer.ema_lengths", "[0.05, 0.1]", "--trainer.keep_every", "2")
    assert done.returncode == 0, done.stderr
    made = {}
    for length in (0.1, 0.07):
        out = tmp_path / f"{length}"
        run_command(export, capsys, tmp_path / "run", out, "--num", 0, "--ema_length", length)
        made[length] = load_file(out / "decoder.safetensors")
        assert not (out / "scores.json").exists()
        assert json.loads((out / "manifest.json").read_text())["ema_length"] == length
        assert f"(post-hoc EMA of length {length})" in (out / "README.md").read_text()
    run_command(export, capsys, tmp_path / "0.07", tmp_path / "again", "--num", 0)
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["ema_length"] == 0.07
    kept = {
        of: load_file(next((tmp_path / "run" / "checkpoints").glob("*4")) / f"{of}.decoder.safetensors")
        for of in ("power0.1", "power0.05", "ema")
    }
    name = "last.weight"
    torch.testing.assert_close(made[0.1], kept["power0.1"])
    for other in (kept["power0.1"], kept["power0.05"], kept["ema"]):
        assert not torch.allclose(made[0.07][name], other[name], rtol=1e-5, atol=1e-7)
    for length, words in (
        (0.3, "--ema_length is 0.3, expected a number from 0.0001 to 0.28"),
        (0.1, "kept no aver"),
        (0.25, "cannot be made of averages of the lengths 0.05, 0.1 in 4 files: their combination would be off by"),
    ):
        source = tmp_path / "run" if length == 0.25 else tiny_run("AE")
        done = run_command(export, capsys, source, tmp_path / "no", "--num", 0, "--ema_length", length)
        assert done.returncode == 2
        assert words in done.err


@pytest.mark.parametrize("lengths", ["[0.05]", "[0.1, 0.1]", "[0.1, 0.10000001]", "[0.3]", "[0.00005, 0.1]", "[0]"])
def test_lengths_that_cannot_be_kept_are_refused_by_name(here, tmp_path, lengths):
    keep = ["--trainer.keep_every", "2"] * (lengths != "[0.05]")
    done = here("--system", "AE", "--trainer.run_dir", tmp_path / "run", "--trainer.ema_lengths", lengths, *keep)
    assert done.returncode == 2
    assert "trainer.ema_lengths is" in done.stderr
    assert keep or "trainer.keep_every is null, expected" in done.stderr
