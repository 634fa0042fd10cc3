"""A run folder at a URL: what is there is whole at any moment, and a run goes on from it on another machine."""

import json
import shutil
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, wait_until
from test_checkpoint import save, score
from test_run import lines, weights

from trainer.checkpoint import files as checkpoint_files
from trainer.errors import RunError
from trainer.evaluate.command import main as evaluate
from trainer.export.command import main as export
from trainer.generate.command import main as generate
from trainer.remote_run import RemoteRun
from trainer.report.command import main as report
from trainer.run_place import is_run

RUN = ["--system", "GAN", "--trainer.save_every", "3", "--trainer.steps", "8", "--trainer.trackers", "[tensorboard]"]
SCORED = ["--evaluate.every", "4", "--evaluate.num", "32", "--evaluate.extractor", "demo-random"]


@pytest.fixture
def remote(tmp_path):
    """A run's copier to a folder of this machine: `remote("here")` works in tmp_path / "here"."""
    return lambda name, **options: RemoteRun(
        f"file://{tmp_path}/there", tmp_path / name, **{"keep": 2, "keep_every": None} | options
    )


def steps(folder) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


class LostError(Exception):
    """The machine is lost."""


def lost_after(left: list[int], work):
    def change(*arguments, **options):
        if not left[0]:
            raise LostError
        left[0] -= 1
        return work(*arguments, **options)

    return change


def test_whenever_a_machine_is_lost_the_newest_checkpoint_with_a_manifest_is_whole(remote, tmp_path, monkeypatch):
    """The machine is lost before each change of the URL in turn."""
    checkpoints, there = tmp_path / "here" / "checkpoints", tmp_path / "there"
    for step in (1, 2):
        save(checkpoints, step)
        remote("here").push()
    (there / "checkpoints" / "step_00000000").mkdir()
    (there / "checkpoints" / "step_00000000" / "encoder.safetensors").write_text("left by a lost machine")
    shutil.copytree(there, tmp_path / "before")
    save(checkpoints, 3)
    (tmp_path / "here" / "metrics.jsonl").write_text("a line\n")
    found = {}
    for changes in range(20):
        shutil.rmtree(there)
        shutil.copytree(tmp_path / "before", there)
        here, left = remote("here"), [changes]
        for name in ("put_file", "rm_file", "rm"):
            monkeypatch.setattr(here.files, name, lost_after(left, getattr(here.files, name)))
        try:
            here.push()
            ended = True
        except OSError as error:
            ended = not isinstance(error.__cause__, LostError)
        monkeypatch.undo()
        name = f"other {changes}"
        remote(name).fetch()
        (found[changes],) = steps(tmp_path / name)
        loaded = checkpoint_files.load_newest(tmp_path / name / "checkpoints")
        assert loaded[1]["step"] == found[changes], "it is not damaged"
        assert (tmp_path / name / "metrics.jsonl").exists() or found[changes] == 2, "the log comes first"
        if ended:
            break
    # The log, two files and a manifest of step 3; then the rest of step 0, the manifest of step 1, and the rest of it.
    assert found == {0: 2, 1: 2, 2: 2, 3: 2, 4: 3, 5: 3, 6: 3, 7: 3}
    assert steps(there) == [2, 3]


def test_a_machine_that_is_lost_while_it_fetches_keeps_the_log(remote, tmp_path, monkeypatch):
    """It is lost before each file in turn, and its disk stays; the next start must not take a part for the whole."""
    save(tmp_path / "here" / "checkpoints", 1)
    (tmp_path / "here" / "metrics.jsonl").write_text("a line\n")
    remote("here").push()
    for changes in range(5):
        other, left = remote(f"other {changes}"), [changes]
        monkeypatch.setattr(other.files, "get_file", lost_after(left, other.files.get_file))
        with pytest.raises(OSError, match="cannot be read") if changes < 4 else nullcontext():
            other.fetch()
        monkeypatch.undo()
        for work in (other.fetch, other.push):
            work()
        assert (tmp_path / f"other {changes}" / "metrics.jsonl").read_text() == "a line\n"
        assert checkpoint_files.load_newest(tmp_path / f"other {changes}" / "checkpoints")[1]["step"] == 1


def test_the_url_keeps_what_a_folder_would_keep(remote, tmp_path):
    here, checkpoints = remote("here", keep_every=4), tmp_path / "here" / "checkpoints"
    for step, fid in {1: 9.0, 2: 5.0, 3: 7.0, 4: 8.0, 5: 6.0}.items():
        save(checkpoints, step, fid)
        here.push()
    assert steps(tmp_path / "there") == [2, 4, 5]
    # Another machine has the newest alone, and yet keeps the best at the URL; a score that comes later counts.
    other = remote("other", keep_every=4)
    other.fetch(alone=True)
    assert steps(tmp_path / "other") == [5]
    for step in (6, 7):
        save(tmp_path / "other" / "checkpoints", step)
        other.push()
    assert steps(tmp_path / "there") == [2, 4, 6, 7]
    score(tmp_path / "other" / "checkpoints" / "step_00000007", 4.0)
    save(tmp_path / "other" / "checkpoints", 9)
    other.push()
    assert steps(tmp_path / "there") == [4, 7, 9]
    remote("other").fetch(alone=True)
    assert steps(tmp_path / "other") == [5, 6, 7, 9], "what is here already is not fetched"
    save(tmp_path / "behind" / "checkpoints", 8)
    remote("behind").fetch(alone=True)
    assert steps(tmp_path / "behind") == [9]
    save(tmp_path / "ahead" / "checkpoints", 10)
    remote("ahead").fetch(alone=True)
    assert steps(tmp_path / "ahead") == [9], "the main process resumes from this one"


def test_a_run_that_another_has_overtaken_stops(remote, tmp_path):
    for name, step in {"here": 2, "other": 3}.items():
        save(tmp_path / name / "checkpoints", step)
    remote("other").push()
    with pytest.raises(
        RunError, match=r"trainer.run_dir file://.*/there has a checkpoint of step 3, and this run has none"
    ):
        remote("here").push()


def test_what_does_not_belong_there_is_neither_copied_nor_fetched(remote, tmp_path, monkeypatch):
    save(tmp_path / "here" / "checkpoints", 1)
    for name in ("config.yaml", ".lock", "checkpoints/damaged.step_00000001", "checkpoints/.unfinished.x"):
        (tmp_path / "here" / name).write_text("credentials")
    remote("here").push()
    left = {path.name for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert left == {"manifest.json", "encoder.safetensors", "optimizer.a.safetensors"}
    copier = remote("other")
    names = ("checkpoints/step_00000001/manifest.json", "../../hidden", "a/../../../hidden", "/escaped")
    monkeypatch.setattr(copier.files, "find", lambda root: [f"{root}/{name}" for name in names])
    with pytest.raises(OSError, match=r"holds /escaped, which no run has written"):
        copier.fetch()
    assert not list(tmp_path.parent.rglob("hidden"))


def test_an_unknown_kind_of_url_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^trainer.run_dir nowhere://a cannot be opened: .*nowhere"):
        RemoteRun("nowhere://a", tmp_path, 2, None)


def test_a_url_that_cannot_be_written_stops_a_run_only_at_its_end(remote, tmp_path, monkeypatch):
    here, told = remote("here"), []
    save(tmp_path / "here" / "checkpoints", 1)
    with monkeypatch.context() as patch:
        patch.setattr(here.files, "put_file", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
        here.push_behind(told.append)
        with pytest.raises(OSError, match="cannot be written: no"):
            here.push()
    assert told == [
        f"trainer.run_dir file://{tmp_path}/there cannot be written: no. The run goes on, and its next save tries again"
    ]
    here.push_behind(told.append)
    assert (len(told), steps(tmp_path / "there")) == (1, [1])


def test_a_run_goes_on_from_its_url_on_another_machine(here, tmp_path):
    whole = here(*RUN, "--trainer.run_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    url = ["--trainer.run_dir", f"file://{tmp_path}/there"]
    first = here(*RUN, *url, "--trainer.steps", "5", "--trainer.scratch", tmp_path / "one")
    assert first.returncode == 0, first.stderr
    second = here(*RUN, *url, "--trainer.scratch", tmp_path / "two")
    assert second.returncode == 0, second.stderr
    assert f"Resuming at step 5 of 8 in file://{tmp_path}/there" in second.stderr
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "there")
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert (tmp_path / "there" / "state").read_text() == "finished\n"
    assert len(list((tmp_path / "there").glob("events.out.tfevents.*"))) == 2
    assert {path.name for path in (tmp_path / "there" / "samples").iterdir()} >= {
        f"step_0000000{i}.png" for i in (3, 5, 6, 8)
    }
    # The scratch folder of the first machine is behind now.
    assert "scratch: " in (tmp_path / "there" / "config.yaml").read_text()
    third = here(*RUN, *url, "--trainer.scratch", tmp_path / "one")
    assert third.returncode == 0, third.stderr
    (one,) = (tmp_path / "one").iterdir()
    assert lines(one) == lines(tmp_path / "there")
    assert here(*RUN, *url, "--trainer.scratch", tmp_path / "one", "--trainer.seed", "1").returncode == 2
    assert (tmp_path / "there" / "state").read_text() == "failed\n", "for a job script that would start it again"


def test_a_run_is_not_finished_before_its_url_has_it(here, tmp_path, monkeypatch):
    run = [*RUN, "--trainer.steps", "3", "--trainer.run_dir", f"file://{tmp_path}/there", "--trainer.scratch"]
    push = RemoteRun.push

    def fail_at_the_end(remote):
        if 3 in steps(remote.folder):
            raise ConnectionError("the storage is down")
        push(remote)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteRun, "push", fail_at_the_end)
        cut = here(*run, tmp_path / "scratch")
    assert (cut.returncode, "the storage is down" in cut.stderr) == (1, True)
    (scratch,) = (tmp_path / "scratch").iterdir()
    assert (scratch / "state").read_text() == "failed\n", "a job script tries again"
    assert here(*run, tmp_path / "scratch").returncode == 0
    assert (tmp_path / "there" / "state").read_text() == "finished\n"


def test_a_run_that_goes_on_without_its_url_says_so(remote, tmp_path, capsys):
    save(tmp_path / "here" / "checkpoints", 7)
    remote("here").fetch()
    assert f"holds no checkpoint: the run goes on from step 7 of {tmp_path}/here" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_while_it_copies_to_s3(s3, command, main, tmp_path):
    """`kill -9` as soon as the first file of a checkpoint is in the bucket; then the machine's disk is gone."""
    s3.mkdir("runs")
    whole = main(*RUN, *SCORED, "--trainer.run_dir", tmp_path / "whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    run = [*RUN, *SCORED, "--trainer.run_dir", "s3://runs/a/b", "--trainer.scratch", tmp_path / "scratch"]
    for step in (3, 6):
        with subprocess.Popen(**command(*run, processes=2), cwd=ROOT) as process:
            wait_until(lambda s=step: s3.exists(f"s3://runs/a/b/checkpoints/step_{s:08d}"))
            ranks = psutil.Process(process.pid).children(recursive=True)
            for one in (process, *ranks):
                one.kill()
        psutil.wait_procs(ranks)
        shutil.rmtree(tmp_path / "scratch")
    done = main(*run, processes=2)
    assert done.returncode == 0, done.stderr
    assert "Resuming at step" in done.stderr
    s3.get("s3://runs/a/b", str(tmp_path / "got"), recursive=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "got")
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    for name, place in (("bucket", "s3://runs/a/b"), ("disk", tmp_path / "got")):
        generate(["sample", str(place), "--out", str(tmp_path / name), "--num", "2"])
        report([str(place), "--out", str(tmp_path / f"{name}.html")])
    assert contents(tmp_path / "bucket") == contents(tmp_path / "disk") != {}
    assert "step 8 of 8, finished" in (tmp_path / "bucket.html").read_text()


@pytest.fixture
def at_url(tiny_run, remote, tmp_path, monkeypatch):
    """A run, the URL of its copy, and the list of the files that are fetched from there."""
    run = shutil.copytree(tiny_run("VAEGAN"), tmp_path / "here")
    remote("here").push()
    shutil.copy(run / "config.yaml", tmp_path / "there")
    fetched, fetch = list[str](), RemoteRun._fetch_file
    monkeypatch.setattr(RemoteRun, "_fetch_file", lambda *call: (fetched.append(call[1]), fetch(*call)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    for name in ("scratch", "working"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "working")
    yield run, f"file://{tmp_path}/there", fetched
    assert not [*(tmp_path / "scratch").iterdir()], "nothing stays on this machine"


def test_commands_read_a_run_at_its_url_as_its_folder_and_what_they_need_alone(at_url, capsys):
    run, url, fetched = at_url
    report([url])
    assert "step 3 of 3, finished" in Path("report.html").read_text()
    assert {*fetched} == {"config.yaml", "metrics.jsonl", "state", "samples/step_00000003.png"}
    fetched.clear()
    for out, place in (("a", url), ("b", f"{url}/checkpoints/step_00000003/"), ("c", run)):
        generate(["sample", str(place), "--out", out, "--num", "2"])
        assert Path(out, "000001.png").read_bytes() == Path("a", "000001.png").read_bytes()
    said = capsys.readouterr().out
    assert f"by step_00000003 of {url}\n" in said
    assert f"by {run}/checkpoints/step_00000003\n" in said
    kept = {path.name for path in (run / "checkpoints" / "step_00000003").iterdir()}
    assert fetched.count("config.yaml") == 2
    assert {*fetched} == {"config.yaml"} | {f"checkpoints/step_00000003/{name}" for name in kept}


@pytest.mark.slow
def test_evaluations_and_exports_of_a_run_at_its_url_name_the_url(at_url, digits, capsys):
    run, url, _ = at_url
    for out, place in (("url", url), ("folder", str(run))):
        export([place, out, "--num", "0", "--full"])
        evaluate([place, "--against", str(digits / "test"), "--extractor", "demo-random", "--num", "2", "--json"])
    said = capsys.readouterr()
    assert f"python -m trainer.evaluate {url}`" in said.err
    first, second = (json.loads(line) for line in said.out.splitlines() if line.startswith("{"))
    assert first["checkpoint"] == url
    assert {key for key in first if first[key] != second[key]} <= {"checkpoint", "eval/seconds"}
    assert said.out.count("no inception score (is): demo-random-v1 is no classifier") == 2
    assert contents(Path("url")) == contents(Path("folder"))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]  # it has the title
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_url_without_a_run_or_a_checkpoint_is_named(remote, tmp_path, capsys):
    save(tmp_path / "here" / "checkpoints", 1)
    remote("here").push()
    url = f"file://{tmp_path}/there"
    for command, place, words in (
        (generate, f"{url}/no", f"RUN {url}/no holds no checkpoint: expected the URL of a run"),
        (generate, f"{url}/checkpoints/step_00000002", f"RUN {url} holds no whole checkpoint of step 2"),
        (generate, "nowhere://a/b", "RUN nowhere://a/b cannot be opened: "),
        (report, url, f"RUN {url} holds no log: expected the URL of a run"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command([*(["sample"] * (command is generate)), place, "--out", str(tmp_path / "out")])
        assert f"error: {words}" in capsys.readouterr().err


def test_a_url_may_be_of_a_run_or_of_images(at_url, digits):
    _, url, _ = at_url
    assert is_run(url)
    assert is_run(f"{url}/checkpoints/step_00000003")
    assert not is_run(f"file://{digits}/test")
    assert not is_run("https://example.invalid/{000..009}.tar")
