"""Sums that do not depend on the order of their terms."""

import torch
from torch import Tensor

# To add and subtract such a number rounds to multiples of 2^-20, or of 2^-60, which is its last place.
HIGH, LOW = 1.5 * 2.0**32, 1.5 * 2.0**-8


class ExactSum:
    """A float64 sum that is the same to the bit in any order of its terms, and so on any number of ranks.

    A term is split into a multiple of 2^-20 and a rest rounded to multiples of 2^-60. Sums of either are not rounded
    while they stay below 2^31 (pre-rounding with fixed bins: Demmel & Nguyen 2013). An ordinary sum would not do: the
    square root in a Frechet distance of few images turns a difference in the last place into one in the eighth digit.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.parts = torch.zeros(2, *shape, dtype=torch.float64, device=device)

    def add(self, term: Tensor) -> None:
        """Add a float64 tensor of the sum's shape, or every row of a stack of them [n, *shape]."""
        terms = term if term.dim() == self.parts.dim() else term[None]
        high = (terms + HIGH) - HIGH
        self.parts[0] += high.sum(0)
        self.parts[1] += ((terms - high + LOW) - LOW).sum(0)
