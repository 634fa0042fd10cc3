"""The order of samples is arithmetic: pinned, complete, well mixed, and the same from any side."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.order import Order, permutation, random_bits, random_positions, sample_checksum

CASES = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(1, 40), min_size=1, max_size=12),
        "batch": st.integers(1, 24),
        "lanes": st.integers(1, 16),
        "window": st.integers(1, 500),
        "seed": st.integers(0, 2**62),
        "epoch": st.integers(0, 10**6),
    }
)


def test_permutation_is_pinned():
    """A change would silently reorder the data of every run that is resumed."""
    assert permutation(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]


def test_random_bits_from_any_place_on_are_those_of_the_whole():
    whole = random_bits(40, 1, 2)
    assert all((random_bits(5, 1, 2, start=start) == whole[start : start + 5]).all() for start in range(35))


def test_some_positions_are_distinct_and_random():
    assert random_positions(50, 8, 1).tolist() == permutation(50, 1)[:8].tolist()
    assert sorted(random_positions(5, 8, 1).tolist()) == list(range(5))
    chosen = random_positions(10**9, 1000, 1)
    assert len({*chosen.tolist()}) == 1000
    assert (chosen.min() < 10**7, chosen.max() > 99 * 10**7, 4e8 < chosen.mean() < 6e8) == (True, True, True)


def test_the_order_is_pinned():
    whole, lanes = Order([30, 20], 8, 1), Order([30] * 40, 8, 1, lanes=4, window=100)
    assert whole[10**9].tolist() == [10, 21, 20, 43, 27, 0, 28, 24]
    assert lanes[10**9].tolist() == [835, 834, 471, 472, 148, 141, 1081, 1082]


@given(CASES)
@settings(deadline=None, max_examples=300)
def test_any_order_deals_every_sample_once_an_epoch_to_any_ranks(case):
    counts, batch, epoch = case["counts"], min(case["batch"], sum(case["counts"])), case["epoch"]
    order = Order(counts, batch, case["seed"], case["lanes"], case["window"])
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = {step: order[step] for step in steps}
    seen = np.concatenate([*batches.values()])
    assert len(set(seen.tolist())) == len(seen) == sum(counts) // batch * batch
    assert seen.min() >= 0
    assert seen.max() < sum(counts)
    again = pickle.loads(pickle.dumps(order))
    for step in list(steps)[::-3]:  # in another order, by another process
        for world in (world for world in range(1, batch + 1) if batch % world == 0):
            share = batch // world
            parts = [again.rows(step, slice(rank * share, (rank + 1) * share)) for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), batches[step])
            rows = [slice(rank * share, (rank + 1) * share) for rank in range(world)]
            sums = sum(sample_checksum(step, 0, row, part) for row, part in zip(rows, parts, strict=True))
            assert sums % 2**32 == sample_checksum(step, 0, slice(0, batch), batches[step])


def test_the_sample_checksum_tells_other_samples_places_steps_and_sets():
    rows, positions = slice(0, 4), [5, 6, 7, 8]
    given = [(3, 0, positions), (3, 0, [6, 5, 7, 8]), (3, 0, [5, 6, 7, 9]), (4, 0, positions), (3, 1, positions)]
    assert len({sample_checksum(step, which, rows, np.array(seen)) for step, which, seen in given}) == 5
    assert sample_checksum(3, 0, rows, np.array(positions)) == sample_checksum(3, 0, rows, np.array(positions))


@pytest.mark.parametrize(("counts", "window"), [([50], 100), ([50], 25), ([25, 25], 25)])
def test_the_remainder_rotates(counts, window):
    """Each epoch leaves out n % batch samples, and in the long run all of them equally often."""
    order, left_out = Order(counts, 8, 1, 4, window), np.zeros(50)
    for epoch in range(500):
        seen = np.concatenate([order[epoch * 6 + step] for step in range(6)])
        left_out += 1 - np.bincount(seen, minlength=50)
    assert left_out.sum() == 500 * 2
    assert left_out.max() < 45, "20 are expected, with a deviation of 4.4"
    assert left_out.min() > 4


@pytest.mark.parametrize("batch", [254, 256, 1000, 4096])
def test_class_sorted_shards_mix(batch):
    """10,000 shards of 1,000 samples, 100 classes one after another: batches are nearly those of a whole shuffle."""
    order = Order([1000] * 10_000, batch, 0)
    found = np.stack(
        [np.bincount(order[step] // 100_000, minlength=100) for step in range(0, order.steps_per_epoch, 97)]
    )
    assert (
        found.var(0).mean() < 1.35 * batch * 0.01 * 0.99
    )  # of draws with replacement, which a whole shuffle is nearly


def test_epochs_lanes_and_blocks_have_shuffles_of_their_own():
    order = Order([10] * 100, 8, 0, lanes=4, window=100)
    lanes = order._block(0, 0, 0, 4)
    assert len({tuple(lane) for lane in lanes.tolist()}) == 4
    firsts = [order._block(epoch, block, 0, 1)[0, :20].tolist() for epoch in range(3) for block in range(3)]
    assert len({tuple(first) for first in firsts}) == 9
    lines = [order._line(epoch) for epoch in range(5)]
    assert len({tuple(line.shifts.tolist()) for line in lines}) == 5
    assert len({line.offset for line in lines}) == 5


def test_a_rank_reads_from_few_shards():
    order = Order([1000] * 1000, 256, 0)
    of_rank = {p // 1000 for step in range(200) for p in order.rows(step, slice(0, 32)).tolist()}
    assert len(of_rank) <= 8 * (8 + 2), "eight lanes of a block over eight shards"


def test_a_small_set_in_sorted_shards_is_shuffled_whole():
    order = Order([100] * 10, 100, 0)
    classes = np.stack([np.bincount(order[step] // 100, minlength=10) for step in range(100)])
    assert classes.var(0).mean() < 1.3 * 100 * 0.1 * 0.9


def test_any_step_of_a_billion_samples_costs_the_same():
    """Nothing is as long as the data: memory would tell before time does."""
    order = Order(np.full(100_000, 10_000), 1024, 0)
    began = time.process_time()
    assert order[10_000_000].max() < 10**9
    assert time.process_time() - began < 5, "benchmarks/data.py measures it: 0.04 s"
    assert sum(len(pickle.dumps(kept)) for kept in order._kept.values()) < 20e6


def test_the_fingerprint_tells_what_changes_a_step():
    base = Order([40, 60], 8, 0, 4, 10)
    others = [
        *(Order([40, 61], 8, 0, 4, 10), Order([60, 40], 8, 0, 4, 10), Order([40, 60], 4, 0, 4, 10)),
        *(Order([40, 60], 8, 1, 4, 10), Order([40, 60], 8, 0, 2, 10), Order([40, 60], 8, 0, 4, 20)),
    ]
    assert len({order.fingerprint() for order in (base, *others)}) == 7
    assert base.fingerprint() == Order([40, 60], 8, 0, 4, 10).fingerprint()
    assert Order([40, 60], 8, 0).fingerprint() == Order([60, 40], 8, 0, lanes=2).fingerprint(), "shuffled whole"


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(DataError, match=r"5 training images fill no batch .* 6: lower it"):
        Order([2, 3], 6, 0)
