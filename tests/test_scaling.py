"""The model of scaling by its closed forms and limits, and the sizes it takes from DDP and from a system."""

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

from benchmarks import saving
from benchmarks.scaling import Cluster, Move, Network, fill, fit, main, network_of, ring, tree
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint import writer
from trainer.config.parser import configure

CLUSTER = Cluster(alpha=1.0, intra=100.0, inter=50.0, gpus_per_node=8)
MOVE = Move("player", ((0.0, 300), (0.25, 100), (0.5, 200)), ((8, 0), (16, 16)))
NETWORK = Network("name", batch_size=4, flops=0, moves=(MOVE, Move("other", ((0.0, 50),))))
VAEGAN = [
    *(
        "--system",
        "VAEGAN",
        "--system.networks.family",
        "dcgan",
        "--system.networks.width",
        "8",
        "--data.train",
        "none",
    ),
    *("--data.channels", "1", "--trainer.batch_size", "2"),
]


def test_all_reduces_by_hand():
    # 2 x 3 messages of 250 bytes; 2 x 63 of 1000 / 64 over the slower links between nodes.
    assert ring(CLUSTER, 4, 1000) == pytest.approx(6 * (1 + 250 / 100))
    assert ring(CLUSTER, 64, 1000) == pytest.approx(126 * (1 + 1000 / 64 / 50))
    # 8 nodes: 7 devices down a chain and 3 levels of a tree, there and back.
    assert tree(CLUSTER, 64, 1000) == pytest.approx(20 * 1 + 2 * 1000 / 50)
    assert tree(CLUSTER, 8, 0) == 14


@given(st.integers(2, 4096), st.floats(1, 1e9), st.sampled_from([ring, tree]))
def test_bytes_count_in_proportion_and_messages_apart(processes, size, way):
    latency = way(CLUSTER, processes, 0)
    once, twice = (way(CLUSTER, processes, factor * size) - latency for factor in (1, 2))
    assert twice == pytest.approx(2 * once, rel=1e-6)
    endless = Cluster(1.0, math.inf, math.inf, 8)
    assert way(endless, processes, size) == latency


@pytest.mark.parametrize("way", [ring, tree])
def test_the_best_way_is_the_faster_at_each_size(way):
    for size in (0, 1e3, 1e6, 1e9):
        assert CLUSTER.all_reduce(256, size) <= way(CLUSTER, 256, size)
    assert CLUSTER.all_reduce(256, 1) == tree(CLUSTER, 256, 1)
    assert CLUSTER.all_reduce(256, 1e9) == ring(CLUSTER, 256, 1e9)


@pytest.mark.parametrize("sync", ["ddp", "flat"])
def test_one_process_and_endless_links_without_latency_send_nothing(sync):
    assert NETWORK.communication(CLUSTER, 1, 10.0, 0.0, sync) == 0
    assert NETWORK.communication(Cluster(0.0, math.inf, math.inf, 8), 1024, 10.0, 0.0, sync) == 0
    assert NETWORK.communication(CLUSTER, 2, 10.0, 0.0, sync) > 0


@given(st.integers(2, 1024), st.floats(0, 1e4), st.floats(0, 1))
def test_overlap_hides_what_the_backward_is_long_enough_for(processes, step, overlap):
    whole = sum(CLUSTER.all_reduce(processes, size) for _, size in MOVE.buckets)
    last = CLUSTER.all_reduce(processes, 300)
    exposed = [MOVE.exposed(CLUSTER, processes, step, share, "ddp") for share in (1.0, overlap, 0.0)]
    assert last <= exposed[0] <= exposed[1] * (1 + 1e-9)
    assert exposed[1] <= exposed[2] * (1 + 1e-9)
    assert exposed[2] == pytest.approx(whole)
    assert MOVE.exposed(CLUSTER, processes, 0.0, 1.0, "ddp") == pytest.approx(whole), "no backward hides nothing"
    assert MOVE.exposed(CLUSTER, processes, 1e9, 1.0, "ddp") == last, "a long one all but the last bucket"


def test_buckets_queue_up_behind_each_other():
    # Ready at -5, -2.5 and 0; on 2 processes 2 + size / 100 seconds each: until -1, then 2, then 7.
    assert MOVE.exposed(CLUSTER, 2, 10.0, 1.0, "ddp") == pytest.approx(7.0)
    # From a step of 4 on: ready at -2, -1 and 0, done at 2, 5 and 10.
    assert MOVE.exposed(CLUSTER, 2, 4.0, 1.0, "ddp") == pytest.approx(10.0)


def test_flat_saves_messages_and_hides_nothing():
    one, by_one = Cluster(1.0, 100.0, algorithm="ring"), 2 * 3 * 1.0
    apart = MOVE.exposed(one, 4, 10.0, 0.0, "ddp")
    assert MOVE.exposed(one, 4, 10.0, 1.0, "flat") == pytest.approx(apart - 2 * by_one)


def test_statistics_that_hold_every_row_grow_with_the_processes():
    assert MOVE.told(CLUSTER, 4) == pytest.approx(CLUSTER.all_reduce(4, 8) + CLUSTER.all_reduce(4, 16 + 3 * 16))


def test_waiting_for_the_slowest():
    assert NETWORK.waiting(1, 10.0, 0.1) == 0
    exact = 0.1 * 10.0 * math.sqrt(2) / math.sqrt(math.pi)  # the larger of two normals is 1 / sqrt(pi) above their mean
    assert NETWORK.waiting(2, 10.0, 0.1) == pytest.approx(exact, rel=0.05)
    draws = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).amax(1)
    assert NETWORK.waiting(64, 10.0, 0.1) == pytest.approx(float(draws.mean()) * math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_fit_finds_what_made_the_times(processes):
    made = Cluster(2e-4, 1.5e9, gpus_per_node=processes)
    found = fit({size: ring(made, processes, size) for size in (1024, 65536, 2**22)}, processes)
    assert (found.alpha, found.intra) == (pytest.approx(made.alpha), pytest.approx(made.intra))


def test_buckets_are_those_that_ddp_makes():
    sizes: list[int] = []

    def reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().numel() * 4)
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
    arriving = [parameter.numel() * 4 for parameter in reversed(list(network.parameters()))]
    assert len(sizes) == 3, "one of about 1 MiB, then of about 25"
    assert sizes == [size for _, size in fill(arriving)]


@pytest.fixture
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_system_s_sizes_and_slacks():
    config = configure(VAEGAN)
    network, system = network_of(config, "it"), config.system()
    judge, autoencoder = network.moves
    weights = {name: 4 * sum(p.numel() for p in child.parameters()) for name, child in system.networks().items()}
    assert judge.bytes == weights["discriminator_binary"]
    encoder, decoder = autoencoder.buckets
    assert (encoder[1], decoder[1]) == (weights["encoder"], weights["decoder"])
    assert encoder[0] == 0, "nothing is left of the backward once the encoder's gradients are there"
    assert 0 < decoder[0] < 1
    assert network.flops > 0


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_pool_of_fakes_is_a_statistic_that_grows():
    settings = ["--system", "CycleGAN", "--system.width", "4", "--system.blocks", "1", "--data.channels", "1"]
    network = network_of(configure([*settings, "--data.train", "none", "--trainer.batch_size", "2"]), "it")
    fakes = 2 * 32 * 32 * 8  # two images in float64
    assert sorted(network.moves[0].statistics, reverse=True)[:2] == [(fakes, fakes)] * 2
    assert network.moves[1].statistics == ()


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_command_predicts(monkeypatch, capsys):
    links = ["--step", "0.1", "--alpha", "5e-6", "--intra", "1e9", "--inter", "1e8", "--world", "1", "8", "64"]
    monkeypatch.setattr(sys, "argv", ["scaling", "--model", *links, *VAEGAN])
    main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    efficiency = [float(row[2]) for row in rows]
    assert [int(row[0]) for row in rows] == [1, 8, 64]
    assert efficiency[0] == 1
    assert efficiency == sorted(efficiency, reverse=True)
    assert efficiency[2] < efficiency[1]
    monkeypatch.setattr(sys, "argv", ["scaling", "--model", "--step", "0.1", *VAEGAN])
    with pytest.raises(SystemExit):
        main()
    assert "--model needs --alpha, --intra" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_the_command_measures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "--rounds", "1", "--seconds", "0.1", "--also", "3", *VAEGAN])
    main()
    out = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| as given |")]
    assert [(row[1].strip(), int(row[2])) for row in rows[:2]] == [("ddp", 2), ("flat", 2)]
    assert all(float(row[6]) > 0 for row in rows[:2])
    assert "| 16,777,216 |" in out


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_save_beside_steps_holds_the_step_that_asked_for_it(tmp_path):
    training = saving.Training(configure(VAEGAN))
    training()
    saving.save_and_wait(training, tmp_path)
    training()
    weights = training.state.tensors()["decoder"]["stem.weight"].clone()
    saving.save_beside(training, writer.Saver(tmp_path, 1, None, print))
    (path,) = checkpoint_files.list_checkpoints(tmp_path)
    tensors, manifest = checkpoint_files.load(path)
    assert manifest["step"] == 2
    assert torch.equal(tensors["decoder"]["stem.weight"], weights)
    training()
    assert not torch.equal(training.state.tensors()["decoder"]["stem.weight"], weights)
