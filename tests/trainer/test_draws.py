"""Draws depend on the seed, their name and their position alone."""

import torch

from trainer.draws import key, prior


def test_keys_are_pinned():
    """A change would silently change every draw of a run that is resumed."""
    assert key(1, 2, "prior") == 2_089_414_483_394_411_854
    keys = {key(*parts) for parts in [(1, 2), (2, 1), (12,), (1, "2"), ("1", 2), (1, 2, 0), (11, "a"), (1, "1a")]}
    assert len(keys) == 8
    most = max(key(i) for i in range(1000))
    assert 2**62 < most < 2**63


def test_prior_draws_are_their_indices_own():
    index = torch.tensor([4, 0, 4])
    z = prior(1, index, (2, 3))
    by_hand = torch.randn((2, 3), generator=torch.Generator().manual_seed(key(1, "evaluate", 0)))
    assert torch.equal(z[1], by_hand)
    assert torch.equal(z[0], z[2])
    assert not torch.equal(z[0], z[1])
    assert not torch.equal(prior(2, index, (2, 3))[1], z[1])
