"""Checkpoints are whole or not there, are found damaged when they are, and the best and the newest are kept."""

import json
import os
import subprocess

import pytest
import torch

from trainer import checkpoint


def tensors(value: float) -> checkpoint.Tensors:
    return {"encoder": {"weight": torch.full((1000,), value)}, "optimizer.a": {"weight.step": torch.tensor(value)}}


def save(folder, step, fid=None):
    path = checkpoint.save(folder, step, tensors(step), {"owes": fid is not None})
    if fid is not None:
        score(path, fid)
    return path


def score(path, fid, **evaluation):
    scores = {"eval/fid2k/demo-cnn-v1": fid, "eval/is2k/demo-cnn-v1": 1.0}
    found = {"scores": scores, "evaluation": {"held_out": "a"} | evaluation}
    checkpoint.replace(path / "scores.json", json.dumps(found))


def test_round_trip(tmp_path):
    path = save(tmp_path, 12, 3.5)
    assert path.name == "step_00000012"
    loaded, manifest = checkpoint.load(path)
    assert manifest["step"] == 12
    assert checkpoint.scores_of(path)[0]["eval/fid2k/demo-cnn-v1"] == 3.5
    assert loaded.keys() == tensors(12).keys()
    assert torch.equal(loaded["encoder"]["weight"], tensors(12)["encoder"]["weight"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_found(tmp_path, damage):
    path = save(tmp_path, 1)
    file = path / ("manifest.json" if damage == "manifest" else "encoder.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[-20] ^= 1
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, fid in [(1, 9.0), (2, 1.0), (3, 4.0), (4, None), (5, 2.0)]:
        save(tmp_path, step, fid)
        checkpoint.rotate(tmp_path, 2)
    assert [path.name[-1] for path in checkpoint.newest(tmp_path)] == ["5", "4", "2"]


def test_scores_measured_in_another_way_do_not_compete(tmp_path):
    save(tmp_path, 1, 5.0)
    score(save(tmp_path, 2), 1.0, held_out="b")
    for step in (3, 4):
        save(tmp_path, step)
        checkpoint.rotate(tmp_path, 1)
    assert [path.name[-1] for path in checkpoint.newest(tmp_path)] == ["4", "2", "1"]


@pytest.mark.parametrize("file", ["encoder.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_neither_counts_nor_stays_in_the_way(tmp_path, file, capsys):
    for step in (1, 2):
        save(tmp_path, step, 9.0)
    (tmp_path / "step_00000002" / file).write_bytes(b"")
    _, manifest = checkpoint.load_newest(tmp_path)
    assert manifest["step"] == 1
    assert "put aside as damaged.step_00000002" in capsys.readouterr().err
    save(tmp_path, 2)
    checkpoint.rotate(tmp_path, 1)
    assert [path.name[-1] for path in checkpoint.newest(tmp_path)] == ["2", "1"]
    for path in checkpoint.newest(tmp_path):
        (path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=r"all checkpoints .* are damaged"):
        checkpoint.load_newest(tmp_path)
    assert checkpoint.load_newest(tmp_path / "fresh") is None


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, *content):
        path.write_bytes(content[0][:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
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
    saved = checkpoint.optimizer_tensors(weights, first)
    assert "a.weight.exp_avg" in saved
    second = optimizer_of(reversed(weights.values()))  # another order of parameters
    checkpoint.load_optimizer(weights, second, saved)
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


def test_a_full_disk_leaves_the_last_checkpoint_intact(small_disk):
    save(small_disk, 1)
    (small_disk / "filler").write_bytes(b"\0" * 2_900_000)
    big = {"encoder": {"weight": torch.zeros(100_000)}}
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(small_disk, 2, big, {})
    assert [path.name for path in checkpoint.newest(small_disk)] == ["step_00000001"]
    assert not list(small_disk.glob(".unfinished*"))
    checkpoint.load(small_disk / "step_00000001")


def test_a_run_on_a_full_disk_stops_with_a_message_and_resumes_when_there_is_room(here, small_disk, monkeypatch):
    arguments = ["--system", "AE", "--trainer.run_dir", small_disk / "run", "--trainer.save_every", "2"]
    probe = here(*arguments, "--trainer.steps", "2")
    assert probe.returncode == 0, probe.stderr
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(b"\0" * (free - 40_000))
    monkeypatch.setattr(checkpoint, "TRIES", 2)
    full = here(*arguments, "--trainer.steps", "6")
    assert full.returncode == 1
    assert "step 4: the checkpoint could not be saved: No space left on device" in full.stderr
    assert [path.name for path in checkpoint.newest(small_disk / "run" / "checkpoints")] == ["step_00000002"]
    (small_disk / "filler").unlink()
    again = here(*arguments, "--trainer.steps", "6", "--trainer.keep", "1")
    assert again.returncode == 0, again.stderr
    assert "going on at step 2" in again.stderr
