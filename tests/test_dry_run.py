"""--dry_run: the report agrees with what the run does and takes, and nothing is written."""

import errno
import fcntl
import json
import resource
import shutil
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CYCLE, NETWORKS, ROOT, SMALL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from data.shards import remote
from data.shards.reader import Shards
from models.networks import NetworkConfig
from models.networks.autoencoder import Decoder
from trainer import run_folder
from trainer.config.parser import configure
from trainer.dry_run import Report, dry_run
from trainer.step import TrainStep
from trainer.step_memory import BusiestBatch, CudaAutocast, fake_accelerator
from trainer.step_time import seconds_per_image

VAEGAN = ["--system", "VAEGAN", "--system.discriminator", "both", "--system.adaptive", "true"]
VAEGAN += ["--system.binary.lecam_weight", "1", "--system.ternary.spectral_norm", "true"]
AE = ["--system", "AE"]
FEW = ["--trainer.batch_size", "4"]
WIDE = ["--system.networks.width", "16", "--system.networks.blocks", "1"]
STRIDED = ["--system.networks.family", "dcgan", "--system.networks.width", "32"]


@pytest.fixture
def settings(digits, tmp_path):
    """A dry run's configuration from its arguments."""
    data = ["--data.train", digits / "train", "--data.test", digits / "test", "--trainer.run_dir", tmp_path / "run"]
    return lambda *more, small=NETWORKS: configure([str(x) for x in (*data, *SMALL, *small, "--dry_run", *more)])


@pytest.fixture(autouse=True)
def no_estimates(monkeypatch):
    """What takes long, and has tests of its own."""
    monkeypatch.setattr("trainer.dry_run.seconds_per_image", lambda *_: (0.5, 4))
    monkeypatch.setattr("trainer.dry_run.Report._memory", lambda _: [])


@pytest.fixture
def report(settings):
    return lambda *more, small=NETWORKS: Report(settings(*more, small=small))


@pytest.fixture
def run(settings, capsys):
    """Run the dry run; its exit code and its output, in which `row(name)` finds a line's words."""

    def start(*more, small=NETWORKS) -> SimpleNamespace:
        capsys.readouterr()
        try:
            code = dry_run(settings(*more, small=small))
        except SystemExit as stopped:
            code = stopped.code
        done = SimpleNamespace(code=code, **capsys.readouterr()._asdict())
        done.row = lambda name: next(line.split() for line in done.out.splitlines() if line.split()[:1] == [name])
        return done

    return start


def test_it_is_no_setting_and_may_stand_anywhere():
    recipe, rest = ["--config", str(ROOT / "launch" / "recipes" / "digits-vae.yaml")], ["--trainer.steps", "9"]
    plain = configure([*recipe, *rest]).yaml
    for words, processes in ((["--dry_run"], 0), (["--dry_run", "4"], 4), (["--dry_run=4"], 4), ([], None)):
        for arguments in ([*words, *recipe, *rest], [*recipe, *words, "--system=VAE", *rest], [*rest, *recipe, *words]):
            config = configure(arguments)
            assert (config.dry_run, config.yaml) == (processes, plain)


def test_its_mistakes_are_named(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("{system: AE, data: {train: x}, dry_run: 3}")
    for arguments, message in (
        ([*AE, "--data.train", "x", "--dry_run", "0"], "--dry_run must be a number of processes, at least 1; got '0'"),
        (
            [*AE, "--data.train", "x", "--dry_run", "many"],
            "--dry_run must be a number of processes, at least 1; got 'many'",
        ),
        (["--config", str(tmp_path / "mine.yaml")], "--dry_run is an option of the command line"),
    ):
        with pytest.raises(SystemExit, match="2"):
            configure(arguments)
        assert message in capsys.readouterr().err


def test_the_program_starts_it(forked, digits):
    argv = ["main.py", *AE, "--dry_run", "--data.train", str(digits / "train"), *SMALL, *NETWORKS]
    main = str(ROOT / "trainer" / "main.py")
    done = forked(f"import runpy, sys\nsys.argv = {argv!r}\nrunpy.run_path({main!r}, run_name='__main__')").wait()
    assert done.returncode == 0, done.stderr
    assert "\nplayers, in the order of their updates\n" in done.stderr
    assert "\npeak memory of a process on a CPU, estimated\n  " in done.stderr


@pytest.mark.slow
def test_the_launched_program_prints_once_for_all_processes(main, tmp_path):
    done = main(*AE, "--trainer.run_dir", tmp_path / "run", "--dry_run", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 images a step = 2 processes x 1 micro-batch x 4") == 1
    assert not (tmp_path / "run").exists()


def test_other_processes_are_silent(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = run(*AE)
    assert (done.code, done.out, done.err) == (0, "", "")


@pytest.mark.parametrize("system", ["CycleGAN", "VAEGAN"])
def test_it_agrees_with_the_run(run, report, here, digits, tmp_path, system):
    """In configuration, weights, images, batch and the size of a checkpoint."""
    both = [f'["{digits}/{part}", "{digits}/{part}"]' for part in ("train", "test")]
    arguments, small = {
        "CycleGAN": (["--system", system, "--data.train", both[0], "--data.test", both[1]], CYCLE),
        "VAEGAN": (VAEGAN, NETWORKS),
    }[system]
    arguments = [*arguments, "--trainer.steps", "1", "--trainer.micro_batch", "3"]
    dry, expected = run(*arguments, small=small), report(*arguments, small=small)
    done = here(*arguments, "--trainer.run_dir", tmp_path / "run", small=small)
    assert (dry.code, done.returncode) == (0, 0), (dry.err, done.stderr)
    configuration, *_ = dry.out.partition("\n\nplayers, in the order of their updates\n")
    configuration = configuration.removeprefix("\nall settings\n")
    assert textwrap.dedent(configuration) + "\n" == (tmp_path / "run" / "config.yaml").read_text()
    words = dry.out.split()
    for name in expected.system.networks():
        assert f"{name} {words[words.index(name) + 1].removesuffix(',')} weights" in done.stderr
    assert "  fingerprint of the shards  " in dry.out
    assert f" {Shards(digits / 'train').fingerprint()}" in dry.out
    assert dry.row("data.train")[-13:-9] == ["1", "1,438", "2.95", "MB"]
    assert dry.row("data.train")[-7:-5] == ["0.00559", "179"]
    assert "1,438 training images, 179 steps an epoch" in done.stderr
    assert "8 images a step = 1 process x 4 micro-batches x 2" in dry.out
    assert "8 images a step = 1 x 4 x 2" in done.stderr
    assert "1 steps = 8 images" in dry.out
    assert "= 0.00559 " in dry.out
    assert "each epoch leaves out 6 of the 1,438 images, other ones each time" in dry.out  # 1,438 = 179 * 8 + 6
    files = (tmp_path / "run" / "checkpoints" / "step_00000001").iterdir()
    assert expected.checkpoint == pytest.approx(sum(file.stat().st_size for file in files), rel=0.02)


def test_players_have_their_networks_and_rules(run, report):
    arguments = ["--system", "VAEGAN", "--system.autoencoder.schedule", "cosine", "--system.autoencoder.hold", "0.5"]
    arguments += ["--system.autoencoder.warmup", "1000", "--system.autoencoder.clip", "2"]
    arguments += ["--system.binary.every", "2", "--system.binary.start", "30", "--system.binary.lr", "1e-5"]
    dry = run(*arguments, "--system.binary.algorithm", "adam")
    count = {name: sum(p.numel() for p in n.parameters()) for name, n in report(*arguments).system.networks().items()}
    head = "every start lr betas weight_decay clip algorithm schedule warmup hold final"
    assert " ".join(dry.row("player")) == f"player networks and weights {head}"
    rest = f"discriminator_binary {count['discriminator_binary']:,} 2 30 1e-05 (0.5, 0.99) 0.0 adam constant 0 0.0 0.0"
    assert " ".join(dry.row("binary")) == f"binary {rest}"
    networks = f"encoder {count['encoder']:,}, decoder {count['decoder']:,}"
    rule = "1 0 0.0002 (0.5, 0.99) 0.0 2.0 adamw cosine 1,000 0.5 0.0"
    assert " ".join(dry.row("autoencoder")) == f"autoencoder {networks} {rule}"
    varying = ["--system.autoencoder.betas", "[0, {start: 0.9, end: 0.99, steps: 78125}]"]
    assert "(0.0, 0.9 to 0.99 in 78,125 steps)" in report(*AE, *varying)._players()[-1]


def test_the_order_of_a_large_set_and_remote_shards(run, tmp_path):
    dry = run(*AE, "--data.window", "300", "--data.lanes", "4")
    assert " ".join(dry.row("data.train")[-7:]) == "4 lanes, shuffled in 5 blocks each"
    assert " ".join(run(*AE).row("data.train")[-5:]) == "the whole set is shuffled"
    shards = [{"url": f"s3://bucket/{i}.tar", "nsamples": 100, "filesize": 2_000_000} for i in range(3)]
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": shards}))
    dry = run(*AE, "--data.train", tmp_path / "index.json", "--data.cache", tmp_path / "cache")
    assert dry.row("data.train")[1:6] == ["3", "300", "6", "MB", "remote"]
    assert f"cache: {tmp_path / 'cache'}, at most 50 GB on each machine" in dry.out


def test_a_number_of_processes_that_does_not_fit_is_refused_with_those_that_do(run, monkeypatch):
    dry = run("3", *AE)
    assert (dry.code, dry.out) == (2, "")
    assert "batch_size 8 cannot be dealt evenly to 3 processes" in dry.err
    assert "(1, 2, 4, 8)" in dry.err
    grouped = ["--system", "GAN", "--system.binary.minibatch_stddev", "4"]
    assert "system.binary.minibatch_stddev 4 cannot divide" in run("4", *grouped).err
    assert "2 processes x 1 micro-batch x 4; other possible numbers of processes: 1\n" in run("2", *grouped).out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "4 processes x 1 micro-batch x 2" in run(*AE).out


def test_mistakes_are_told_as_by_the_run(run, here, tmp_path):
    evaluated = [*AE, "--evaluate.every", "1", "--evaluate.extractor"]
    for mistake in (
        ["--system", "CycleGAN"],
        [*AE, "--trainer.batch_size", "2000"],
        [*AE, "--data.train", tmp_path / "nowhere"],
        [*AE, "--trainer.precision", "fp16"],
        [*AE, "--trainer.time_limit", "soon"],
        [*evaluated, "demo-random", "--evaluate.weights", "x"],
        [*evaluated, "resnet"],
        [*evaluated, "file"],
    ):
        small = [] if "CycleGAN" in mistake else NETWORKS
        dry = run(*mistake, small=small)
        done = here(*mistake, "--trainer.run_dir", tmp_path / "run", small=small)
        assert (dry.code, done.returncode) == (2, 2), (mistake, dry, done)
        assert dry.err.splitlines()[0] in done.stderr.splitlines()


def test_evaluation_needs_held_out_images_and_downloads_nothing(run, report, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    dry = run("--system", "GAN", "--evaluate.every", "3", "--evaluate.num", "77", "--trainer.steps", "10")
    assert "every 3 steps and after the last: 4 times" in dry.out
    source = dry.out.partition("77 samples and 359 held-out images, by inception, which the run first downloads to ")[2]
    assert source.splitlines()[0].endswith(", or by demo-random if it cannot")
    assert not (tmp_path / "torch").exists()
    alone = ["--data.train", digits / "train" / "index.json", "--data.test", "null"]
    without = report(*AE, *alone, "--evaluate.every", "1")
    with pytest.raises(ValueError, match=r"data\.test is not set"):
        list(dict(without.sections())["evaluation"])


def test_precision_is_that_of_the_place(report, run, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert (report(*AE).settings.precision, report("2", *AE).settings.precision) == ("no", "bf16")
    assert report("2", *AE, "--trainer.precision", "fp16").device == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert report("2", *AE).settings.precision == "no"
    assert "fp16, which a CPU would silently train in fp32" in run("2", *AE, "--trainer.precision", "fp16").err


def test_a_run_resumes_or_is_refused_and_nothing_is_written(run, here, tmp_path):
    def contents():
        return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*")}

    arguments, checkpoints = [*AE, "--trainer.save_every", "2"], tmp_path / "run" / "checkpoints"
    done = here(*arguments, "--trainer.steps", "4", "--trainer.run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (checkpoints / ".unfinished.step_00000009").mkdir()
    before = contents()
    assert "the run resumes at step 4 of 5" in run(*arguments, "--trainer.steps", "5").out
    assert "all 4 steps are done" in run(*arguments, "--trainer.steps", "4").out
    other = [*arguments, "--trainer.seed", "1"]
    refused = run(*other)
    assert refused.code == 2
    assert "trainer.seed: 0 in the checkpoint, 1 now" in refused.err
    assert contents() == before
    assert here(*other, "--trainer.run_dir", tmp_path / "run").stderr.endswith(refused.err)

    (checkpoints / "step_00000004" / "decoder.safetensors").write_bytes(b"cut short")
    dry = run(*arguments, "--trainer.steps", "5").out
    assert "is damaged: decoder.safetensors does not match its checksum; the run would put it aside" in dry
    assert "the run resumes at step 2 of 5" in dry
    shutil.rmtree(checkpoints / "step_00000002")
    assert f"all checkpoints in {checkpoints} are damaged" in run(*arguments).err
    assert (checkpoints / "step_00000004").exists()


def test_a_folder_that_a_run_holds_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "WAIT", 0)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        lock.write("process 7 on a machine")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        dry = run(*AE)
        assert dry.code == 1, "it may be free later"
        assert "is being written by process 7 on a machine: stop that run" in dry.err
    assert "no checkpoint yet: the run starts at step 0 of 10,000" in run(*AE).out


def test_what_may_pass_is_told_apart_from_mistakes(run, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", ())
    down = run(*AE, "--data.train", "http://127.0.0.1:9/shards")
    assert (down.code, "data.train: cannot fetch http://127.0.0.1:9/shards/index.json: " in down.err) == (1, True)
    assert "Connect call failed" in down.err, "and not the URL again"
    assert run(*AE, "--data.train", f"file://{tmp_path}/nowhere").code == 2


def test_a_folder_that_no_run_could_write_is_named(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("trainer.run_folder.os.access", lambda path, mode: path != tmp_path)
        dry = run(*AE)
    assert (dry.code, f"{tmp_path}/run cannot be written: {tmp_path} is no folder" in dry.err) == (2, True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()

    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("trainer.run_folder.fcntl.flock", without_locks)
    dry = run(*AE)
    assert (dry.code, "cannot be locked (No locks available)" in dry.err) == (2, True)


def test_sizes_that_follow_from_shapes(report):
    made = report("2", "--system", "VAEGAN", "--trainer.ema_lengths", "[0.05, 0.1]", "--trainer.keep_every", "1000")
    sizes = {name: size for name, size, _ in made.memory()}
    system = made.config.system()
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in system.networks().items()}
    assert sizes["weights"] == sizes["gradients"] == sizes["copies"] == 4 * sum(count.values())
    assert sizes["averages"] == 3 * 4 * (count["encoder"] + count["decoder"])
    tensors = sum(1 for _ in system.parameters())
    # With each tensor's number of steps, the step's flag of failure, and each player's count of overflows.
    assert sizes["moments"] == 2 * 4 * sum(count.values()) + 4 * tensors + 8 + 2 * 4
    assert sizes["images"] == 4 * 32 * 32 * (1 + 4)
    assert sizes["all"] == sum(size for name, size in sizes.items() if name != "all")


def taken(report: Report) -> int:
    """Bytes at the peak of a real step, by the allocator's own count."""
    config, data, system = report.config, report.config.data, report.config.system()
    step = TrainStep(fake_accelerator(1, config.trainer.precision), system, 100, config.trainer.share_passes)
    step.player_states = [
        replace(player_state, player=replace(player_state.player, every=1, start=0))
        for player_state in step.player_states
    ]
    image = torch.rand(report.per_rank_batch, data.channels, data.size, data.size)
    parts = [slice(i, i + report.micro_batch) for i in range(0, report.per_rank_batch, report.micro_batch)]
    batches = [BusiestBatch((image[part],) * system.domains, part, report.per_rank_batch, 0, 2**40) for part in parts]
    step(batches, 0)  # makes the moments
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(batches, 1)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


@pytest.mark.parametrize(
    "arguments",
    [
        ["--system", "VAEGAN", "--system.binary.penalty_every", "16", "--system.binary.start", "7", *STRIDED],
        ["--system", "VAEGAN", "--trainer.micro_batch", "2", "--system.networks.norm", "group", *FEW],
        ["--system", "VAEGAN", "--trainer.precision", "bf16", "--system.networks.attention", "[16]", *FEW],
        ["--system", "GAN", "--trainer.share_passes", "false", *STRIDED],
    ],
    ids=lambda arguments: " ".join(arguments[1:4]),
)
def test_a_step_takes_what_was_estimated(report, arguments):
    made = report(*arguments, small=[] if "dcgan" in arguments else WIDE)
    peak, _ = made.run.peak(made.per_rank_batch, made.micro_batch)
    # Kernels take some more for a moment, which only they know.
    assert 0.85 < peak / taken(made) < 1.02


def test_weights_to_start_from_and_frozen_networks_are_shown(run, tiny_run):
    start = ["--trainer.init_from", tiny_run("VAE"), "--trainer.train_only", "decoder"]
    done = run("--system", "VAEGAN", *start, small=[])
    assert done.code == 0, done.err
    assert "weights that the run starts from" in done.out
    assert "loaded: encoder (" in done.out
    assert "missing, so drawn from the seed: discriminator_binary (" in done.out
    assert done.out.split("train_only leaves as they are\n")[1].split()[0] == "encoder"
    assert done.row("autoencoder")[1] == "decoder"


def test_gradients_in_buckets_do_not_count_twice(report):
    vae = ["--system", "VAE", "--system.networks.width", "64"]
    alone, ddp, flat = report(*vae).run, report("2", *vae).run, report("2", *vae, "--trainer.grad_sync", "flat").run
    moved = ddp.held["gradients"]
    assert (alone.held["gradients"], flat.held["gradients"]) == (0, 0)
    assert ddp.peak(8, 8)[0] <= alone.peak(8, 8)[0] <= ddp.peak(8, 8)[0] + moved
    assert flat.peak(4, 4)[0] >= 3 * moved  # gradients, one vector of them all, and their mean


def test_a_gpus_autocast_is_followed():
    """Types of all layers' outputs agree with torch's own rules for CUDA, which need no GPU in a forward pass."""
    settings = NetworkConfig("residual", 16, "group", 1, attention=(16,))

    def types(device: str) -> list[torch.dtype]:
        with torch.device(device):
            decoder, z = Decoder(settings, 32, 3, 8), torch.zeros(2, 8)
        found = []
        for module in decoder.modules():
            module.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
        decoder(z)
        return found

    with FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            real = types("cuda")
        finally:
            torch.set_autocast_enabled("cuda", False)
        with torch.autocast("cpu", torch.bfloat16):
            on_cpu = types("cpu")
            with CudaAutocast():
                assert types("cpu") == real
    assert on_cpu != real


def test_a_large_system_costs_no_memory(report):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = report("8", "--system", "VAE", "--trainer.batch_size", "512", "--system.networks.width", "512")
    _, size, _ = made.memory()[-1]
    assert size > 2e9
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 0.1 * size


def test_the_time_is_that_of_all_images_of_a_process(run):
    done = run(*AE, "--trainer.steps", "900", "--trainer.batch_size", "8", "--trainer.micro_batch", "4")
    assert "\ntime\n  about 1 h for all 900 steps, of 4 s, without reading images and evaluations\n" in done.out
    assert "measured in steps of 4 images by one process, and scaled to 8; " in done.out


@pytest.mark.parametrize(("micro_batch", "shares"), [("8", True), ("4", False)])
def test_passes_are_tried_as_the_run_makes_them(run, monkeypatch, micro_batch, shares):
    asked = []
    monkeypatch.setattr("trainer.dry_run.seconds_per_image", lambda *given: asked.append(given) or (0.5, 4))
    run(*AE, "--trainer.batch_size", "8", "--trainer.micro_batch", micro_batch)
    assert [given[1:] for given in asked] == [("cpu", int(micro_batch), shares)]


def test_nothing_is_tried_for_a_number_of_processes(run):
    assert "\ntime\n" not in run(*AE, "--dry_run", "2").out


def test_too_little_memory_for_a_trial_step_is_said_and_the_report_goes_on(run, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"
        )

    monkeypatch.setattr("trainer.dry_run.seconds_per_image", seconds_per_image)
    monkeypatch.setattr("trainer.step_time.Trial", full)
    done = run(*AE)
    message = "a step does not fit into the GPU's memory: CUDA out of memory. Tried to allocate 2.00 GiB. Lower"
    assert f"\ntime\n  {message}" in done.out
    assert "\ncheckpoints\n" in done.out
    assert done.code == 0


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        (0.1, [1, 1, 2, 2, 4, 4, 8, 8]),  # eight images take half a second or more
        (0.001, [size for size in (1, 2, 4, 8, 16, 32, 48) for _ in range(2)]),
        (1.0, [1, 1]),
    ],
)
def test_trial_steps_grow_until_one_takes_long(settings, monkeypatch, seconds, sizes):
    """Steps with R1, every second one here, take twice the time."""
    taken, clock = list[tuple[int, int]](), [0.0]

    class Step(TrainStep):
        def __call__(self, batches, step):
            (batch,) = batches
            assert batch.step == step
            taken.append((len(batch.image), step))
            # The first of a size is slow, and does not count.
            slow = 9 * ((len(batch.image), step) not in taken[:-1])
            clock[0] += (seconds * (1 + (step % 2 == 1)) * len(batch.image)) + slow

    monkeypatch.setattr("trainer.step_time.TrainStep", Step)
    monkeypatch.setattr("trainer.step_time.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    penalty = ["--system.binary.start", "8", "--system.binary.penalty_every", "2"]
    config = settings("--system", "VAEGAN", *penalty)
    found, size = seconds_per_image(config, "cpu", 48, True)
    grown, warm, measured = taken[: len(sizes)], taken[len(sizes) :][:2], taken[len(sizes) + 2 :]
    assert ([one for one, _ in grown], size) == (sizes, sizes[-1])
    assert {number for _, number in grown} == {8}
    assert sorted(warm) == [(size, 8), (size, 9)]
    assert {*measured} == {*warm}
    assert len(measured) == 2 * min(4, -(-5 // (3 * seconds * size)))
    assert found == pytest.approx(1.5 * seconds)


@pytest.mark.parametrize("system", ["CycleGAN", "VAEGAN"])
def test_trial_steps_are_taken(settings, digits, monkeypatch, system):
    """Of groups of eight images, of pools, with penalties."""
    monkeypatch.setattr("trainer.step_time.SECONDS", 0.0)
    both = [f'["{digits}/{part}", "{digits}/{part}"]' for part in ("train", "test")]
    arguments, small = {
        "CycleGAN": (["--system", system, "--data.train", both[0], "--data.test", both[1]], ["--system.width", "4"]),
        "VAEGAN": ([*VAEGAN, "--system.binary.minibatch_stddev", "8"], NETWORKS),
    }[system]
    seconds, size = seconds_per_image(settings(*arguments, small=small), "cpu", 8, True)
    assert seconds > 0
    assert size % (8 if system == "VAEGAN" else 1) == 0
