"""Checkpoints are whole or not there, are found damaged when they are, and the best and the newest are kept."""

import json
import os
import pickle
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import BOARD, reseal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
from models import manifest as manifests
from trainer import files
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint import state as checkpoint_state
from trainer.checkpoint import writer
from trainer.log.logger import RunLogger


def tensors(value: float) -> checkpoint_files.Tensors:
    return {"encoder": {"weight": torch.full((1000,), value)}, "optimizer.a": {"weight.step": torch.tensor(value)}}


def save(folder, step, fid=None):
    path = writer.save(folder, step, tensors(step), {"evaluation_pending": fid is not None})
    if fid is not None:
        score(path, fid)
    return path


def score(path, fid, **evaluation):
    scores = {"eval/fid2k/demo-cnn-v1": fid, "eval/is2k/demo-cnn-v1": 1.0}
    found = {"scores": scores, "evaluation": {"held_out": "a"} | evaluation}
    files.write_atomically(path / "scores.json", json.dumps(found))


def test_round_trip(tmp_path):
    path = save(tmp_path, 12, 3.5)
    assert path.name == "step_00000012"
    loaded, manifest = checkpoint_files.load(path)
    assert manifest["step"] == 12
    assert checkpoint_files.read_scores(path)[0]["eval/fid2k/demo-cnn-v1"] == 3.5
    assert loaded.keys() == tensors(12).keys()
    assert torch.equal(loaded["encoder"]["weight"], tensors(12)["encoder"]["weight"])


def test_the_bytes_do_not_depend_on_the_order_of_tensors(tmp_path):
    content = {"b.step": torch.tensor(1.0), "a.exp_avg": torch.ones(3), "c": torch.ones(2, dtype=torch.float64)}
    whole = {}
    for name, names in ("forward", [*content]), ("backward", [*content][::-1]):
        tensors = {"optimizer.a": {key: content[key] for key in names}}
        whole[name] = writer.save(tmp_path / name, 1, tensors, {}) / "optimizer.a.safetensors"
    assert whole["forward"].read_bytes() == whole["backward"].read_bytes()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "another setting"])
def test_damage_is_found(tmp_path, damage):
    path = save(tmp_path, 1)
    file = path / ("manifest.json" if damage == "manifest" else "encoder.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "another setting":
        manifest = path / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"evaluation_pending": false', '"evaluation_pending": true'))
    else:
        content[-20] ^= 1
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint_files.load(path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, fid in [(1, 9.0), (2, 1.0), (3, 4.0), (4, None), (5, 2.0)]:
        save(tmp_path, step, fid)
        writer.rotate(tmp_path, 2)
    assert [path.name[-1] for path in checkpoint_files.list_checkpoints(tmp_path)] == ["5", "4", "2"]


def test_scores_measured_in_another_way_do_not_compete(tmp_path):
    save(tmp_path, 1, 5.0)
    score(save(tmp_path, 2), 1.0, held_out="b")
    for step in (3, 4):
        save(tmp_path, step)
        writer.rotate(tmp_path, 1)
    assert [path.name[-1] for path in checkpoint_files.list_checkpoints(tmp_path)] == ["4", "2", "1"]


@pytest.mark.parametrize(("judged_by", "best"), [("fid", 2), ("rfid", 1), (None, 2)])
def test_the_best_is_the_one_by_the_score_that_judges_the_run(judged_by, best):
    """The tokenizer's samples are best at step 2 and its reconstructions at step 1; an older version named no judge."""
    how = {"held_out": "a"} | ({"judged_by": judged_by} if judged_by else {})
    scored = {1: (9.0, 1.0), 2: (5.0, 3.0), 3: (7.0, 2.0)}
    scores = {step: ({"eval/fid2k/x": fid, "eval/rfid359/x": rfid}, how) for step, (fid, rfid) in scored.items()}
    assert writer.kept_steps(scores, 1, None) == {best, 3}


@pytest.mark.parametrize("found", [None, 4])
def test_a_checkpoint_of_another_format_is_refused_and_stays(tmp_path, found):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"], manifest["format"]
    (path / "manifest.json").write_bytes(manifests.sealed({"format": found, **manifest} if found else manifest))
    for read in (checkpoint_files.load_newest, checkpoint_files.verify_newest):
        with pytest.raises(ValueError, match=rf"step_00000002: it has format {found or 2}, .* reads format 3"):
            read(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot be loaded: it has format {found or 2}, .* reads format 3"):
        models.load(path)
    assert len(checkpoint_files.list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("file", ["encoder.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_neither_counts_nor_stays_in_the_way(tmp_path, file, capsys):
    for step in (1, 2):
        save(tmp_path, step, 9.0)
    (tmp_path / "step_00000002" / file).write_bytes(b"")
    _, manifest = checkpoint_files.load_newest(tmp_path)
    assert manifest["step"] == 1
    assert "put aside as damaged.step_00000002" in capsys.readouterr().err
    save(tmp_path, 2)
    writer.rotate(tmp_path, 1)
    assert [path.name[-1] for path in checkpoint_files.list_checkpoints(tmp_path)] == ["2", "1"]
    for path in checkpoint_files.list_checkpoints(tmp_path):
        (path / file).write_bytes(b"")
    for _ in range(2):  # or the second start would begin anew
        with pytest.raises(ValueError, match=r"all checkpoints .* are damaged"):
            checkpoint_files.load_newest(tmp_path)
    assert checkpoint_files.load_newest(tmp_path / "fresh") is None


def test_every_so_manieth_checkpoint_is_kept_for_good(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step)
        writer.rotate(tmp_path, 1, keep_every=3)
    assert [path.name[-1] for path in checkpoint_files.list_checkpoints(tmp_path)] == ["8", "6", "3"]


def test_saving_takes_a_copy_and_returns_before_it_is_written(tmp_path, monkeypatch):
    free, write = threading.Event(), writer.write_pieces
    monkeypatch.setattr(writer, "write_pieces", lambda *all, **how: (free.wait(), write(*all, **how))[1])
    saver = writer.Saver(tmp_path, 1, None, print)
    content = tensors(1.0)
    saver.save(1, content, {})
    content["encoder"]["weight"].fill_(2.0)
    assert not checkpoint_files.list_checkpoints(tmp_path)
    free.set()
    saver.score(1, {"eval/fid2k": 3.0}, {"held_out": "a"})
    (path,) = checkpoint_files.list_checkpoints(tmp_path)
    assert checkpoint_files.load(path)[0]["encoder"]["weight"].eq(1).all()
    assert checkpoint_files.read_scores(path) == ({"eval/fid2k": 3.0}, {"held_out": "a"})


def test_a_save_that_fails_for_a_while_is_tried_again_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.time, "sleep", lambda seconds: None)
    told, left, write = [], [3], writer.write_pieces

    def failing(*all, **how):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        return write(*all, **how)

    monkeypatch.setattr(writer, "write_pieces", failing)
    saver = writer.Saver(tmp_path, 1, None, told.append)
    saver.save(1, tensors(1), {})
    saver.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert len(told) == 3
    assert "step 1: the checkpoint could not be saved and is tried again" in told[0]
    left[0] = 10**9
    saver.save(2, tensors(2), {})
    with pytest.raises(OSError, match="No space left"):
        saver.save(3, tensors(3), {})
    assert len(told) >= 3 + writer.TRIES - 1
    saver.finish()  # told once


def test_a_disk_that_cannot_be_read_is_not_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def stale(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(OSError, match="Stale"):
        checkpoint_files.load_newest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_an_old_checkpoint_that_cannot_be_removed_costs_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    told, rename = [], Path.rename

    def busy(path, target):
        if path.name == "step_00000001":
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    saver = writer.Saver(tmp_path, 1, None, told.append)
    saver.save(2, tensors(2), {})
    saver.finish()
    assert [path.name[-1] for path in checkpoint_files.list_checkpoints(tmp_path)] == ["2", "1"]
    assert told == ["an old checkpoint could not be removed yet: [Errno 16] Device or resource busy"]


def test_a_bug_while_saving_is_not_lost(tmp_path):
    saver = writer.Saver(tmp_path, 1, None, print)
    saver.save(1, tensors(1), {"not for JSON": object()})
    with pytest.raises(TypeError):
        saver.finish()


def test_too_little_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=4000))
    with pytest.raises(OSError, match=r"No space left on device: it takes 8,008 bytes, 4,000 are free"):
        save(tmp_path, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", writer.DTYPES)
def test_files_are_those_of_the_safetensors_library(tmp_path, dtype):
    content = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.ones((), dtype=torch.float64).to(dtype)}
    content |= {"c": torch.zeros(3), "d": torch.arange(6.0).reshape(2, 3).T, "e": torch.zeros(0, 2, dtype=dtype)}
    path = writer.save(tmp_path, 1, {"x": content}, {})
    loaded = safetensors.torch.load_file(path / "x.safetensors")
    assert loaded.keys() == content.keys()
    assert all(torch.equal(loaded[key], value) and loaded[key].dtype == value.dtype for key, value in content.items())


def test_a_hostile_file_is_only_damaged(tmp_path):
    """A pickle that would run code, with a checksum that is right."""

    class Hostile:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    path = save(tmp_path, 1)
    (path / "encoder.safetensors").write_bytes(pickle.dumps({"weight": Hostile()}))
    reseal(path)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint_files.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, *content, pause=None):
        path.write_bytes(content[0][:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_pieces", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_optimizer_state_goes_by_name():
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(3)) for name in ("a.weight", "b.bias")}

    def optimizer_of(parameters):
        return torch.optim.AdamW(parameters, fused=True)

    first = optimizer_of(weights.values())
    for parameter in weights.values():
        parameter.grad = torch.randn(3)
    first.step()
    saved = checkpoint_state.optimizer_tensors(weights, first)
    assert "a.weight.exp_avg" in saved
    second = optimizer_of(reversed(weights.values()))  # another order of parameters
    checkpoint_state.load_optimizer(weights, second, saved)
    for parameter in weights.values():
        for key, value in first.state[parameter].items():
            assert torch.equal(value, second.state[parameter][key])


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root: " + mounted.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_takes_nobodys_word(ranks, small_disk):
    """What TensorBoard's thread cannot write, each point at once here, is told without a traceback of its own."""
    filling = f"""
import os
from trainer.checkpoint import writer as saving
from trainer.log import board
from trainer.step import TrainStep
saving.TRIES = 2
writer, step, disk = board.SummaryWriter, TrainStep.__call__, "{small_disk}"
board.SummaryWriter = lambda *all, **named: writer(*all, **named, flush_secs=0)
def filling(self, batches, number):
    step(self, batches, number)
    if number == 3:
        with open(disk + "/filler", "wb") as file:
            file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
TrainStep.__call__ = filling
"""
    run = ["--system", "AE", "--trainer.run_dir", small_disk / "run", "--trainer.save_every", "20", *BOARD]
    done = ranks(*run, "--trainer.log_every", "1", faults={0: filling}).wait()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for told in ("error: step 20: the checkpoint could not be saved: No space", "TensorBoard's curves cannot be"):
        assert done.stderr.count(told) == 1, done.stderr
    assert (small_disk / "run" / "state").read_text() == "failed\n"


def fill(disk, but=0):
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(b"\0" * (free - but))


def test_a_full_disk_leaves_the_last_checkpoint_intact(small_disk):
    save(small_disk, 1)
    (small_disk / "filler").write_bytes(b"\0" * 2_900_000)
    big = {"encoder": {"weight": torch.zeros(100_000)}}
    with pytest.raises(OSError, match="No space left"):
        writer.save(small_disk, 2, big, {})
    assert [path.name for path in checkpoint_files.list_checkpoints(small_disk)] == ["step_00000001"]
    assert not list(small_disk.glob(".unfinished*"))
    checkpoint_files.load(small_disk / "step_00000001")


def test_a_run_on_a_full_disk_stops_with_a_message_and_resumes_when_there_is_room(here, small_disk, monkeypatch):
    arguments = ["--system", "AE", "--trainer.run_dir", small_disk / "run", "--trainer.save_every", "2"]
    probe = here(*arguments, "--trainer.steps", "2")
    assert probe.returncode == 0, probe.stderr
    fill(small_disk, but=40_000)
    monkeypatch.setattr(writer, "TRIES", 2)
    full = here(*arguments, "--trainer.steps", "6")
    assert full.returncode == 1
    assert "step 4: the checkpoint could not be saved: No space left on device" in full.stderr
    assert [path.name for path in checkpoint_files.list_checkpoints(small_disk / "run" / "checkpoints")] == [
        "step_00000002"
    ]
    (small_disk / "filler").unlink()
    again = here(*arguments, "--trainer.steps", "6", "--trainer.keep", "1")
    assert again.returncode == 0, again.stderr
    assert "Resuming at step 2" in again.stderr


def test_what_is_recorded_while_a_disk_is_full_is_there_when_it_has_room_again(small_disk, capsys):
    run_logger = RunLogger(small_disk, 0, 9, is_main=True)
    for step in range(1, 9):
        if step == 3:
            fill(small_disk)
        if step == 6:
            with pytest.raises(OSError, match="No space left"):
                run_logger.flush()
            (small_disk / "filler").unlink()
            run_logger.flush()
        run_logger.scalars(step, {"a/b": step / 2}, facts="x" * 5000)
        time.sleep(0.05)  # TensorBoard's thread
    run_logger.flush()
    run_logger.close()
    written = [json.loads(line) for line in (small_disk / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == list(range(1, 9))
    shown = EventAccumulator(str(small_disk)).Reload().Scalars("a/b")
    assert [(event.step, event.value) for event in shown] == [(step, step / 2) for step in range(1, 9)]
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written in") == 1
