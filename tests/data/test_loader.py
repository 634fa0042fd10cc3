"""Batches are a pure function of the step; damaged images are replaced alike on any world."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import wait_until
from sample_images import batches, corrupt, encoded, smooth

from data.errors import DataError
from data.images import decode
from data.loader import Augment, Batches, load, read
from data.order import Order, sample_checksum
from data.shards.reader import Shards, write
from trainer.config.settings import DataConfig


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_stops_and_is_named(numbered, workers):
    corrupt(numbered, 5)
    with pytest.raises(DataError, match=r"step \d: cannot decode an image: .*00000.tar, member 005.png") as raised:
        list(load(batches(Shards(numbered.source)), range(6), workers))
    assert "Traceback" not in str(raised.value)
    assert "--data.on_error skip" in str(raised.value)


def test_a_neighbour_stands_in_for_a_corrupt_image_on_any_world(numbered):
    for position in (5, 6, 14, 49):
        corrupt(numbered, position)
    skipping = Shards(numbered.source, "skip")
    whole = [one for (one,) in load(batches(skipping), range(6), 0)]
    seen = torch.cat([one.position for one in whole]).tolist()
    stands_in = {5: 0, 6: 0, 14: 15}  # 5's neighbour 6 is corrupt, too, so 5's is the shard's first; 49 has none
    wanted = [p for step in range(6) for p in Order(skipping.counts, 8, 0)[step].tolist()]
    for want, got in zip(wanted, seen, strict=True):
        assert got == stands_in.get(want, want) or (want == 49 and got != 49)
    told = [line for one in whole for line in one.skipped]
    assert len(told) == len([p for p in wanted if p in (5, 6, 14, 49)])
    assert any("member 005.png" in line and "seen instead: " in line and "member 000.png" in line for line in told)
    grey = torch.cat([one.image[:, 0, 0, 0] for one in whole]).tolist()
    assert grey == seen, "the pixels are the stand-in's"
    assert torch.cat([one.label for one in whole]).tolist() == [p % 3 for p in seen], "and so is the label"
    for rank in range(4):
        part = [one for (one,) in load(batches(skipping, slice(2 * rank, 2 * rank + 2)), range(6), rank % 2)]
        for one, all_of in zip(part, whole, strict=True):
            assert torch.equal(one.position, all_of.position[2 * rank : 2 * rank + 2])


def test_no_good_image_at_all_is_an_error(numbered):
    for position in range(50):
        corrupt(numbered, position)
    with pytest.raises(DataError, match="is damaged, and so is all that could stand in for it"):
        list(load(batches(Shards(numbered.source, "skip")), range(1), 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_s_limits_are_its_settings(numbered, workers):
    shards = DataConfig(numbered.source, max_pixels=63).open([numbered.source])[0]
    with pytest.raises(DataError, match=r"step 1: cannot decode.*8 x 8 pixels, more than 63 \(data.max_pixels, "):
        next(load(batches(shards), range(1), workers))
    large = DataConfig(numbered.source, max_bytes=10).open([numbered.source])[0]
    assert [len(content) for content in large.images(np.arange(3))[0]] == [11] * 3, "no more is read than tells"
    with pytest.raises(DataError, match=r"more than 10 bytes \(data.max_bytes, "):
        next(load(batches(large), range(1), 0))


def test_augmentation_is_drawn_by_seed_step_and_place():
    augment = Augment((0.2, 0.8), flip=True)
    whole = slice(0, 1000)
    views = augment.views(whole, 1, 2)
    assert views == augment.views(whole, 1, 2)
    for rows in (slice(0, 10), slice(7, 8), slice(501, 1000)):
        assert augment.views(rows, 1, 2) == views[rows]
    assert views != augment.views(whole, 1, 3)
    assert views != augment.views(whole, 2, 2)
    area, ratio, x, _, flip, _ = np.array(views).T
    assert (area.min(), area.max()) == (pytest.approx(0.2, abs=0.01), pytest.approx(0.8, abs=0.01))
    assert np.abs(ratio).max() == pytest.approx(np.log(4 / 3), abs=0.01)
    assert (x.mean(), flip.mean()) == (pytest.approx(0.5, abs=0.05), pytest.approx(0.5, abs=0.05))


@pytest.mark.parametrize(
    ("world", "workers", "crop"),
    [(1, 1, (0.3, 1)), (2, 0, "random"), (2, 3, (0.3, 1)), (4, 1, "random"), (8, 0, (0.3, 1)), (8, 3, "random")],
)
def test_global_batches_do_not_depend_on_world_size_or_workers(tmp_path, world, workers, crop):
    """Across an epoch's border, with random views."""
    pictures = ({"__key__": f"{i}", "png": encoded(smooth(40 + i, 30)), "cls": str(i)} for i in range(50))
    write(tmp_path / "set", pictures, per_shard=7)
    shards, share, steps, augment = Shards(tmp_path / "set"), 8 // world, range(4, 8), Augment(crop, flip=True)
    whole = [one for (one,) in load(batches(shards, augment=augment), steps, 0)]
    for rank in range(world):
        rows = slice(rank * share, (rank + 1) * share)
        for one, (part,) in zip(whole, load(batches(shards, rows, augment), steps, workers), strict=True):
            assert torch.equal(part.image, one.image[rows])
            assert torch.equal(part.position, one.position[rows])
            assert torch.equal(part.label, one.label[rows])
    plain = [one for (one,) in load(batches(shards), steps, 0)]
    for step, one, unseen in zip(steps, whole, plain, strict=True):
        assert one.position.tolist() == Order(shards.counts, 8, 0)[step].tolist() == one.label.tolist()
        assert (one.image != unseen.image).flatten(1).any(1).all(), "each was cropped"
        again = decode(shards.image(int(one.position[3])), 32, 1, augment.views(slice(3, 4), 0, step)[0])
        assert torch.equal(one.image[3, 0], torch.from_numpy(again)[..., 0])


READER = """
from data.loader import Augment, Batches, load
from data.order import Order, sample_checksum
from data.shards.reader import Shards

def work(source, log, rank, world, first, workers):
    shards, share = Shards(source), 8 // world
    rows = slice(rank * share, (rank + 1) * share)
    batches = Batches([shards], [Order(shards.counts, 8, 0)], 32, 1, rows, Augment((0.3, 1), True))
    with open(log, "a", buffering=1) as file:
        for step, (images,) in enumerate(load(batches, range(first, 10**6), workers), first):
            checksum = sample_checksum(step, 0, rows, images.position.numpy())
            file.write(f"{step} {checksum} {images.image.long().sum()}\\n")
"""


def test_killed_readers_go_on_anywhere_in_any_number(forked, numbered, tmp_path):
    """kill -9 at random moments; what all ranks saw of each step is what one process sees that was never hurt."""
    rng, seen, first = np.random.default_rng(0), {}, 0
    for world, workers in ((2, 1), (1, 0)):
        logs = [tmp_path / f"{first}_{rank}" for rank in range(world)]
        arguments = [(numbered.source, str(log), rank, world, first, workers) for rank, log in enumerate(logs)]
        processes = [forked(f"{READER}\nwork(*{given!r})") for given in arguments]
        wait_until(lambda logs=logs: all(log.exists() and log.stat().st_size for log in logs))
        time.sleep(rng.random() / 2)
        for process in processes:
            process(signal.SIGKILL, kill=os.killpg)
            process.wait()
        ranks = [[line.split() for line in log.read_text().splitlines() if line.count(" ") == 2] for log in logs]
        common = min(len(rank) for rank in ranks) - 1  # the last line may be cut short
        for i in range(common):
            told = [list(map(int, rank[i])) for rank in ranks]
            seen[told[0][0]] = sum(one[1] for one in told) % 2**32, sum(one[2] for one in told)
        first += common
    assert sorted(seen) == list(range(first))
    assert first > 10
    whole = load(batches(numbered, augment=Augment((0.3, 1), True)), range(first), 0)
    for step, (part,) in enumerate(whole):
        assert seen[step] == (sample_checksum(step, 0, slice(0, 8), part.position.numpy()), part.image.long().sum())


def test_two_unpaired_sets_have_orders_of_their_own(numbered, digits):
    other = Shards(digits / "test")
    both = Batches([numbered, other], [Order(numbered.counts, 8, 0), Order(other.counts, 8, 5)], 32, 1, slice(0, 8))
    (a, b), *_ = load(both, range(3, 4), 0)
    assert a.position.tolist() == Order(numbered.counts, 8, 0)[3].tolist()
    assert b.position.tolist() == Order(other.counts, 8, 5)[3].tolist()
    assert torch.equal(b.image, read(other, b.position.numpy(), 32, 1).image)


def test_a_dead_worker_is_an_error_in_seconds(numbered):
    before = set(multiprocessing.active_children())  # another test's may take a moment to end
    arriving = load(batches(numbered), range(10**6), 1)
    next(arriving)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a process that reads data died"):
        for _ in arriving:
            pass


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_die_with_their_parent(forked, numbered, tmp_path):
    told = tmp_path / "told"
    parent = forked(f"""
import multiprocessing, time
from pathlib import Path
from data.loader import Batches, load
from data.order import Order
from data.shards.reader import Shards
shards = Shards({numbered.source!r})
arriving = load(Batches([shards], [Order(shards.counts, 8, 0)], 32, 1, slice(0, 8)), range(10**6), 2)
next(arriving)
Path({str(told)!r}).write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()) + ".")
time.sleep(600)
""")
    wait_until(lambda: told.exists() and told.read_text().endswith("."))
    pids = [int(pid) for pid in told.read_text().strip(".").split()]
    assert len(pids) == 2
    assert all(is_alive(pid) for pid in pids)
    parent(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 60)
