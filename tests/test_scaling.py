"""The prediction's arithmetic in closed form, and the sizes that it takes from DDP and from a system."""

import itertools
import math
import sys

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scaling import SYNCS, Cluster, Traffic, buckets_of, fit, main, traffic_of
from trainer.config.parser import configure

CLUSTER = Cluster(alpha=1.0, intra=100.0, inter=50.0, gpus_per_node=8)
ENDLESS = Cluster(alpha=0.0, intra=math.inf)
TRAFFIC = Traffic(4, buckets=((200, 100, 300),))
VAEGAN = "--system VAEGAN --system.networks.family dcgan --system.networks.width 8 --data.train none"
SMALL = [*VAEGAN.split(), "--data.channels", "1", "--trainer.batch_size", "2"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_all_reduces_by_hand():
    # 2 x 3 messages of 250 bytes; 2 x 63 of 1000 / 64 over the slower links between nodes.
    assert CLUSTER.ring(4, 1000) == pytest.approx(6 * (1 + 250 / 100))
    assert CLUSTER.ring(64, 1000) == pytest.approx(126 * (1 + 1000 / 64 / 50))
    # 8 nodes: a chain of 8 devices and 3 levels of a tree, forth and back.
    assert CLUSTER.tree(64, 1000) == pytest.approx(20 * 1 + 2 * 1000 / 50)
    assert CLUSTER.tree(8, 0) == 14
    # The tree is the faster one for short messages, the ring for long ones.
    assert CLUSTER.all_reduce(256, 1) == CLUSTER.tree(256, 1) < CLUSTER.ring(256, 1)
    assert CLUSTER.all_reduce(256, 1e9) == CLUSTER.ring(256, 1e9) < CLUSTER.tree(256, 1e9)


@given(st.integers(2, 4096), st.floats(1, 1e9), st.sampled_from([Cluster.ring, Cluster.tree]))
def test_an_all_reduce_is_linear_in_its_bytes(processes, size, algorithm):
    latency = algorithm(CLUSTER, processes, 0)
    once, twice = (algorithm(CLUSTER, processes, factor * size) - latency for factor in (1, 2))
    assert twice == pytest.approx(2 * once, rel=1e-6)
    assert algorithm(Cluster(1.0, math.inf), processes, size) == latency


@pytest.mark.parametrize("sync", SYNCS)
def test_one_process_and_endless_links_add_nothing(sync):
    assert TRAFFIC.seconds(CLUSTER, 1, sync=sync) == 0
    assert TRAFFIC.seconds(ENDLESS, 1024, sync=sync) == 0
    assert TRAFFIC.seconds(CLUSTER, 2, sync=sync) > 0


def test_the_backward_hides_all_buckets_but_the_last():
    # On 2 processes a bucket takes 2 + bytes / 100 seconds: 4, 3 and 5.
    for backward, expected in {0: 12, 4: 8, 7: 5, 1e9: 5}.items():
        assert TRAFFIC.seconds(CLUSTER, 2, backward) == pytest.approx(expected)
        # One all-reduce after the backward: two latencies less, and nothing is hidden.
        assert TRAFFIC.seconds(CLUSTER, 2, backward, "flat") == pytest.approx(8)
    assert Traffic(4, TRAFFIC.buckets * 2).seconds(CLUSTER, 2, 4) == pytest.approx(16), "players move one by one"


def test_no_backward_hides_statistics():
    traffic = Traffic(4, (), statistics=(8, 16))
    expected = CLUSTER.all_reduce(4, 8) + CLUSTER.all_reduce(4, 16)
    assert traffic.seconds(CLUSTER, 4, backward=1e9) == pytest.approx(expected)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_fit_recovers_the_links_that_made_the_times(processes):
    made = Cluster(2e-4, 1.5e9, gpus_per_node=processes)
    found = fit({size: made.ring(processes, size) for size in (1024, 65536, 2**22)}, processes)
    assert (found.alpha, found.intra) == (pytest.approx(made.alpha), pytest.approx(made.intra))


def test_buckets_are_those_that_ddp_makes():
    sizes: list[int] = []

    def reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().nbytes)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    widths = [300, 400, 3000, 2500, 200, 900]
    network = torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(network, bucket_cap_mb=None)
        wrapped.register_comm_hook(None, reduce)
        for _ in range(3):
            sizes.clear()
            wrapped(torch.randn(2, 300)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(sizes) == 3, "one of about 1 MiB, then of about 25"
    assert tuple(sizes) == buckets_of([("it", weight.nbytes) for weight in reversed(list(network.parameters()))])


def test_each_network_has_its_own_buckets_in_the_order_in_which_they_fill():
    mega = 2**20
    assert buckets_of([("a", mega), ("b", 8), ("a", 4), ("b", mega), ("a", 2)]) == (mega, mega + 8, 6)


def test_the_gradients_of_a_system():
    config = configure(SMALL)
    traffic = traffic_of(config)
    weights = {name: sum(p.nbytes for p in child.parameters()) for name, child in config.system().networks().items()}
    discriminator, autoencoder = traffic.buckets
    assert sum(discriminator) == weights["discriminator_binary"]
    assert autoencoder == (weights["decoder"], weights["encoder"]), "the encoder's gradients are the last"


def test_a_pool_of_fakes_is_no_statistic():
    settings = "--system CycleGAN --system.width 4 --system.blocks 1 --data.channels 1 --data.train none"
    settings += " --system.binary.lecam_weight 0.1 --trainer.batch_size 2"
    assert traffic_of(configure(settings.split())).statistics == (8, 8), "LeCam's two means of each domain"


def test_the_command_predicts(monkeypatch, capsys):
    links = ["--step", "0.1", "--alpha", "5e-6", "--intra", "1e9", "--inter", "1e8", "--gpus", "1", "8", "64"]
    monkeypatch.setattr(sys, "argv", ["scaling", "--predict", *links, *SMALL])
    main()
    rows = [line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| as given")]
    efficiency = [float(row[2]) for row in rows]
    assert [int(row[0]) for row in rows] == [1, 8, 64]
    assert efficiency[0] == 1
    assert efficiency == sorted(efficiency, reverse=True)
    assert efficiency[2] < efficiency[1]
    monkeypatch.setattr(sys, "argv", ["scaling", "--predict", "--step", "0.1", *SMALL])
    with pytest.raises(SystemExit):
        main()
    assert "--predict needs --alpha, --intra" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_measures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "--rounds", "1", "--seconds", "0.1", *SMALL])
    main()
    rows = [line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| as given")]
    assert [(row[0].strip(), int(row[1])) for row in rows] == [("ddp", 2), ("flat", 2)]
    assert all(float(row[-1]) > 0 for row in rows)
