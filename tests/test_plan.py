"""--dry_run: what it tells is what the run does and takes, and nothing is written."""

import fcntl
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import NETWORKS, ROOT, SMALL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from models.networks import Decoder, NetworkConfig
from trainer.config.parser import configure
from trainer.memory import Busiest, OnGPU, _Alone
from trainer.plan import Plan, dry_run
from trainer.step import TrainStep

OTHERS = ["--system", "VAEGAN", "--system.discriminator", "both", "--system.adaptive", "true"]
OTHERS += ["--system.binary.lecam_weight", "1", "--system.ternary.spectral_norm", "true"]


@pytest.fixture
def settings(digits):
    return ["--data.train", str(digits / "train"), "--data.test", str(digits / "test"), *SMALL]


@pytest.fixture
def tell(settings, capsys, tmp_path):
    """Give a dry run's arguments, get what it says and how it ends."""

    def run(*arguments, small=NETWORKS) -> SimpleNamespace:
        capsys.readouterr()
        given = [*settings, *small, "--trainer.run_dir", tmp_path / "run", "--dry_run", *arguments]
        try:
            code = dry_run(configure([*map(str, given)]))
        except SystemExit as stopped:
            code = stopped.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture
def plan(settings, tmp_path):
    def made(*arguments, small=NETWORKS) -> Plan:
        given = [*settings, *small, "--trainer.run_dir", tmp_path / "run", "--dry_run", *arguments]
        return Plan(configure([*map(str, given)]))

    return made


def row(text: str, name: str) -> list[str]:
    """The words of the first line that begins with a name."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


# ---- the argument


@pytest.mark.parametrize(
    ("words", "processes"), [(["--dry_run"], 0), (["--dry_run", "4"], 4), (["--dry_run=4"], 4), ([], None)]
)
def test_it_is_no_setting_and_may_stand_anywhere(words, processes):
    recipe = ["--config", str(ROOT / "launch" / "recipes" / "digits-vae.yaml")]
    rest = ["--trainer.steps", "9"]
    plain = configure([*recipe, *rest]).yaml()
    for arguments in ([*words, *recipe, *rest], [*recipe, *words, "--system=VAE", *rest], [*rest, *recipe, *words]):
        config = configure(arguments)
        assert config.dry_run == processes
        assert config.yaml() == plain


def test_its_mistakes_are_named(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("{system: AE, data: {train: x}, dry_run: 3}")
    for arguments, words in (
        (
            ["--system", "AE", "--data.train", "x", "--dry_run", "0"],
            "--dry_run must be a number of processes, at least 1; got '0'",
        ),
        (
            ["--system", "AE", "--data.train", "x", "--dry_run", "many"],
            "--dry_run must be a number of processes, at least 1; got 'many'",
        ),
        (["--config", str(tmp_path / "mine.yaml")], "--dry_run is an option of the command line"),
    ):
        with pytest.raises(SystemExit, match="2"):
            configure(arguments)
        assert words in capsys.readouterr().err


def test_the_door_leads_to_it(forked, settings):
    argv = ["main.py", "--system", "AE", "--dry_run", *map(str, settings), *NETWORKS]
    main = str(ROOT / "trainer" / "main.py")
    done = forked(f"import runpy, sys\nsys.argv = {argv!r}\nrunpy.run_path({main!r}, run_name='__main__')").wait()
    assert done.returncode == 0, done.stderr
    assert "\nplayers, in the order of their moves\n" in done.stderr


@pytest.mark.slow
def test_the_program_tells_once_for_all_processes_and_ends_well(main, tmp_path):
    done = main("--system", "AE", "--trainer.run_dir", tmp_path / "run", "--dry_run", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 images a step = 2 processes x 1 micro-batch x 4") == 1
    assert not (tmp_path / "run").exists()


def test_other_processes_are_silent(tell, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = tell("--system", "AE")
    assert (told.code, told.out, told.err) == (0, "", "")


# ---- what the run does


def test_it_says_what_the_run_says_of_itself(tell, here, tmp_path):
    """Configuration, weights, images and batch, beside what the run announces."""
    run = [*OTHERS, "--trainer.steps", "1", "--trainer.micro_batch", "3"]
    told = tell(*run)
    assert told.code == 0, told.err
    done = here(*run, "--trainer.run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    configuration = told.out.partition("configuration\n")[2].partition("\n\nnetworks")[0]
    assert [line.removeprefix("  ") for line in configuration.splitlines()] == (
        (tmp_path / "run" / "config.yaml").read_text().splitlines()
    )
    for network in ("encoder", "decoder", "discriminator_binary", "discriminator_ternary"):
        assert f"{network} {row(told.out, network)[1]} weights" in done.stderr
    assert row(told.out, "data.train")[1:4] == ["1", "1,438", "2.95"]
    assert row(told.out, "data.train")[7:9] == ["0.0056", "179"]
    assert "1,438 training images, 179 steps an epoch" in done.stderr
    assert "8 images a step = 1 process x 4 micro-batches x 2" in told.out
    assert "8 images a step = 1 x 4 x 2" in done.stderr
    assert "1 steps = 8 images = 0.0056 epochs" in told.out


def test_players_are_told_with_their_rules(tell):
    autoencoder = ["--system.autoencoder.schedule", "cosine", "--system.autoencoder.hold", "0.5"]
    autoencoder += ["--system.autoencoder.warmup", "1000", "--system.autoencoder.clip", "2"]
    binary = ["--system.binary.every", "2", "--system.binary.start", "30", "--system.binary.lr", "1e-5"]
    told = tell("--system", "VAEGAN", *autoencoder, *binary, "--system.binary.algorithm", "adam")
    lines = [" ".join(line.split()) for line in told.out.splitlines()]
    weights = {name: row(told.out, name)[1].replace(",", "") for name in ("encoder", "decoder", "discriminator_binary")}
    moved = int(weights["encoder"]) + int(weights["decoder"])
    judge = f"{int(weights['discriminator_binary']):,}"
    assert f"binary discriminator_binary {judge} adam 1e-05 constant every 2 steps from 30 on" in lines
    rate = "0.0002 rises for 1,000, cosine from 5,000 on, to 0%"
    assert f"autoencoder encoder, decoder {moved:,} adamw {rate} every step 2" in lines


def test_the_order_of_a_large_set_and_shards_elsewhere(tell, digits, tmp_path):
    told = tell("--system", "AE", "--data.window", "300", "--data.lanes", "4")
    assert " ".join(row(told.out, "data.train")[-7:]) == "4 lanes, shuffled in 5 blocks each"
    assert " ".join(row(tell("--system", "AE").out, "data.train")[-4:]) == "the whole set shuffled"
    shards = [{"url": f"s3://bucket/{i}.tar", "nsamples": 100, "filesize": 2_000_000} for i in range(3)]
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": shards}))
    told = tell("--system", "AE", "--data.train", tmp_path / "index.json", "--data.cache", tmp_path / "cache")
    assert row(told.out, "data.train")[1:6] == ["3", "300", "6", "MB", "remote"]
    assert f"cache: {tmp_path / 'cache'}, up to 50 GB on each machine" in told.out


def test_a_number_of_processes_that_does_not_fit_is_refused_with_those_that_do(tell, monkeypatch):
    told = tell("3", "--system", "AE")
    assert (told.code, told.out) == (2, "")
    assert "batch_size 8 cannot be dealt evenly to 3 processes" in told.err
    assert "(1, 2, 4, 8)" in told.err
    grouped = ["--system", "GAN", "--system.binary.minibatch_stddev", "4"]
    assert "minibatch_stddev 4 does not divide" in tell("4", *grouped).err
    assert "2 processes x 1 micro-batch x 4" in tell("2", *grouped).out
    assert "other numbers of processes that fit: 1\n" in tell("2", *grouped).out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "4 processes x 1 micro-batch x 2" in tell("--system", "AE").out


def test_mistakes_are_told_as_by_the_run(tell, here, tmp_path):
    for mistake in (
        ["--system", "CycleGAN"],
        ["--system", "AE", "--trainer.batch_size", "2000"],
        ["--system", "AE", "--data.train", tmp_path / "nowhere"],
        ["--system", "AE", "--trainer.precision", "fp16"],
        ["--system", "AE", "--trainer.time_limit", "soon"],
        ["--system", "AE", "--evaluate.every", "1", "--evaluate.extractor", "demo-random", "--evaluate.weights", "x"],
        ["--system", "AE", "--evaluate.every", "1", "--evaluate.extractor", "resnet"],
        ["--system", "AE", "--evaluate.every", "1", "--evaluate.extractor", "file"],
    ):
        small = [] if "CycleGAN" in mistake else NETWORKS
        told = tell(*mistake, small=small)
        done = here(*mistake, "--trainer.run_dir", tmp_path / "run", small=small)
        assert (told.code, done.returncode) == (2, 2), (mistake, told, done)
        assert told.err.splitlines()[0] in done.stderr.splitlines()


def test_evaluation_needs_held_out_images_and_downloads_nothing(tell, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    told = tell("--system", "GAN", "--evaluate.every", "3", "--evaluate.num", "77", "--trainer.steps", "10")
    assert "every 3 steps and after the last: 4 times" in told.out
    assert "77 samples and 359 held-out images, by inception: " in told.out
    assert "which the run downloads first" in told.out
    assert not (tmp_path / "torch").exists()
    config = configure(["--data.train", str(digits / "train"), "--system", "AE", *NETWORKS, "--data.channels", "1"])
    with pytest.raises(ValueError, match=r"data\.test is not set"):
        Plan(replace(config, dry_run=0)).evaluation()


def test_precision_is_that_of_the_place(plan, tell, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert (plan("--system", "AE").settings.precision, plan("2", "--system", "AE").settings.precision) == ("no", "bf16")
    assert plan("2", "--system", "AE", "--trainer.precision", "fp16").device == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert plan("2", "--system", "AE").settings.precision == "no"
    assert (
        "fp16, which a CPU would silently train in fp32"
        in tell("2", "--system", "AE", "--trainer.precision", "fp16").err
    )


# ---- the run's folder


def test_a_run_that_is_there_goes_on_or_is_refused_and_nothing_is_written(tell, here, tmp_path):
    run = ["--system", "AE", "--trainer.save_every", "2"]
    done = here(*run, "--trainer.steps", "4", "--trainer.run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".unfinished.step_00000009").mkdir()
    before = contents(tmp_path)
    assert "the run goes on at step 4 of 5" in tell(*run, "--trainer.steps", "5").out
    assert "all 4 steps are done" in tell(*run, "--trainer.steps", "4").out
    other = [*run, "--trainer.seed", "1"]
    told = tell(*other)
    assert told.code == 2
    assert "trainer.seed: 0 in the checkpoint, 1 now" in told.err
    assert contents(tmp_path) == before
    assert here(*other, "--trainer.run_dir", tmp_path / "run").stderr.endswith(told.err)

    (checkpoints / "step_00000004" / "decoder.safetensors").write_bytes(b"cut short")
    before = contents(tmp_path)
    told = tell(*run, "--trainer.steps", "5").out
    assert "step_00000004 is damaged: decoder.safetensors does not match its checksum: it would be put aside" in told
    assert "the run goes on at step 2 of 5" in told
    shutil.rmtree(checkpoints / "step_00000002")
    assert f"all checkpoints in {checkpoints} are damaged" in tell(*run).err
    assert (checkpoints / "step_00000004").exists()


def test_a_folder_that_a_run_holds_is_named(tell, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        lock.write("process 7 on a machine")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = tell("--system", "AE")
        assert told.code == 2
        assert "is being written by process 7 on a machine: stop that run" in told.err
    assert "no checkpoint yet: the run starts at step 0 of 10,000" in tell("--system", "AE").out


# ---- what it takes


@pytest.mark.parametrize("system", ["CycleGAN", "VAEGAN", "GANVAE"])
def test_a_checkpoint_is_as_large_as_told(plan, here, digits, tmp_path, system):
    both = [f'["{digits}/{part}", "{digits}/{part}"]' for part in ("train", "test")]
    run, small = {
        "CycleGAN": (
            ["--system", "CycleGAN", "--data.train", both[0], "--data.test", both[1]],
            ["--system.width", "4"],
        ),
        "VAEGAN": (OTHERS, NETWORKS),
        "GANVAE": (["--system", "GANVAE"], NETWORKS),
    }[system]
    expected = plan(*run, small=small).checkpoint()
    done = here(*run, "--trainer.steps", "1", "--trainer.run_dir", tmp_path / "run", small=small)
    assert done.returncode == 0, done.stderr
    files = (tmp_path / "run" / "checkpoints" / "step_00000001").iterdir()
    assert expected == pytest.approx(sum(file.stat().st_size for file in files), rel=0.02)


def test_sizes_that_follow_from_shapes(plan):
    small = ["--system.networks.family", "dcgan", "--system.networks.width", "8", "--system.latent_dim", "4"]
    made = plan("2", "--system", "VAEGAN", small=small)
    sizes = {name: size for name, size, _ in made.memory_rows()}
    count = {
        name: sum(p.numel() for p in network.parameters()) for name, network in made.config.system().networks().items()
    }
    averaged = count["encoder"] + count["decoder"]
    assert sizes["weights"] == sizes["gradients"] == 4 * sum(count.values())
    assert sizes["averages"] == 4 * averaged
    tensors = sum(1 for _ in made.config.system().parameters())
    assert sizes["moments"] == 2 * 4 * sum(count.values()) + 4 * tensors  # and each one's number of steps
    assert sizes["images"] == 4 * 32 * 32 * (1 + 4)
    assert sizes["copies"] == sizes["weights"]
    assert sizes["all"] == sum(size for name, size in sizes.items() if name != "all")


def taken(plan: Plan) -> int:
    """Bytes at the highest moment of a real step, by the allocator's own count."""
    config, data = plan.config, plan.data
    system = config.system()
    step = TrainStep(_Alone(1, config.trainer.precision, "cpu"), system, 100, config.trainer.share_passes)
    step.movers = [replace(mover, player=replace(mover.player, every=1, start=0)) for mover in step.movers]
    image = torch.rand(plan.share, data.channels, data.size, data.size)
    parts = [slice(i, i + plan.micro) for i in range(0, plan.share, plan.micro)]
    batches = [Busiest((image[part],) * system.domains, part, config.trainer.batch_size, 0, 2**40) for part in parts]
    step(batches, 0)  # makes the moments
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(batches, 1)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


WIDE = ["--system.networks.width", "16", "--system.networks.blocks", "1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--system", "VAEGAN", "--system.binary.penalty_every", "16", "--system.binary.start", "7"],
        ["--system", "VAEGAN", "--trainer.micro_batch", "4", "--system.networks.norm", "group"],
        ["--system", "VAEGAN", "--trainer.precision", "bf16", "--system.networks.attention", "[16]"],
        ["--system", "GAN", "--trainer.share_passes", "false"],
    ],
    ids=lambda arguments: " ".join(arguments[1:4]),
)
def test_a_step_takes_what_was_rehearsed(plan, arguments):
    made = plan(*arguments, small=WIDE)
    peak = made.rehearsal.peak(made.share, made.micro, apart=False)
    # Kernels take some more for a moment, which only they know.
    assert 0.85 < (peak.gradients + peak.activations) / taken(made) < 1.02


def test_gradients_in_buckets_do_not_count_twice(plan):
    made = plan("--system", "VAE", small=[*NETWORKS, "--system.networks.width", "64"])
    within, apart = (made.rehearsal.peak(made.share, made.micro, apart) for apart in (False, True))
    assert apart.gradients == 0
    assert apart.activations <= within.activations + within.gradients
    assert within.activations + within.gradients <= apart.activations + made.rehearsal.moved()
    flat = plan(
        "2", "--system", "VAE", "--trainer.grad_sync", "flat", small=[*NETWORKS, "--system.networks.width", "64"]
    )
    peak = flat.rehearsal.peak(flat.share, flat.micro, apart=False)
    assert peak.gradients == flat.rehearsal.moved()
    assert peak.activations >= 2 * flat.rehearsal.moved()  # one vector of all gradients, and their mean


def test_a_gpus_autocast_is_followed(monkeypatch):
    """Types of all layers' outputs, beside those by torch's own rules for CUDA, which need no GPU in a forward pass."""
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
            with OnGPU():
                assert types("cpu") == real
    assert on_cpu != real


def test_a_large_system_costs_no_memory(plan):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = plan(
        "8", "--system", "VAE", "--trainer.batch_size", "512", small=[*NETWORKS, "--system.networks.width", "512"]
    )
    (*_, (_, size, _)) = made.memory_rows()
    assert size > 2e9
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 0.1 * size
