"""Whatever befalls a run, the same command takes it to the same weights, losses and scores; what is amiss is named."""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import wait_until
from test_run import alike, lines, weights

from trainer import run_folder
from trainer.checkpoint import files as checkpoint_files
from trainer.distributed.stop import EXIT_STOPPED

TERNARY = ["--system", "VAEGAN", "--system.discriminator", "ternary"]


def begun(run_dir: Path) -> bool:
    """Whether a whole line is logged."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_bytes().endswith(b"\n")


def word(run_dir: Path) -> str:
    return (run_dir / "state").read_text().strip()


def saved(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint_files.list_checkpoints(run_dir / "checkpoints")]


def same(one: Path, other: Path, logged: bool = True) -> None:
    """All tensors of the last checkpoint and, unless they log at other steps, all that was logged, to the bit."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not logged or lines(one) == lines(other)


@pytest.fixture(scope="module")
def scored(demo_cnn):
    return [
        *(*TERNARY, "--trainer.steps", "16", "--trainer.save_every", "3", "--evaluate.every", "6"),
        *(
            "--trainer.timeout",
            "15",
            "--evaluate.num",
            "64",
            "--evaluate.extractor",
            "demo-cnn",
            "--evaluate.weights",
            demo_cnn,
        ),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_twenty_kills_at_random_moments(ranks, scored, tmp_path, processes):
    """One rank is killed, or all are; each run that ends in spite of it equals one that was left alone."""
    workers = ["--data.workers", "1"] if processes == 1 else []  # they take each start's longest part
    run, chance, kills = [*scored, "--trainer.batch_size", "12", *workers], random.Random(processes), 20
    began = time.monotonic()
    whole = ranks(*run, "--trainer.run_dir", tmp_path / "whole", processes=processes).wait()
    assert whole.returncode == 0, whole.stderr
    whole_time, hit, ended = time.monotonic() - began, 0, 0
    while hit < kills or not ended:
        run_dir = tmp_path / f"hurt.{ended}"
        running = ranks(*run, "--trainer.run_dir", run_dir, processes=processes)
        if hit < kills:
            time.sleep(chance.uniform(0, whole_time))
            which = [chance.randrange(processes)] if chance.random() < 0.5 else range(processes)
            running(signal.SIGKILL, *which)
        done = running.wait()
        hit += -signal.SIGKILL in done.codes
        if done.returncode == 0:
            same(tmp_path / "whole", run_dir)
            assert word(run_dir) == "finished"
            shutil.rmtree(run_dir)
            ended += 1


SLOW_WRITES = """
import time
from trainer.checkpoint import writer
write = writer.write_pieces
writer.write_pieces = lambda *all, **how: (time.sleep(0.1), write(*all, **how))[1]
"""
SLOW_SCORES = """
import time
from trainer.evaluate import evaluator
score = evaluator.reconstruction_scores
evaluator.reconstruction_scores = lambda *all: (time.sleep(2), score(*all))[1]
"""


@pytest.mark.parametrize(
    ("fault", "moment", "processes"),
    [
        (SLOW_WRITES, lambda path: list(path.glob(".unfinished.step_00000006.*/*")), 2),
        (SLOW_SCORES, lambda path: (path / "step_00000006").exists(), 1),
    ],
    ids=["while saving", "while evaluating"],
)
def test_a_kill_while_saving_or_evaluating_costs_nothing(ranks, scored, tmp_path, fault, moment, processes):
    run = [*scored, "--trainer.steps", "8"]
    whole = ranks(*run, "--trainer.run_dir", tmp_path / "whole", processes=processes).wait()
    assert whole.returncode == 0, whole.stderr
    running = ranks(*run, "--trainer.run_dir", tmp_path / "hurt", faults={0: fault}, processes=processes)
    wait_until(lambda: moment(tmp_path / "hurt" / "checkpoints"))
    running(signal.SIGKILL)
    assert running.wait().codes == [-signal.SIGKILL] * processes
    assert saved(tmp_path / "hurt")[0] == (6 if fault is SLOW_SCORES else 3)
    assert not list((tmp_path / "hurt" / "checkpoints").glob("step_00000006/scores.json"))
    resumed = ranks(*run, "--trainer.run_dir", tmp_path / "hurt", processes=processes).wait()
    assert resumed.returncode == 0, resumed.stderr
    same(tmp_path / "whole", tmp_path / "hurt")


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """Where the run that nobody asks to leave is kept, once a test has made it."""
    return tmp_path_factory.mktemp("left_alone") / "run"


@pytest.mark.parametrize(
    ("sent", "to", "kill", "workers", "log_every"),
    [
        (signal.SIGUSR1, (1,), os.kill, 0, 1),
        (signal.SIGTERM, (0, 1), os.killpg, 1, 17),  # as SLURM and Ctrl-C do: the workers get it, too
        pytest.param(signal.SIGINT, (0,), os.kill, 0, 17, marks=pytest.mark.slow),
    ],
)
def test_asked_to_leave_all_save_at_one_step_and_go_on_to_the_same(
    ranks, left_alone, tmp_path, sent, to, kill, workers, log_every
):
    run = [*TERNARY, "--trainer.steps", "40", "--trainer.log_every", log_every]
    running = ranks(*run, "--trainer.run_dir", tmp_path / "left", "--data.workers", workers, processes=2)
    wait_until(lambda: begun(tmp_path / "left"))
    running(sent, *to, kill=kill)
    at = lines(tmp_path / "left")[-1]["step"]
    done = running.wait()
    assert done.codes == [EXIT_STOPPED, EXIT_STOPPED], done.stderr
    assert word(tmp_path / "left") == "stopped"
    (step,) = saved(tmp_path / "left")
    if log_every == 1:
        assert step == lines(tmp_path / "left")[-1]["step"] <= at + 4, "on its way, one to be asked in, one to answer"
    name = "Ctrl-C" if sent == signal.SIGINT else sent.name
    reason = name if 0 in to else "another process"
    assert f"Stopped by {reason} at step {step} of 40. Checkpoint saved" in done.stderr
    resumed = ranks(*run, "--trainer.run_dir", tmp_path / "left", processes=2).wait()
    assert (resumed.returncode, word(tmp_path / "left")) == (0, "finished")
    if not left_alone.exists():
        whole = ranks(*run, "--trainer.log_every", "17", "--trainer.run_dir", left_alone, processes=2).wait()
        assert whole.returncode == 0, whole.stderr
    same(left_alone, tmp_path / "left", logged=log_every == 17)


LEAVE_AFTER = """
import os, signal, threading
from trainer.distributed.stop import StopSignal
from trainer.step import TrainStep
noted, note = threading.Event(), StopSignal._note
StopSignal._note = lambda self, number: (note(self, number), noted.set())
step = TrainStep.__call__
def asked(self, batches, number):
    step(self, batches, number)
    if number == {}:
        os.kill(os.getpid(), signal.SIGTERM)
        noted.wait()
TrainStep.__call__ = asked
"""


def test_asked_to_leave_in_its_last_step_a_run_still_owes_its_scores(ranks, scored, tmp_path):
    run = [*scored, "--trainer.steps", "8", "--evaluate.every", "7", "--trainer.run_dir"]
    left = ranks(*run, tmp_path / "left", faults={0: LEAVE_AFTER.format(6)}).wait()
    assert (left.returncode, word(tmp_path / "left"), saved(tmp_path / "left")[0]) == (EXIT_STOPPED, "stopped", 8)
    assert not any("eval/fid64/demo-cnn-v1" in line for line in lines(tmp_path / "left") if line["step"] == 8)
    shutil.copytree(tmp_path / "left", tmp_path / "unscored")
    rest = ranks(*run, tmp_path / "left").wait()
    assert (rest.returncode, word(tmp_path / "left")) == (0, "finished")
    whole = ranks(*run, tmp_path / "whole").wait()
    assert whole.returncode == 0, whole.stderr
    same(tmp_path / "whole", tmp_path / "left")
    turned_off = ranks(*run, tmp_path / "unscored", "--evaluate.every", "0").wait()
    assert turned_off.returncode == 0, turned_off.stderr


def test_a_run_whose_steps_are_set_to_where_it_was_stopped_ends_as_one_of_so_many_steps(ranks, scored, tmp_path):
    run = [*scored, "--trainer.log_every", "4", "--evaluate.every", "4"]
    left = ranks(*run, "--trainer.run_dir", tmp_path / "left", faults={0: LEAVE_AFTER.format(3)}).wait()
    assert (left.returncode, saved(tmp_path / "left")[0]) == (EXIT_STOPPED, 5)
    for name in ("left", "whole"):
        done = ranks(*run, "--trainer.steps", "5", "--trainer.run_dir", tmp_path / name).wait()
        assert done.returncode == 0, done.stderr
    same(tmp_path / "whole", tmp_path / "left")
    assert (tmp_path / "left" / "samples" / "step_00000005.png").exists()


def test_a_refused_start_is_no_longer_what_it_was(here, tmp_path):
    """Or a job script that reads `state` would start it again and again."""
    run = [*TERNARY, "--trainer.run_dir", tmp_path, "--trainer.steps"]
    assert here(*run, "1").returncode == 0
    assert word(tmp_path) == "finished"
    assert here(*run, "2", "--trainer.seed", "1").returncode == 2
    assert word(tmp_path) == "failed"


def test_the_second_interrupt_leaves_at_once(ranks, tmp_path):
    sleep = "import time\nfrom trainer.checkpoint import writer\nwriter.save = lambda *all: time.sleep(99)"
    running = ranks(*TERNARY, "--trainer.run_dir", tmp_path / "run", faults={0: sleep})
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    running(signal.SIGINT)
    wait_until(lambda: "press Ctrl-C again" in running.output.read_text())
    running(signal.SIGINT)
    done = running.wait()
    assert done.returncode == 128 + signal.SIGINT
    assert "Exited at once" in done.stderr


def test_interrupts_are_heard_while_a_rank_waits_for_another(ranks, tmp_path):
    running = ranks(*TERNARY, "--trainer.run_dir", tmp_path, processes=2)
    wait_until((tmp_path / "metrics.jsonl").exists)
    running(signal.SIGSTOP, 1)
    time.sleep(1)
    running(signal.SIGINT, 0)
    wait_until(lambda: "press Ctrl-C again" in running.output.read_text())
    running(signal.SIGINT, 0)
    wait_until(lambda: gone(running.pids[0]), 20)
    running(signal.SIGKILL, 1)
    assert running.wait().codes == [128 + signal.SIGINT, -signal.SIGKILL]


def test_a_time_limit_is_kept(ranks, tmp_path):
    run = [*TERNARY, "--trainer.run_dir", tmp_path, "--trainer.steps", "1000000", "--trainer.time_limit", "0:06"]
    done = ranks(*run, processes=2).wait()
    assert done.codes == [EXIT_STOPPED, EXIT_STOPPED], done.stderr
    # Either process may be the first to come near the limit, and the main one alone speaks.
    assert re.search(
        r"Stopped by (trainer\.time_limit|another process) at step \d+ of 1000000\. Checkpoint saved", done.stderr
    )
    assert word(tmp_path) == "stopped"


@pytest.mark.parametrize("then", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_go_on_as_one_or_four(ranks, tmp_path, then):
    """Same samples, same noise, and weights that agree to the rounding of sums in another order."""
    run = [*TERNARY, "--trainer.steps", "8", "--trainer.micro_batch", "3"]
    whole = ranks(*run, "--trainer.run_dir", tmp_path / "whole", processes=2).wait()
    assert "8 images a step = 2 x 2 x 2" in whole.stderr
    first = ranks(*run, "--trainer.steps", "4", "--trainer.run_dir", tmp_path / "elastic", processes=2).wait()
    assert first.returncode == 0, first.stderr
    rest = ranks(*run, "--trainer.run_dir", tmp_path / "elastic", processes=then).wait()
    assert rest.returncode == 0, rest.stderr
    assert {1: "8 images a step = 1 x 4 x 2", 4: "8 images a step = 4 x 1 x 2"}[then] in rest.stderr
    assert alike(tmp_path / "whole", tmp_path / "elastic")
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "elastic"), strict=True):
        assert one["sample_checksum"] == other["sample_checksum"]
        assert one["autoencoder/reconstruction"] == pytest.approx(other["autoencoder/reconstruction"], rel=1e-4)


def test_one_run_at_a_time_writes_a_folder(ranks, here, tmp_path, monkeypatch):
    running = ranks(*TERNARY, "--trainer.run_dir", tmp_path)
    wait_until((tmp_path / "metrics.jsonl").exists)
    monkeypatch.setattr(run_folder, "WAIT", 1)
    second = here(*TERNARY, "--trainer.run_dir", tmp_path)
    assert second.returncode == 1, "it may be free later"
    assert f"trainer.run_dir {tmp_path} is being written by process {running.pids[0]} on" in second.stderr
    running(signal.SIGKILL)
    running.wait()
    assert word(tmp_path) == "running", "as it was left"
    third = here(*TERNARY, "--trainer.run_dir", tmp_path, "--trainer.steps", "1")
    assert third.returncode == 0, "the lock went with its holder"


@pytest.mark.parametrize(
    "name", [".lock", "config.yaml", "samples", "checkpoints/step_00000001", "events.out.tfevents"]
)
@pytest.mark.parametrize("dry", [False, True])
def test_nothing_is_written_through_a_link_in_a_strangers_run_folder(here, tmp_path, name, dry):
    mine, run_dir = tmp_path / "mine", tmp_path / "run"
    (run_dir / name).parent.mkdir(parents=True)
    if name in (".lock", "config.yaml", "events.out.tfevents"):
        mine.write_text("precious")
    else:
        mine.mkdir()
    (run_dir / name).symlink_to(mine)
    if dry:
        with pytest.raises(ValueError, match=f"{name} is a link, or another special file"):
            run_folder.RunFolder(run_dir).check_free()
    else:
        done = here("--system", "AE", "--trainer.run_dir", run_dir, "--trainer.steps", "1")
        assert done.returncode == 2
        assert f"error: {run_dir / name} is a link, or another special file" in done.stderr
    assert mine.read_text() == "precious" if mine.is_file() else not list(mine.iterdir())


def test_special_files_in_a_run_folder_are_refused_and_the_folder_may_be_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    with run_folder.RunFolder(tmp_path / "linked") as held:
        held.lock()
    (tmp_path / "run" / ".unfinished.export.7").mkdir()  # of an export that may go on
    (tmp_path / "run" / ".unfinished.state.7").touch()
    with run_folder.RunFolder(tmp_path / "run") as held:
        held.lock()
    assert [path.name for path in (tmp_path / "run").glob(".unfinished*")] == [".unfinished.export.7"]
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl is a link, or another special file"):
        run_folder.RunFolder(tmp_path / "linked").lock()


@pytest.mark.parametrize(
    ("sent", "rank", "named"),
    [
        pytest.param(signal.SIGKILL, 1, "process 1 on", marks=pytest.mark.slow),
        (signal.SIGKILL, 0, "process 0 on"),
        (signal.SIGSTOP, 1, "process 1 on"),
    ],
)
def test_a_dead_or_stalled_rank_is_named_and_ends_the_others(ranks, tmp_path, sent, rank, named):
    run = [*TERNARY, "--trainer.run_dir", tmp_path, "--trainer.timeout", "8", "--trainer.save_every", "5"]
    running = ranks(*run, processes=2)
    wait_until(lambda: (tmp_path / "checkpoints").exists() and saved(tmp_path))
    running(sent, rank)
    other = running.pids[1 - rank]
    wait_until(lambda: gone(other))
    running(signal.SIGKILL)
    done = running.wait()
    assert done.codes[1 - rank] == 1, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: step ")]
    assert f"step {re.search('step ([0-9]+)', told)[1]}: {named} " in told
    assert "is gone or stands still (trainer.timeout 8 s)" in told
    assert "Traceback" not in done.stderr
    assert word(tmp_path) == ("failed" if rank == 1 else "running")


def listening(pid: int) -> set[str]:
    """Addresses at which a process and its children wait for others."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    kinds = [process.net_connections("inet") for process in processes]
    return {one.laddr.ip for one in itertools.chain(*kinds) if one.status == psutil.CONN_LISTEN}


def test_processes_of_one_machine_listen_on_no_network(ranks, tmp_path):
    running = ranks(*TERNARY, "--trainer.run_dir", tmp_path, processes=2)
    wait_until(lambda: begun(tmp_path))
    found = [listening(pid) for pid in running.pids]
    running(signal.SIGKILL)
    running.wait()
    assert found == [{"127.0.0.1"}] * 2


@pytest.mark.parametrize("processes", [2, 3])
def test_a_rank_whose_weights_went_astray_is_named(ranks, tmp_path, processes):
    """The sign of a weight flips, after the third step on the last process."""
    flip = """
from trainer.step import TrainStep
step = TrainStep.__call__
def flipping(self, batches, number):
    step(self, batches, number)
    if number == 2 and self.player_states[0].optimizer.state:
        self.system.decoder.module.stem.bias.data.view(-1)[:1].mul_(-1)
TrainStep.__call__ = flipping
"""
    run = [*TERNARY, "--trainer.run_dir", tmp_path, "--trainer.batch_size", "12", "--trainer.check_every", "6"]
    done = ranks(*run, processes=processes, faults={processes - 1: flip}).wait()
    assert done.returncode == 1
    than = {2: "the others, and no majority says which are right", 3: "most"}[processes]
    assert re.search(
        rf"step 6: process {processes - 1 if processes > 2 else '.'} on \S+ has other weights in", done.stderr
    )
    assert f"than {than}. Memory or a device" in done.stderr
    assert not saved(tmp_path)


ELSEWHERE = """
import torch
from trainer.config.parser import Config
system = Config.system
def elsewhere(self):
    made = system(self)
    for name, value in made.state_dict().items():
        value.add_(torch.ones_like(value))
    return made
Config.system = elsewhere
"""


@pytest.mark.parametrize("way", [pytest.param("ddp", marks=pytest.mark.slow), "flat"])
def test_ranks_begin_with_the_weights_of_the_first(ranks, tmp_path, way):
    """Unlike processors draw weights that differ in their last digits; here one rank's are other altogether."""
    run = [*TERNARY, "--system.ternary.lecam_weight", "0.1", "--system.ternary.spectral_norm", "true"]
    run += ["--trainer.steps", "2", "--trainer.check_every", "1", "--trainer.grad_sync", way, "--trainer.run_dir"]
    for name, faults in (("whole", {}), ("hurt", {1: ELSEWHERE})):
        done = ranks(*run, tmp_path / name, processes=2, faults=faults).wait()
        assert done.codes == [0, 0], done.stderr
    same(tmp_path / "whole", tmp_path / "hurt")


def test_a_statistic_that_went_astray_is_named(ranks, tmp_path):
    change = """
from trainer.step import TrainStep
step = TrainStep.__call__
def changing(self, batches, number):
    step(self, batches, number)
    self.system.lecam_discriminator_ternary.add_(1)
TrainStep.__call__ = changing
"""
    run = [*TERNARY, "--system.ternary.lecam_weight", "1e-30", "--trainer.steps", "2", "--trainer.check_every", "1"]
    done = ranks(*run, "--trainer.run_dir", tmp_path, processes=2, faults={1: change}).wait()
    assert done.codes == [1, 1]
    assert re.search(r"step 1: process \d on \S+ has other weights in the statistic lecam_\w+ than", done.stderr)


def test_unlike_processors_are_told_where_weights_drift_apart(ranks, tmp_path):
    flip = """
from trainer.distributed import ranks
from trainer.step import TrainStep
ranks._processor = lambda device: "AVX1024"
step = TrainStep.__call__
def flipping(self, batches, number):
    step(self, batches, number)
    self.system.get_submodule("decoder.module").stem.bias.data.view(-1)[:1].add_(1)
TrainStep.__call__ = flipping
"""
    run = [*TERNARY, "--trainer.run_dir", tmp_path, "--trainer.steps", "1"]
    done = ranks(*run, processes=2, faults={1: flip}).wait()
    assert done.codes == [1, 1]
    assert re.search(
        r"Unlike processors round differently \(.* on process 0 on \S+, AVX1024 on process 1 on", done.stderr
    )
    assert "ATEN_CPU_CAPABILITY=default on all" in done.stderr
    assert "Memory" not in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_averages_whose_images_are_not_finite_have_diverged(ranks, tmp_path, processes):
    """Every loss and gradient is finite, and the averaged decoder's weights are, but not what they make."""
    far = """
from trainer.ema import EMA
update = EMA.update
def far(self, steps):
    update(self, steps)
    if steps == 2:
        self.system.decoder.stem.weight.data.fill_(3e38)
EMA.update = far
"""
    run = [*TERNARY, "--trainer.run_dir", tmp_path, "--trainer.save_every", "1", "--trainer.steps", "3"]
    done = ranks(*run, processes=processes, faults=dict.fromkeys(range(processes), far)).wait()
    assert done.codes == [1] * processes
    assert done.stderr.count("error: step 2: the averaged networks' images cannot be used: ") == 1
    assert "pixels are not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert (word(tmp_path), saved(tmp_path)) == ("diverged", [1])


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("import trainer.build\ntrainer.build.code_checksum = lambda: 'other'", "differ in code: "),
        ("arguments += ['--system.autoencoder.lr', '0.5']", "differ in system.autoencoder.lr: "),
    ],
)
def test_ranks_with_other_code_or_settings_are_named(ranks, tmp_path, fault, named):
    done = ranks(*TERNARY, "--trainer.run_dir", tmp_path, processes=2, faults={1: fault}).wait()
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.fixture
def temporary():
    """A folder whose name is short enough for the sockets in it; `tmp_path`'s may not be."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def own_folder_for_temporary(path: Path) -> str:
    """A fault that has a rank keep its temporary files there."""
    return f"import tempfile\ntempfile.tempdir = '{path}'\n"


def left_behind(session: int) -> list[int]:
    """Processes that a rank, or a process of its, has started and that are still there."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and not gone(process.pid):
                found.append(process.pid)
    return found


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_unexpected_error_ends_all_processes_and_their_workers(ranks, tmp_path, temporary, processes):
    boom = """
from trainer.step import TrainStep
def boom(self, batches, number):
    raise KeyError("boom")
TrainStep.__call__ = boom
"""
    boom = own_folder_for_temporary(temporary) + boom
    run = [*TERNARY, "--trainer.grad_sync", "flat", "--trainer.run_dir", tmp_path / "run", "--data.workers", "1"]
    running = ranks(*run, processes=processes, faults={0: boom, 1: "arguments += ['--data.workers', '0']"})
    done = running.wait()
    assert done.codes == [1] * processes, done.stderr
    assert done.stderr.count("KeyError: 'boom'") == done.stderr.count("Traceback") == 1
    assert processes == 1 or "error: step 1: " in done.stderr
    assert word(tmp_path / "run") == "failed"
    wait_until(lambda: not any(map(left_behind, running.pids)))
    assert not list(temporary.iterdir())


def test_a_process_that_ends_in_pythons_own_way_does_not_wait_for_its_workers(ranks, temporary):
    """They block the signal by which multiprocessing asks them to end."""
    leaving = """
import atexit, os, time
from data.processes import PROCESSES, prepare_workers
prepare_workers()
PROCESSES.Process(target=time.sleep, args=(999,), daemon=True).start()
atexit._run_exitfuncs()
os._exit(7)
"""
    leaving = own_folder_for_temporary(temporary) + leaving
    running = ranks(faults={0: leaving})
    wait_until(lambda: gone(running.pids[0]), 60)
    done = running.wait()
    assert (done.codes, done.stderr) == ([7], "")
    assert not list(temporary.iterdir())


def test_a_small_shared_memory_is_named(ranks, tmp_path):
    """Of 64 kB, in which no batch of 64 images fits."""
    small = """
import ctypes, os
libc, NEW_MOUNTS, PRIVATE = ctypes.CDLL(None), 0x20000, 0x44000
private = not libc.unshare(NEW_MOUNTS) and not libc.mount(b"", b"/", b"", PRIVATE, b"")
if not private or libc.mount(b"", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
    os._exit(99)
"""
    run = [*TERNARY, "--trainer.run_dir", tmp_path, "--data.workers", "1", "--trainer.batch_size", "64"]
    done = ranks(*run, faults={0: small}).wait()
    if done.returncode == 99:
        pytest.skip("mounting a small /dev/shm needs root")
    assert (done.returncode, word(tmp_path)) == (1, "failed")
    assert "error: step 1: /dev/shm, through which workers send images, is too small or full" in done.stderr
    assert "Traceback" not in done.stderr


def test_signals_that_come_before_the_run_has_begun_are_noted(ranks, tmp_path):
    early = """
import os, signal
from trainer.distributed.stop import listen_early
listen_early()
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = ranks(*TERNARY, "--trainer.run_dir", tmp_path, faults={0: early}).wait()
    assert (done.returncode, word(tmp_path), saved(tmp_path)) == (EXIT_STOPPED, "stopped", [1]), done.stderr
    assert "Stopped by SIGTERM at step 1 of 10000. Checkpoint saved; run the same command to resume" in done.stderr


@pytest.fixture
def launched(command, tmp_path):
    """Start the real launcher with two ranks; it writes to tmp_path/output."""
    processes = []

    def start(*arguments, **options) -> subprocess.Popen:
        with open(tmp_path / "output", "w") as output:
            options = command(*arguments, processes=2, **options) | {"stdout": output, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen(**options, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def rank_of(run_dir: Path, rank: int) -> int:
    """The pid of a rank that a launcher started for a run folder."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (path / "environ").read_text().split("\0")
            if f"RANK={rank}" in environment and str(run_dir) in (path / "cmdline").read_text():
                return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_ranks_die_with_their_launcher_and_have_saved(launched, tmp_path):
    run_dir = tmp_path / "run"
    launcher = launched(*TERNARY, "--trainer.run_dir", run_dir, "--data.workers", "1", "--trainer.log_every", "1")
    wait_until((run_dir / "metrics.jsonl").exists)
    ranks = [rank_of(run_dir, 0), rank_of(run_dir, 1)]
    assert [listening(pid) for pid in ranks] == [{"127.0.0.1"}] * 2
    family = [child.pid for rank in ranks for child in psutil.Process(rank).children(recursive=True)]
    assert family, "workers that read ahead"
    launcher.kill()
    wait_until(lambda: all(map(gone, (*ranks, *family))), 60)
    assert word(run_dir) == "stopped"
    (step,) = saved(run_dir)
    assert step == lines(run_dir)[-1]["step"]


def test_a_rank_dies_with_a_launcher_that_dies_as_it_starts(launched, tmp_path):
    launcher = launched(*TERNARY, "--trainer.run_dir", tmp_path / "run")
    wait_until(lambda: psutil.Process(launcher.pid).children(recursive=True))
    ranks = [child.pid for child in psutil.Process(launcher.pid).children(recursive=True)]
    time.sleep(0.3)
    launcher.kill()
    wait_until(lambda: all(map(gone, ranks)), 30)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "kills"), [(1, 1), (0, 2)])
def test_a_killed_rank_is_restarted_by_the_launcher(launched, ranks, tmp_path, rank, kills):
    run = [*TERNARY, "--trainer.steps", "160", "--trainer.save_every", "20", "--trainer.run_dir"]
    hurt = tmp_path / "hurt"
    launcher = launched(*run, hurt, launch=["--max_restarts", str(kills)])
    for past in range(kills):
        wait_until(lambda past=past: (hurt / "checkpoints").exists() and max(saved(hurt), default=0) > 40 * past)
        os.kill(rank_of(hurt, rank), signal.SIGKILL)
    assert launcher.wait(120) == 0, (tmp_path / "output").read_text()
    assert (tmp_path / "output").read_text().count("Resuming at step") == kills
    assert word(hurt) == "finished"
    whole = ranks(*run, tmp_path / "whole", processes=2).wait()
    assert whole.returncode == 0, whole.stderr
    same(tmp_path / "whole", hurt)
