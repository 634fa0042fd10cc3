"""python -m trainer.encode: latents of a data set, in any world, with kills, and for other programs."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from accelerate.state import AcceleratorState
from sample_images import corrupt

import models
from data.dataset import Spread, read_dataset
from data.inspect.__main__ import describe
from data.inspect.verify import inspect
from data.latents import unpack
from data.loader import read
from data.shards.reader import Shards, write
from trainer.encode.command import main
from trainer.latents import LatentEncoder

N, PER_SHARD = 130, 40  # images, in shards of which one is not full, in blocks of 64
RUN = "from trainer.encode.command import main\nmain({arguments})"
# Ends the process at once while it writes the second shard.
KILL = """
import os
from trainer.encode.writer import LatentWriter
write, calls = LatentWriter._write, []
def kill(self, writer, *rest):
    write(self, writer, *rest)
    calls.append(writer)
    if len(calls) == 2:
        os.kill(os.getpid(), 9)
LatentWriter._write = kill
"""


@pytest.fixture(scope="module")
def photos(digits, tmp_path_factory) -> Path:
    """Labelled shards with captions, and one image without a label."""
    source, folder = Shards(digits / "test"), tmp_path_factory.mktemp("encode") / "photos"
    contents, labels = source.images(np.arange(N))
    samples = (
        {"__key__": f"of/{i:03d}", "png": content, "txt": f"number {i}", **({"cls": str(label)} if i else {})}
        for i, (content, label) in enumerate(zip(contents, labels.tolist(), strict=True))
    )
    write(folder / "train", samples, PER_SHARD)
    return folder / "train"


@pytest.fixture
def encode(capsys):
    """Run the command in this process."""

    def run(*arguments) -> SimpleNamespace:
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        try:
            main([*map(str, arguments), "--workers", "0"])
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, out=said.out, err=said.err)

    return run


@pytest.fixture
def run(tiny_run) -> Path:
    return tiny_run("VAE")


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def whole(encode, run, photos, kept, tmp_path_factory) -> Path:
    """The latents of the photos, by one process."""
    if not kept:
        kept["whole"] = tmp_path_factory.mktemp("latents") / "whole"
        done = encode(run, photos, kept["whole"])
        assert done.returncode == 0, done.err
        assert f"train: {N} latents [4]" in done.out
    return kept["whole"]


def codes(run: Path, photos: Path, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """By hand: means and log-variances of all photos."""
    pixels = read(Shards(photos), np.arange(N), 32, 1).image
    return LatentEncoder(models.load(run), 32, 1, "cpu")(pixels.flip(-1) if mirrored else pixels)


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the index, which has times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "index" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_webdataset_reads_the_same_samples_with_latents(whole, run, photos):
    urls = [str(path) for path in sorted((whole / "train").glob("*.tar"))]
    assert len(urls) == 4
    assert {path.suffix for path in whole.rglob("*") if path.is_file()} == {".tar", ".npy", ".json"}, "and no lock"
    kind = webdataset.handle_extension("safetensors", safetensors.torch.load)
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode(kind))
    mean, log_variance = codes(run, photos)
    for i, sample in enumerate(samples):
        assert (sample["__key__"], sample["txt"]) == (f"of/{i:03d}", f"number {i}")
        assert sample["safetensors"].keys() == {"mean", "log_variance"}
        assert torch.equal(sample["safetensors"]["mean"], mean[i].half())
        assert torch.equal(sample["safetensors"]["log_variance"], log_variance[i].half())
    ours, theirs = Shards(whole / "train"), Shards(photos)
    assert [sample.get("cls", -1) for sample in samples] == theirs.labels.tolist() == ours.labels.tolist()
    assert torch.equal(unpack(ours.image(77))["mean"], mean[77].half())


def test_dataset_json_has_what_the_next_model_needs(whole, run):
    found = read_dataset(whole)
    latents = found.splits["train"].latents
    shards = Shards(whole / "train")
    each = [unpack(content) for content in shards.images(np.arange(N))[0]]
    mean, log_variance = (
        torch.stack([one[name] for one in each]).double().numpy() for name in ("mean", "log_variance")
    )
    variance = np.exp(log_variance)
    assert (latents.images, latents.of) == (N, "draws")
    assert latents.latents_mean == pytest.approx(mean.mean(0), rel=1e-12)
    assert latents.latents_std == pytest.approx((mean.var(0) + variance.mean(0)) ** 0.5, rel=1e-12)
    assert latents.scaling_factor == pytest.approx((mean.var() + variance.mean()) ** -0.5, rel=1e-12)
    z = mean + variance**0.5 * np.random.default_rng(0).standard_normal((1000, *mean.shape))
    # The deviation of a mean over 1000 N numbers, and of the squares of its noise, five times over.
    assert ((z - latents.shift_factor) * latents.scaling_factor).std() == pytest.approx(1, abs=5 * (500 * N) ** -0.5)
    checkpoint = json.loads(next((run / "checkpoints").glob("*/manifest.json")).read_text())
    settings = found.settings
    assert settings["checkpoint"] == checkpoint["sha256"]
    assert settings["configuration"] == checkpoint["configuration"]
    assert (settings["size"], settings["channels"]) == (32, 1)
    assert settings["crop"] == "the largest centred part of the shape of size"
    dataset, problems = inspect(whole, verify=True)
    assert not problems
    assert dataset.splits["train"].modes == {"fp16": N}
    said = dict(re.split("  +", line, maxsplit=1) for line in describe(whole, dataset).splitlines()[2:])
    assert said["shape of the latents"] == "4 numbers"
    assert said["std"] == "{:.4f} to {:.4f}, median {:.4f}".format(*np.quantile(latents.latents_std, [0, 1, 0.5]))
    assert not {"width", "height"} & {*said}
    maps = dataset.splits["train"]
    maps.width, maps.height = Spread(8, 8, 8), Spread(6, 6, 6)
    assert "4 x 6 x 8\n" in describe(whole, dataset)


@pytest.mark.parametrize(
    ("options", "names", "kind"),
    [
        (["--mirror", "--dtype", "fp32", "--format", "npy"], ["mean", "log_variance"], torch.float32),
        (["--mean_only", "--dtype", "bf16"], ["mean"], torch.bfloat16),
        (["--mean_only", "--mirror", "--format", "npy"], ["mean"], torch.float16),
    ],
)
def test_forms_of_latents(encode, run, photos, tmp_path, options, names, kind):
    done = encode(run, photos, tmp_path / "out", *options)
    assert done.returncode == 0, done.err
    each = [unpack(content) for content in Shards(tmp_path / "out" / "train").images(np.arange(N))[0]]
    copies = ["", "mirrored_"] if "--mirror" in options else [""]
    assert {*each[0]} == {f"{copy}{name}" for copy in copies for name in names}
    stored = []
    for copy in copies:
        for name, values in zip(names, codes(run, photos, bool(copy)), strict=False):
            found = torch.stack([one[f"{copy}{name}"] for one in each])
            assert torch.equal(found, values.to(kind))
            stored += [found.double()] if name == "mean" else []
    latents = read_dataset(tmp_path / "out").splits["train"].latents
    assert latents.images == N * len(copies)
    assert latents.latents_mean == pytest.approx(torch.cat(stored).mean(0), rel=1e-12)
    if "--mean_only" in options:
        assert latents.of == "means"
        assert latents.scaling_factor == pytest.approx(1 / torch.cat(stored).std(correction=0).item(), rel=1e-12)
    assert not inspect(tmp_path / "out", verify=True)[1]


def test_two_processes_finish_what_a_kill_interrupted_to_the_same_bytes(forked, encode, whole, run, photos, tmp_path):
    out = tmp_path / "out"
    unfinished = tmp_path / ".out.unfinished"
    arguments = [str(run), str(photos), str(out), "--workers", "1"]
    killed = forked(KILL + RUN.format(arguments=arguments)).wait()
    assert killed.returncode == -9
    assert [path.name for path in unfinished.glob("out/*/*")] == ["00000.tar"]
    assert (unfinished / "train-00001.json.tar").exists(), "it was killed while it wrote this"
    refused = encode(*arguments[:3], "--mean_only")
    assert refused.returncode == 2
    assert "mean_only: False then, True now" in refused.err
    kept = (unfinished / "out" / "train" / "00000.tar").stat()
    done = forked(RUN.format(arguments=arguments), processes=2).wait()
    assert done.codes == [0, 0], done.stderr
    assert (out / "train" / "00000.tar").stat().st_ino == kept.st_ino
    assert contents(out) == contents(whole)
    assert not unfinished.exists()


def test_a_finished_shard_that_was_damaged_is_written_again(encode, whole, run, photos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("the disk is full")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("trainer.encode.command.complete", full)
        assert "the disk is full" in encode(run, photos, out).err
    with open(tmp_path / ".out.unfinished" / "out" / "train" / "00000.tar", "r+b") as file:
        file.seek(2000)
        file.write(b"?")
    done = encode(run, photos, out)
    assert done.returncode == 0, done.err
    assert contents(out) == contents(whole)


def test_a_data_set_keeps_its_splits_and_classes(encode, run, photos, tmp_path):
    source = tmp_path / "source"
    for split in ("train", "validation"):
        shutil.copytree(photos, source / split)
    described = inspect(source)[0]
    described.classes = [*"abcdefghij"]
    (source / "dataset.json").write_text(described.to_json())
    done = encode(run, source, tmp_path / "out")
    assert done.returncode == 0, done.err
    found = read_dataset(tmp_path / "out")
    assert [*found.splits] == ["train", "validation"]
    assert found.classes == described.classes
    one = encode(run, source / "validation", tmp_path / "one")
    assert one.returncode == 0, one.err
    assert read_dataset(tmp_path / "one").classes == described.classes
    assert (tmp_path / "one" / "validation" / "00003.tar").read_bytes() == (
        tmp_path / "out" / "train" / "00003.tar"
    ).read_bytes()


def test_a_damaged_image_is_named(encode, run, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    corrupt(Shards(tmp_path / "photos"), 55)
    done = encode(run, tmp_path / "photos", tmp_path / "out")
    assert done.returncode == 2
    assert done.err.startswith(f"error: cannot decode an image: {tmp_path / 'photos' / '00001.tar'}, member of/055.png")
    assert not (tmp_path / "out").exists()


def test_one_process_tells_why_all_end(forked, run, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    corrupt(Shards(tmp_path / "photos"), 55)  # of the second shard, and so the second process
    arguments = [str(run), str(tmp_path / "photos"), str(tmp_path / "out"), "--workers", "0"]
    done = forked(RUN.format(arguments=arguments), processes=2).wait()
    assert done.codes == [1, 2]
    assert done.stderr.startswith("error: cannot decode an image")
    assert len(done.stderr.splitlines()) == 1
    finished = sorted(path.name for path in (tmp_path / ".out.unfinished" / "out" / "photos").iterdir())
    assert finished == ["00000.tar", "00002.tar"], "of the first process"


def test_latents_too_large_for_their_type_are_refused(encode, run, photos, tmp_path, monkeypatch):
    plain = LatentEncoder.__call__
    monkeypatch.setattr(LatentEncoder, "__call__", lambda self, pixels: [1e6 * part for part in plain(self, pixels)])
    done = encode(run, photos, tmp_path / "out")
    assert done.returncode == 2
    assert "too large for --dtype fp16: use bf16 or fp32" in done.err
    assert "00000.tar, member of/000.png" in done.err


def test_changed_latents_are_found(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    corrupt(Shards(copy / "train"), 5)
    problems = inspect(copy, verify=True)[1]
    assert any("of/005.safetensors" in problem for problem in problems)


def test_refusals_are_one_message(encode, tiny_run, run, photos, whole, tmp_path):
    write(tmp_path / "own", [{"__key__": "a", "png": Shards(photos).image(0), "safetensors": b"own"}])
    for arguments, words in (
        ([tiny_run("GAN"), photos, tmp_path / "out"], "GAN has no encoder"),
        ([run, photos, whole], "exists already"),
        ([run, tmp_path / "nothing", tmp_path / "out"], "does not exist"),
        ([tmp_path, photos, tmp_path / "out"], "neither a checkpoint nor a run's folder"),
        ([run, photos, tmp_path / "out", "--format", "npy", "--dtype", "bf16"], "--dtype bf16 cannot be written"),
        ([run, tmp_path / "own", tmp_path / "out"], "has a member .safetensors"),
    ):
        done = encode(*arguments)
        assert done.returncode == 2, arguments
        assert words in done.err
        assert len(done.err.splitlines()) <= 2
        assert not (tmp_path / "out").exists()
