"""A log window across processes, and across a restart with another number of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.loader import Images
from data.order import sample_checksum
from data.shards.reader import Shards, write
from trainer.config.settings import DataConfig
from trainer.errors import RunError
from trainer.log.data_health import DataHealth, size_warning
from trainer.log.pictures import encoded
from trainer.log.window import LogWindow
from trainer.step import TermMeans


def make_window(rank: int = 0, processes: int = 1) -> LogWindow:
    """A window on one of several processes, where the others have the same terms and no samples."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=processes,
        process_index=rank,
        is_main_process=rank == 0,
        reduce=lambda value, how: value,
    )
    return LogWindow(accelerator, TermMeans(), batch_size=8)


def images(positions, skipped=()) -> Images:
    return Images(torch.zeros(len(positions), 1, 2, 2), torch.zeros(0), torch.tensor(positions), list(skipped))


def test_a_window_sums_checksums_and_averages_terms():
    window, rows = make_window(), slice(0, 2)
    window.start(4)
    for step in (4, 5):
        window.add_samples(step, rows, [images([step, 7]), images([1, 2], skipped=["x.png is damaged"])])
        window.meter.add({"player/loss": torch.tensor(float(step))})
    with window.waiting_for_data():
        pass
    checksum = sum(
        sample_checksum(step, which, rows, np.array(positions))
        for step in (4, 5)
        for which, positions in enumerate(([step, 7], [1, 2]))
    )
    assert window.state() == {
        "terms": {"player/loss": (9.0, 2.0)},
        "sample_checksum": checksum,
        "replaced": ["step 5: x.png is damaged", "step 6: x.png is damaged"],
    }
    summary = window.read(6)
    assert summary.terms["player/loss"] == 4.5
    assert summary.terms["speed/images_per_second"] > 0
    assert 0 <= summary.terms["speed/data_wait"] <= 1
    assert (summary.sample_checksum, len(summary.replaced)) == (checksum % 2**32, 2)
    assert window.state() == {"terms": {}, "sample_checksum": 0, "replaced": []}


@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("before", [1, 2])
def test_a_window_is_continued_by_any_number_of_processes(before, then):
    """Every sample counts once, and each process has the mean of the terms."""
    states = [
        {"terms": {"a/b": (4.0 + 2 * rank, 2.0)}, "sample_checksum": 10 + rank, "replaced": [f"image {rank}"]}
        for rank in range(before)
    ]
    windows = [make_window(rank, then) for rank in range(then)]
    for window in windows:
        window.load(states)
    assert sum(window.sample_checksum for window in windows) == sum(10 + rank for rank in range(before))
    assert sorted(message for window in windows for message in window.replaced) == [f"image {i}" for i in range(before)]
    means = [window.meter.state()["a/b"][0] / 2 for window in windows]
    assert sum(means) / then == (2.0 if before == 1 else 2.5)


def make_health(max_skipped: float = 0.01, replaced: int = 0) -> DataHealth:
    data = SimpleNamespace(max_skipped=max_skipped, trains=["a"], workers=2, size=32)
    config = SimpleNamespace(data=data, trainer=SimpleNamespace(batch_size=8, log_every=2))
    return DataHealth(config, first_step=10, replaced=replaced)


def test_a_run_stops_above_the_accepted_share_of_damaged_images():
    make_health(replaced=10).check_replaced(20)  # of at least 1000 images
    make_health(replaced=80).check_replaced(1000)
    for replaced, step in ((11, 20), (81, 1000)):
        with pytest.raises(RunError, match=rf"step {step}: {replaced} of .* more than data.max_skipped 0.01 allows"):
            make_health(replaced=replaced).check_replaced(step)


def test_slow_data_is_reported_once_and_not_in_the_first_log_lines():
    health = make_health()
    assert health.slow_data_warning(12, 0.9) is None
    assert health.slow_data_warning(14, 0.1) is None
    assert "steps wait for data 20% of the time: raise --data.workers (now 2)" in health.slow_data_warning(14, 0.2)
    assert health.slow_data_warning(16, 0.9) is None


@pytest.mark.parametrize(
    ("stored", "size", "warned"),
    [
        ([64] * 9, 128, True),
        ([64] * 9, 64, False),
        ([28], 32, False),
        ([8] * 8, 32, False),
        ([64], [64, 128], True),
        ([64, 64, 256], 128, True),
        ([64, 256, 256], 128, False),
        ([256] * 8 + [8] * 20, 128, False),
    ],
)
def test_images_that_are_much_enlarged_are_warned_of(tmp_path, stored, size, warned):
    contents = [encoded(torch.zeros(1, pixels, pixels, dtype=torch.uint8))[1] for pixels in stored]
    write(tmp_path, ({"__key__": f"{i:02}", "png": content} for i, content in enumerate(contents)))
    said = size_warning(Shards(tmp_path), DataConfig(str(tmp_path), None, size))
    assert (said is not None) == warned
    if said:
        assert f"data.size is {size}, but the first images of {tmp_path} are smaller, such as 64 x 64 pixels" in said


@pytest.mark.parametrize(
    ("stored", "size", "warned"),
    [([64] * 3, 32, True), ([64] * 3, 48, False), ([64, 65], 32, False), ([32], 32, False), ([1025], 32, False)],
)
def test_prepared_images_that_the_default_size_shrinks_are_warned_of(tmp_path, stored, size, warned):
    contents = [encoded(torch.zeros(1, pixels, pixels, dtype=torch.uint8))[1] for pixels in stored]
    write(tmp_path, ({"__key__": f"{i:02}", "png": content} for i, content in enumerate(contents)))
    said = size_warning(Shards(tmp_path), DataConfig(str(tmp_path), None, size))
    assert (said is not None) == warned
    assert not warned or "64 x 64 pixels: they are shrunk. If that is not meant, add --data.size 64" in str(said)
    assert size_warning(Shards(tmp_path), DataConfig(str(tmp_path), None, size, crop="random")) is None


def test_a_damaged_image_is_left_to_the_run(tmp_path):
    write(tmp_path, [{"__key__": "a", "png": b"no"}])
    assert size_warning(Shards(tmp_path), DataConfig(str(tmp_path), None, 128)) is None
