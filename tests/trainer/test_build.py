"""How a batch is split between processes and micro-batches."""

import pytest

from trainer.build import split_batch


def test_shares_of_a_batch():
    assert split_batch(64, None, 2) == (32, 32)
    assert split_batch(64, 8, 2) == (32, 8)
    assert [split_batch(48, 16, world) for world in (1, 2, 4, 8)] == [(48, 16), (24, 12), (12, 12), (6, 6)]
    assert split_batch(48, 16, 2, groups={"system.binary.minibatch_stddev": 4}) == (24, 12)
    with pytest.raises(
        ValueError, match=r"batch_size 64 cannot be dealt evenly to 3 processes: take 63 or 66.*1, 2, 4"
    ):
        split_batch(64, None, 3)
    with pytest.raises(ValueError, match=r"batch_size 1 .* take 4"):
        split_batch(1, None, 4)
    with pytest.raises(ValueError, match=r"^system.ternary.minibatch_stddev 5 cannot divide a process's 32 images"):
        split_batch(64, None, 2, groups={"system.ternary.minibatch_stddev": 5})
    with pytest.raises(ValueError, match=r"binary.* 4 and .*ternary.* 6 cannot divide a process's 8 images"):
        split_batch(16, None, 2, groups={"system.binary.minibatch_stddev": 4, "system.ternary.minibatch_stddev": 6})
    with pytest.raises(ValueError, match=r"micro_batch 3 holds no whole group of system.* 4: take one of 4, 8"):
        split_batch(64, 3, 2, groups={"system.binary.minibatch_stddev": 4})
