"""Draws depend on the seed, their name and their position alone."""

import pytest
import torch

from trainer.batch import Batch
from trainer.draws import BLOCK, draw, key, prior

CPU = torch.device("cpu")


def test_keys_are_pinned():
    """A change would silently change every draw of a run that is resumed."""
    assert key(1, 2, "prior") == 2_089_414_483_394_411_854
    keys = {key(*parts) for parts in [(1, 2), (2, 1), (12,), (1, "2"), ("1", 2), (1, 2, 0), (11, "a"), (1, "1a")]}
    assert len(keys) == 8
    most = max(key(i) for i in range(1000))
    assert 2**62 < most < 2**63


def test_a_block_of_positions_is_drawn_by_its_own_key():
    assert BLOCK == 64, "another size would silently change every draw of a run that is resumed"
    drawn = draw(torch.randn, 1, 2, "prior", slice(60, 130), (3,), CPU)
    blocks = [torch.randn(64, 3, generator=torch.Generator().manual_seed(key(1, 2, "prior", i))) for i in range(3)]
    assert torch.equal(drawn, torch.cat(blocks)[60:130])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_draw_depends_on_seed_step_name_and_position_alone(world):
    """Any number of processes and every micro-batch draw the rows of one process's whole batch, to the bit."""
    size, shape = 240, (2, 3)
    whole = {
        name: draw(of, 7, 5, name, slice(0, size), shape, CPU) for name, of in (("n", torch.randn), ("u", torch.rand))
    }
    assert whole["n"].unique().numel() == whole["n"].numel(), "each position has its own"
    rank_rows = size // world
    for micro in [n for n in range(1, rank_rows + 1) if rank_rows % n == 0]:
        for rank in range(world):
            rows = slice(rank * rank_rows, (rank + 1) * rank_rows)
            parts = Batch((torch.zeros(rank_rows, 1),), rows, size, 7, 5).split(micro)
            assert torch.equal(torch.cat([part.normal("n", shape) for part in parts]), whole["n"][rows])
            assert torch.equal(torch.cat([part.uniform("u", shape) for part in parts]), whole["u"][rows])
    for other in ((8, 5, "n"), (7, 6, "n"), (7, 5, "m")):
        assert not torch.isin(draw(torch.randn, *other, slice(0, size), shape, CPU), whole["n"]).any()


@pytest.mark.parametrize(("rank_rows", "rank", "blocks"), [(64, 1000, 1), (48, 1022, 2), (200, 513, 4), (1, 1023, 1)])
def test_a_rank_of_1024_draws_its_own_blocks_only(rank_rows, rank, blocks):
    """At most two of them are partly other ranks'."""
    drawn = []

    def counting(shape: tuple[int, ...], **options: object) -> torch.Tensor:
        drawn.append(shape)
        return torch.randn(shape, **options)

    rows = slice(rank * rank_rows, (rank + 1) * rank_rows)
    assert draw(counting, 0, 0, "prior", rows, (4, 2, 2), CPU).shape == (rank_rows, 4, 2, 2)
    assert drawn == [(BLOCK, 4, 2, 2)] * blocks
    assert blocks * BLOCK < rank_rows + 2 * BLOCK


def test_prior_draws_are_their_indices_own():
    index = torch.tensor([4, 0, 4])
    z = prior(1, index, (2, 3))
    by_hand = torch.randn((2, 3), generator=torch.Generator().manual_seed(key(1, "evaluate", 0)))
    assert torch.equal(z[1], by_hand)
    assert torch.equal(z[0], z[2])
    assert not torch.equal(z[0], z[1])
    assert not torch.equal(prior(2, index, (2, 3))[1], z[1])
