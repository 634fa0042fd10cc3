"""What the benchmark of fetching states, on smaller numbers: what machines read, and that they do not crowd."""

import sys

import numpy as np
import pytest

from benchmarks.fetch import Plan, Reading, at_once, main, read
from data.shards.reader import Shards

# 16 machines of 2 ranks that see 8 images a step; a machine's share of the set is 40 shards, 16 fit into its cache.
PLAN = Plan(32_000, 50, 1e3, machines=16, gpus=2, batch=8, rate=16, cache=16 * 50e3, window=6_400, lanes=32, minutes=8)


def test_machines_read_their_own_shards_once():
    """Each epoch's shards, and those at the edges of two machines' parts, which both read."""
    order = PLAN.order()
    epochs = PLAN.minutes * 60 * PLAN.rate / PLAN.batch / order.steps_per_epoch
    assert 7 < epochs < 8
    readings = [read(PLAN, machine, order) for machine in range(PLAN.machines)]
    for one in readings:
        assert len(one.fetched) <= (40 + 2 * 2) * 8, "a lane's blocks share shards, which the cache keeps"
        assert one.open_files <= 8
    assert at_once(readings) <= 4, "of 16, in a minute that sees the end of an epoch and the beginning of the next"
    first_epoch = replace_minutes(PLAN, order.steps_per_epoch)
    parts = [{shard for _, shard in read(first_epoch, machine, order).fetched} for machine in range(PLAN.machines)]
    assert sum(map(len, parts)) <= 640 + 2 * 32


def replace_minutes(plan: Plan, steps: int) -> Plan:
    return Plan(**{**vars(plan), "minutes": steps * plan.batch / plan.rate / 60})


def test_a_whole_shuffle_has_all_machines_read_all_shards_again_and_again():
    """So that no large set is shuffled as a whole by default."""
    plan = Plan(**{**vars(PLAN), "window": 32_000, "minutes": 1})
    readings = [read(plan, machine, plan.order()) for machine in range(3)]
    assert all(len(one.in_use[0]) > 0.9 * 640 for one in readings), "1,920 draws leave out one of e^3 = 20"
    assert all(len(one.fetched) > 0.9 * 120 * 16 for one in readings), "nearly each image is a download"
    assert at_once(readings) == 3


def test_machines_are_counted_by_shard_and_minute():
    readings = [Reading([(0, 1), (0, 2), (1, 3)]), Reading([(0, 1), (0, 1), (1, 2)]), Reading([(0, 2), (1, 1)])]
    assert at_once(readings) == 2


def test_a_machine_begins_with_the_shard_of_its_first_row(numbered):
    """Where all need all shards, each begins with another."""
    positions = np.array([30, 8, 31, 1, 49, 9])
    assert numbered.shards_of(positions).tolist() == [4, 1, 0, 7]
    opened = []
    of = Shards._opened
    numbered._opened = lambda shard: opened.append(shard) or of(numbered, shard)
    contents, labels = numbered.images(positions)
    assert opened == [4, 1, 0, 7]
    assert labels.tolist() == (positions % 3).tolist()
    assert contents == [numbered.image(int(position)) for position in positions]


@pytest.mark.parametrize("window", ["4096", None])
def test_the_command_prints_a_row_for_each_set(monkeypatch, capsys, window):
    sizes = ["--machines", "4", "--gpus", "2", "--batch", "4", "--minutes", "0.1", "--images", "20000", "40000"]
    monkeypatch.setattr(sys, "argv", ["fetch", *sizes, *(["--window", window] if window else [])])
    main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["20,000", "40,000"]
    assert ("whole" in rows[0][2]) == (window is None)
    assert all(1 <= int(row[-1]) <= 4 for row in rows)
