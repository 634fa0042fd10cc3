"""Averages of any length, made after training of those of two lengths (Karras et al. 2024, section 3 and algorithm 3).

The average by a power function weighs the weights after step s of t by s^gamma. Its length is the standard deviation of
this profile over t, such as 0.1. A run with `trainer.ema_lengths` keeps such averages in its checkpoints. Those of all
checkpoints together are combined such that their profiles add up to the wanted one, in least squares.
"""

import numpy as np

POWER = "power"  # files such as power0.05.encoder.safetensors
MISFIT = 0.15  # of a combined profile, at most
SHORTEST = 1e-4  # whose text, which names files, has no exponent
LONGEST = 0.28  # below 1 / sqrt(12), where gamma is 0 and all steps weigh the same


def exponent(length: float) -> float:
    """Return gamma of a profile of this length: length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), eq. 123."""
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


def check_length(name: str, length: float) -> None:
    """Raise a ValueError that names a setting whose length no profile has."""
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(f"{name} is {length:g}, expected a number from {SHORTEST:g} to {LONGEST}")


def product(step: float, gamma: float, other_step: float, other_gamma: float) -> float:
    """Return the integral of the product of two profiles (gamma + 1) s^gamma / step^(gamma + 1), s in [0, step]."""
    (last, late), (first, early) = sorted([(step, gamma), (other_step, other_gamma)], reverse=True)
    return (late + 1) * (early + 1) / (late + early + 1) * (first / last) ** late / last


def coefficients(snapshots: list[tuple[int, float]], step: int, length: float) -> list[float]:
    """Return by how much snapshots, (step, length) each, are multiplied in the sum that is the average of a length."""
    profiles = [(float(at), exponent(of)) for at, of in snapshots]
    gram = np.array([[product(*one, *other) for other in profiles] for one in profiles])
    found = np.linalg.lstsq(gram, np.array([product(*one, step, exponent(length)) for one in profiles]), rcond=None)[0]
    return [float(value) for value in found / found.sum()]


def misfit(snapshots: list[tuple[int, float]], weights: list[float], step: int, length: float) -> float:
    """Return the distance of a weighted sum of profiles to that of a length, as a share of that profile's norm.

    Norms are L2: the distance is the square root of the integral of the squared difference over all steps.
    """
    terms = [*zip([-1.0, *weights], [(step, length), *snapshots], strict=True)]
    pairs = [(a * b, (s, exponent(x)), (t, exponent(y))) for a, (s, x) in terms for b, (t, y) in terms]
    squared = sum(weight * product(*one, *other) for weight, one, other in pairs)
    return float(np.sqrt(max(0.0, squared) / product(step, exponent(length), step, exponent(length))))
