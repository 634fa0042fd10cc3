"""The order of samples where its window and lanes are not set, and of odd numbers of samples."""

import pickle

import numpy as np
import pytest

from data import order as module
from data.order import Order, sample_checksum


@pytest.mark.parametrize(
    ("batch", "window", "lanes"),
    [
        (8, 524_288, 8),  # 64 lanes, or the nearest number that divides the batch
        (111, 524_288, 37),
        (255, 524_288, 51),
        (256, 524_288, 64),
        (260, 532_480, 65),
        (1024, 2_097_152, 256),
        (2000, 4_096_000, 500),
        (4096, 8_388_608, 1024),
    ],
)
def test_a_steps_samples_are_chosen_among_2048_batches_from_a_quarter_as_many_places(batch, window, lanes):
    order = Order([10_000] * 10, batch, 0)
    assert (order.window, order.lanes, order.width) == (window, lanes, batch // lanes)


def test_no_default_shuffles_a_large_set_as_a_whole():
    """However large the batch is, ranks read from their own lanes: of a million images, each from 16 of 16,384."""
    assert Order([2**9] * 2**10, 65_536, 0).whole
    order = Order([2**9] * (2**10 + 1), 65_536, 0)
    assert not order.whole
    assert len(order.edges) == 2, "a lane is one block"
    assert len({*order.rows(3, slice(64, 128)) // 2**9}) < 4
    assert Order([2**9] * 2**11, 65_536, 0, window=2**20).whole


def test_a_window_holds_a_batch():
    assert Order([10] * 10, 20, 0, window=3).window == 20


def test_counts_may_be_of_any_integer_type():
    counts = [3, 5, 9]
    orders = [Order(given, 4, 0, 2, 6) for given in (counts, np.array(counts, np.uint8), np.array(counts, np.int32))]
    for step in range(9):
        assert all(np.array_equal(order[step], orders[0][step]) for order in orders)
    assert orders[0][0].dtype == np.int64


def test_a_set_as_large_as_the_window_is_shuffled_whole():
    whole = Order([20, 30], 8, 1)
    for window, alike in ((50, True), (49, False)):
        order = Order([20, 30], 8, 1, lanes=4, window=window)
        assert np.array_equal(order[0], whole[0]) == alike
        assert (order.fingerprint() == whole.fingerprint()) == alike


@pytest.mark.parametrize(("window", "blocks"), [(36, 1), (24, 2), (16, 3), (8, 6), (7, 6)])
def test_the_blocks_of_all_lanes_hold_about_a_window(window, blocks):
    """Of 48 samples of 50, in 4 lanes of 12; a window holds a batch of 8 at least."""
    order = Order([20, 30], 8, 1, lanes=4, window=window)
    assert order.edges.tolist() == [i * 12 // blocks for i in range(blocks + 1)]
    for step in range(6):
        places = [set(order.rows(step, slice(2 * lane, 2 * lane + 2)).tolist()) for lane in range(4)]
        assert len(set().union(*places)) == 8


def test_fingerprints_are_pinned():
    """A change would refuse every run that is resumed."""
    assert Order([20, 30], 8, 1).fingerprint() == "bc0de66cbbc88dd1"
    assert Order([20, 30], 8, 1, 4, 25).fingerprint() == "3ee8a57ec6658299"


def test_the_sample_checksum_is_pinned():
    """A run's record has it, whose continuation may be another version's."""
    assert sample_checksum(3, 1, slice(2, 6), np.array([5, 6, 7, 8])) == 2_447_512_073


def test_nothing_is_made_twice_and_nothing_is_kept_that_is_not_in_use(monkeypatch):
    """Each epoch's line and every block of every lane once; what a worker is sent is what it needs to make them."""
    made = []
    permutation = module.permutation
    monkeypatch.setattr(module, "permutation", lambda n, *key: made.append(key) or permutation(n, *key))
    order = Order([20, 30], 8, 1, lanes=4, window=16)
    sent = pickle.dumps(order)
    for step in range(4 * order.steps_per_epoch):
        order[step]
        assert sum(map(len, order._kept.values())) <= 4, "of lines and blocks the last two"
    assert len(made) == len(set(made)) == 4 * (1 + 4 * 3)
    assert pickle.dumps(order) == sent
    whole = Order([20, 30], 8, 1)
    for step in range(4 * whole.steps_per_epoch):
        whole[step]
        assert sum(map(len, whole._kept.values())) <= 2
    assert len(made) == len(set(made)) == 4 * (1 + 4 * 3) + 4
