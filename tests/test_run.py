"""The real program: one and two processes, resumed, mistaken, and what its folder holds."""

import json
import math
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import BOARD, NETWORKS, wait_until
from sample_images import corrupt
from systems_under_test import vit_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import models
from models import OptimizerConfig
from trainer.checkpoint import files as checkpoint_files
from trainer.config.parser import configure
from trainer.distributed.accelerator import keep_freed_memory
from trainer.evaluate.extractors.choice import settle_extractor
from trainer.export.command import main as export


def weights(run_dir, step=None) -> dict[str, torch.Tensor]:
    path = (
        checkpoint_files.list_checkpoints(run_dir / "checkpoints")[0]
        if step is None
        else run_dir / "checkpoints" / f"step_{step:08d}"
    )
    tensors, _ = checkpoint_files.load(path)
    return {f"{file}.{name}": value for file, content in tensors.items() for name, value in content.items()}


def lines(run_dir) -> list[dict]:
    """What metrics.jsonl holds, without the times."""
    parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("speed/", "eval/seconds")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in parsed]


def alike(one: Path, other: Path, step: int | None = None) -> bool:
    """Whether two runs have the same weights but for the rounding of sums in another order.

    Rounding changes a gradient by a share of about 1e-6, and Adam's step by the same share of its learning rate; only
    where a gradient is the rest of terms that cancel may its step be any other. So all but a few weights must agree to
    a hundredth of a step. Other noise or samples change the steps of nearly all.
    """
    a, b = (
        {key: value for key, value in weights(run, step).items() if "optimizer." not in key} for run in (one, other)
    )
    assert a.keys() == b.keys()
    differences = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    return (differences < 1e-2 * OptimizerConfig().lr).float().mean().item() > 0.98


def test_two_processes_train_as_one(main, ranks, tmp_path):
    """accelerate launch on two CPU ranks: the world is two, and weights and terms are those of one process."""
    common = ["--system", "VAEGAN", "--system.discriminator", "both", "--trainer.steps", "4"]
    common += ["--trainer.ema_lengths", "[0.05, 0.1]", "--trainer.keep_every", "4"]
    two = main(*common, "--trainer.run_dir", tmp_path / "two", processes=2, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert "2 processes on cpu" in two.stderr
    assert two.stderr.count("Starting at step 0") == 1, "rank 0 alone speaks"
    one = ranks(*common, "--trainer.run_dir", tmp_path / "one", "--trainer.micro_batch", "4").wait()
    assert one.returncode == 0, one.stderr
    assert alike(tmp_path / "one", tmp_path / "two")
    for first, second in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for key in first.keys() - {"world_size"}:
            assert first[key] == (
                pytest.approx(second[key], rel=2e-2) if isinstance(first[key], float) else second[key]
            )


def test_resumed_equals_uninterrupted_bit_for_bit(ranks, here, tmp_path, demo_cnn):
    common = ["--system", "VAEGAN", "--system.discriminator", "ternary", "--system.classes", "10"]
    common += ["--system.autoencoder.clip", "1"]
    common += ["--trainer.save_every", "3", "--evaluate.every", "4", "--evaluate.num", "64"]
    common += ["--evaluate.extractor", "demo-cnn", "--evaluate.weights", demo_cnn, "--trainer.keep", "9", *BOARD]
    whole = ranks(*common, "--trainer.steps", "8", "--trainer.run_dir", tmp_path / "whole").wait()
    assert whole.returncode == 0, whole.stderr
    # Cut after step 6, as by a kill: later lines are in the logs, later checkpoints are gone or damaged.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "step_00000008" / "decoder.safetensors").write_bytes(b"cut short")
    (tmp_path / "cut" / "checkpoints" / ".unfinished.step_00000009").mkdir()
    resumed = ranks(*common, "--trainer.steps", "8", "--trainer.run_dir", tmp_path / "cut").wait()
    assert resumed.returncode == 0, resumed.stderr
    assert "step_00000008 is damaged" in resumed.stderr
    assert "Resuming at step 6 of 8" in resumed.stderr
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert not list((tmp_path / "cut" / "checkpoints").glob(".unfinished*"))
    done = here(*common, "--trainer.steps", "8", "--trainer.run_dir", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut"), "nothing is done twice"
    shown_in_tensorboard(tmp_path / "cut")


def shown_in_tensorboard(run: Path) -> None:
    """Its pages of a ternary run that started at step 0, resumed at 6, and was found finished at 8."""
    board = EventAccumulator(str(run), size_guidance={"images": 0, "histograms": 0}).Reload()
    tags = board.Tags()
    pictures = {"real | reconstructed | generated", "confusion of the ternary discriminator"}
    assert {*tags["images"]} == pictures | {"traversals of codes, from -3 to 3 deviations"}
    assert {*tags["histograms"]} == {"codes/means", "codes/KL of each number in nats"}
    for tag in (*tags["images"], *tags["histograms"]):
        kind = board.Images if tag in tags["images"] else board.Histograms
        assert [event.step for event in kind(tag)] == [3, 4, 6, 8], tag
    starts = {event.step: event.tensor_proto.string_val[0].decode() for event in board.Tensors("starts/text_summary")}
    assert [text.partition(" in ")[0] for text in starts.values()] == [
        *("Starting at step 0 of 8", "Resuming at step 6 of 8", "Resuming at step 8 of 8")
    ]
    assert [*starts] == [0, 6, 8]
    content = {
        name: HParamsPluginData.FromString(board.PluginTagToContent("hparams")[f"_hparams_/{name}"])
        for name in ("experiment", "session_start_info")
    }
    hparams = content["session_start_info"].session_start_info.hparams
    assert hparams["system.discriminator"].string_value == "ternary"
    assert {"system.autoencoder.clip", "system.latent_dim", "trainer.batch_size"} < {*hparams}
    assert not {"system.kl_weight", "system.image_size", "trainer.run_dir", "evaluate.num"} & {*hparams}
    metrics = {info.name.tag for info in content["experiment"].experiment.metric_infos}
    assert "eval/fid64/demo-cnn-v1" in metrics <= {*tags["scalars"]}
    assert len((run / "projector" / "codes" / "tensors.tsv").read_text().splitlines()) == 359


@pytest.mark.parametrize("system", ["CycleGAN", "VAEGAN"])
def test_statistics_schedules_and_late_starters_resume_bit_for_bit(here, digits, tmp_path, system):
    """The image pool, LeCam's means, spectral norms, the adaptive weight: what players keep is in the checkpoint."""
    both = [f'["{digits}/{part}", "{digits}/{part}"]' for part in ("train", "test")]
    of = {
        "CycleGAN": [
            *("--data.train", both[0], "--data.test", both[1], "--system.width", "4", "--system.blocks", "1"),
            *("--system.pool", "20", "--system.binary.lecam_weight", "0.1", "--system.binary.spectral_norm", "true"),
        ],
        "VAEGAN": [
            *(*NETWORKS, "--system.discriminator", "both", "--system.adaptive", "true", "--system.kl_warmup", "5"),
            *("--system.ternary.lecam_weight", "0.1", "--system.ternary.start", "3"),
            *("--system.ternary.counts_from", "5", "--system.ternary.ramp", "2"),
            *("--system.autoencoder.schedule", "cosine", "--system.binary.augment", "[color, cutout]"),
            *("--system.binary.augment_probability", "{start: 0, end: 0.5, steps: 6}"),
            *("--system.binary.lr", "{start: 1e-3, end: 1e-4, steps: 6}"),
            *("--system.binary.betas", "[0, {start: 0.9, end: 0.99, steps: 6}]"),
            *("--system.binary.adversarial", "relativistic", "--system.binary.r2_weight", "1"),
            *("--system.binary.r1_weight", "{start: 1, end: 0.1, steps: 6}"),
            *("--trainer.ema_half_life", "{start: 0, end: 100, steps: 6}"),
            *("--trainer.ema_lengths", "[0.05, 0.1]", "--trainer.keep_every", "4"),
        ],
    }[system]
    run = ["--system", system, *of, "--trainer.steps", "8", "--trainer.save_every", "4"]
    whole = here(*run, "--trainer.run_dir", tmp_path / "whole", small=[])
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000008")
    resumed = here(*run, "--trainer.run_dir", tmp_path / "cut", small=[])
    assert "Resuming at step 4 of 8" in resumed.stderr
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    kept = {"CycleGAN": "by_position.pool_b", "VAEGAN": "statistics.adaptive_weight"}[system]
    assert a[kept].abs().sum() > 0
    longer = here(*run, "--trainer.steps", "9", "--trainer.run_dir", tmp_path / "cut", small=[])
    assert longer.returncode == 2, "rates that have begun to fall towards step 8 do not fall towards step 9"
    assert "trainer.steps: 8 in the checkpoint, 9 now" in longer.stderr


def test_a_run_can_be_made_longer_or_shorter_until_its_rates_begin_to_fall(here, tmp_path):
    """The generator's rate falls from the second half on: of 8 steps in the sixth, of 10 in the seventh."""
    run = ["--system", "GAN", *NETWORKS, "--trainer.save_every", "1", "--trainer.keep", "99"]
    run += ["--system.generator.schedule", "linear", "--system.generator.hold", "0.5"]
    for name, steps in (("long", 10), ("short", 8)):
        done = here(*run, "--trainer.steps", str(steps), "--trainer.run_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr

    def resume(name: str, step: int, steps: int) -> SimpleNamespace:
        folder = tmp_path / f"{name}-{step}"
        shutil.copytree(tmp_path / name, folder)
        for path in (folder / "checkpoints").iterdir():
            if int(path.name.removeprefix("step_")) > step:
                shutil.rmtree(path)
        return here(*run, "--trainer.steps", str(steps), "--trainer.run_dir", folder)

    for name, was, steps in (("short", 8, 10), ("long", 10, 8)):
        refused = resume(name, 6, steps)
        assert refused.returncode == 2
        assert f"trainer.steps: {was} in the checkpoint, {steps} now" in refused.stderr
    for name, steps, same in (("short", 10, "long"), ("long", 8, "short")):
        assert f"Resuming at step 5 of {steps}" in resume(name, 5, steps).stderr
        a, b = weights(tmp_path / f"{name}-5"), weights(tmp_path / same)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_terms_of_codes_and_of_a_frozen_dino_resume_bit_for_bit_with_its_file(here, tmp_path):
    """The alignment's weight is in the checkpoint, and so is the sha256 of each of the three files."""
    files = [shutil.copy(vit_file(), tmp_path / f"{i}.pth") for i in range(3)]
    codes = {"equivariance": 0.5, "scale_equivariance": 0.25, "noise": 0.3, "alignment": 0.1, "dino_weights": files[0]}
    run = ["--system", "VAEGAN", *NETWORKS, "--system.networks.latent_stride", "8", "--system.likelihood", "laplace"]
    run += [word for name, value in codes.items() for word in (f"--system.codes.{name}", value)]
    run += ["--system.perceptual", "dino", "--system.perceptual_weight", "5", "--system.perceptual_weights", files[1]]
    run += ["--system.binary.dino_weights", files[2], "--system.binary.r1_weight", "0"]
    run += ["--system.binary.adversarial", "hinge", "--trainer.steps", "4", "--trainer.save_every", "2"]
    whole = here(*run, "--trainer.run_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000004")
    torch.save(torch.load(files[0], weights_only=True) | {"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "other.pth")
    others = [tmp_path / "other.pth" if word in files else word for word in run]
    refused = here(*others, "--trainer.run_dir", tmp_path / "cut")
    assert refused.returncode == 2
    for setting in ("codes.dino_weights", "perceptual_weights", "binary.dino_weights"):
        assert f"system.{setting}: a file with sha256 " in refused.stderr
    resumed = here(*run, "--trainer.run_dir", tmp_path / "cut")
    assert "Resuming at step 2 of 4" in resumed.stderr
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert a["statistics.alignment_weight"] != 1, "it was measured"
    assert not any("dino" in key or "perceptual" in key for key in a), "frozen networks are not saved"


@pytest.mark.slow
def test_a_cyclegans_pool_follows_its_positions_to_any_processes(ranks, here, digits, tmp_path):
    """Saved by one process, it goes on with two; saved by two, with two bit for bit, and with one and micro-batches."""
    sets = f'["{digits}/train", "{digits}/train"]'
    run = ["--system", "CycleGAN", "--data.train", sets, "--data.test", sets, "--system.width", "4"]
    run += ["--system.blocks", "1", "--system.pool", "12", "--trainer.steps", "8"]
    run += ["--trainer.save_every", "2", "--trainer.keep", "9"]

    def resume(start, before: Path, step: int, **options) -> Path:
        """Go on from an earlier step of a copy of a run."""
        shutil.copytree(before, folder := tmp_path / f"{before.name}{len(list(tmp_path.iterdir()))}")
        for path in (folder / "checkpoints").iterdir():
            if path.name > f"step_{step:08d}":
                shutil.rmtree(path)
        done = start(*run, *options.pop("more", ()), "--trainer.run_dir", folder, small=[], **options)
        assert f"Resuming at step {step} of 8" in getattr(done, "wait", lambda: done)().stderr
        return folder

    assert here(*run, "--trainer.run_dir", tmp_path / "whole", small=[]).returncode == 0
    whole, two = tmp_path / "whole", resume(ranks, tmp_path / "whole", 4, processes=2)
    assert alike(whole, two, step=6)
    for domain in ("by_position.pool_a", "by_position.pool_b"):
        saved, *later = (weights(*at)[domain] for at in ((whole, 4), (whole, 6), (two, 6)))
        unchanged, same = ((saved == pool).flatten(2).all(2) for pool in later)
        assert 0 < unchanged.sum() < 16
        assert torch.equal(unchanged, same), "the slots that no fake went into are as they were, to the bit"
    again, one = resume(ranks, two, 6, processes=2), resume(here, two, 6, more=["--trainer.micro_batch", "2"])
    a, b = weights(two), weights(again)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert alike(one, two, step=8)
    assert a["by_position.pool_a"].shape == (8, 2, 1, 32, 32)
    assert (a["by_position.pool_a"].abs().sum((1, 2, 3, 4)) > 0).all(), "every position's slots are saved"
    assert not list((two / "checkpoints").glob("*/statistics.*")), "nothing else is kept"
    larger = ["--trainer.batch_size", "12", "--trainer.accept_new_data", "true"]
    resized = weights(resume(here, two, 6, more=larger))
    assert resized["by_position.pooled"].tolist() == [1] * 12, "at other positions the pool begins anew"
    assert models.load(two).by_position == ("pool_a", "pool_b", "pooled")


def test_two_sets_are_for_cyclegan_alone(here, digits, tmp_path):
    sets = f'["{digits}/train", "{digits}/train"]'
    done = here("--system", "AE", "--data.train", sets, "--trainer.run_dir", tmp_path)
    assert (done.returncode, "data.train names 2 folders, expected 1 for AE" in done.stderr) == (2, True)
    done = here("--system", "CycleGAN", "--trainer.run_dir", tmp_path, small=[])
    assert (done.returncode, "data.train names 1 folder, expected 2 for CycleGAN" in done.stderr) == (2, True)


def test_three_processes_resume_bit_for_bit(ranks, tmp_path):
    """With three, the order of sums within a gradient's buckets shows: it must not depend on where a run began."""
    run = ["--system", "VAEGAN", "--trainer.batch_size", "9", "--trainer.save_every", "2"]
    whole = ranks(*run, "--trainer.steps", "4", "--trainer.run_dir", tmp_path / "whole", processes=3).wait()
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000004")
    resumed = ranks(*run, "--trainer.steps", "4", "--trainer.run_dir", tmp_path / "cut", processes=3).wait()
    assert "Resuming at step 2" in resumed.stderr
    a, b = weights(tmp_path / "whole", 4), weights(tmp_path / "cut", 4)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_processes_that_would_train_alone_are_refused(ranks, tmp_path):
    alone = {"ACCELERATE_USE_CPU": "false"}
    done = ranks("--system", "AE", "--trainer.run_dir", tmp_path, processes=2, env=alone).wait()
    assert done.codes == [2, 2]
    assert "ACCELERATE_USE_CPU=true" in done.stderr


def test_an_error_of_one_process_alone_is_told(ranks, digits, tmp_path, demo_cnn):
    """A held-out image that only rank 1 reads is corrupt."""
    from data.shards.reader import Shards

    shutil.copytree(digits / "test", tmp_path / "test")
    shards = Shards(tmp_path / "test")
    corrupt(shards, 70)
    done = ranks(
        *("--system", "AE", "--trainer.run_dir", tmp_path / "run", "--data.test", tmp_path / "test"),
        *("--evaluate.every", "1", "--evaluate.extractor", "demo-cnn", "--evaluate.weights", demo_cnn),
        processes=2,
    ).wait()
    assert done.returncode != 0
    assert done.stderr.count(f"cannot decode an image: {shards.paths[0]}, member") == 1


def test_another_configuration_is_refused_in_the_same_folder(here, tmp_path):
    first = here("--system", "AE", "--trainer.steps", "2", "--trainer.run_dir", tmp_path)
    assert first.returncode == 0, first.stderr
    other = here("--system", "AE", "--trainer.steps", "4", "--trainer.seed", "1", "--trainer.run_dir", tmp_path)
    assert other.returncode == 2
    assert "trainer.seed: 0 in the checkpoint, 1 now" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_perceptual_networks_file_is_compared_by_its_content(here, tmp_path, monkeypatch):
    class Pixels(torch.nn.Module):
        def __init__(self, kind, weights):
            super().__init__()
            self.sha256, self.setting = Path(weights).read_text(), "system.perceptual_weights"

        def forward(self, target, prediction):
            return (target - prediction).square().mean()

    monkeypatch.setattr("models.systems.vaegan.Perceptual", Pixels)
    (tmp_path / "a").write_text("aaa")
    (tmp_path / "moved").write_text("aaa")
    (tmp_path / "b").write_text("bbb")

    def run(steps, weights):
        perceptual = ["--system.perceptual_weight", "1", "--system.perceptual_weights", tmp_path / weights]
        return here("--system", "VAEGAN", "--trainer.run_dir", tmp_path / "run", "--trainer.steps", steps, *perceptual)

    assert [run(1, "a").returncode, run(2, "moved").returncode] == [0, 0]
    done = run(3, "b")
    assert done.returncode == 2
    assert "system.perceptual_weights: a file with sha256 aaa in the checkpoint, bbb now" in done.stderr


def test_the_run_folder(ranks, tmp_path, demo_cnn):
    """In another working directory, with features and pixels."""
    (tmp_path / "elsewhere").mkdir()
    done = ranks(
        *("--system", "VAEGAN", "--system.reconstruction", "both", "--trainer.steps", "4"),
        *("--evaluate.every", "2", "--evaluate.num", "64", "--evaluate.extractor", "demo-cnn"),
        *("--evaluate.weights", demo_cnn, *BOARD),
        faults={0: f"import os\nos.chdir({str(tmp_path / 'elsewhere')!r})"},
    ).wait()
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "elsewhere" / "runs" / "vaegan"
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert saved["system"]["init_args"]["reconstruction"] == "both"
    board = EventAccumulator(str(run_dir)).Reload()
    tags = set(board.Tags()["scalars"])
    assert {
        *("binary/discriminator_loss", "binary/chance", "binary/r1", "binary/grad_norm", "binary/lr", "autoencoder/lr"),
        *("binary/accuracy/real", "binary/accuracy/reconstructed", "binary/accuracy/generated"),
        *("autoencoder/reconstruction", "autoencoder/reconstruction/features", "autoencoder/kl"),
        *("autoencoder/generator_loss/binary", "autoencoder/grad_norm", "speed/images_per_second", "speed/data_wait"),
        *(
            "speed/host_gb",
            "eval/fid64/demo-cnn-v1",
            "eval/is64/demo-cnn-v1",
            "eval/rfid359/demo-cnn-v1",
            "eval/psnr359",
        ),
        *("eval/ssim359", "eval/prior_gap359", "eval/active_units359", "eval/z_recovered64", "eval/sharpness64"),
    } <= tags
    assert [event.step for event in board.Scalars("eval/fid64/demo-cnn-v1")] == [2, 4]
    layout = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    shown = {"FID and rFID", "KID", "precision and recall", "PSNR of reconstructions (dB)"}
    assert shown | {"accuracy of the binary discriminator"} <= charts.keys()
    for title, patterns in charts.items():
        assert any(re.match(pattern, tag) for pattern in patterns for tag in tags), f"nothing is in {title}"
    assert "eval/" not in done.stderr, "its scores are shown by short names"
    assert "\r" not in done.stderr, "a file gets no progress bar"
    for row in (
        "  system    VAEGAN\n  player    binary trains discriminator_binary ",
        "weights; adamw, lr 0.0002\n  data      1,438 training images, 179 steps an epoch; 359 held out\n",
        "  images    32 x 32 pixels, grey\n  batch     8 images a step = 1 x 1 x 8 (processes x micro-",
        "  scores    every 2 steps and at the end, by demo-cnn\n  settings  ",
        "\nFinished at step 4\n  score     fid64/demo-cnn-v1 ",
        f"\n  samples   {run_dir}/samples\n  report    ",
        f"python -m trainer.report {run_dir}\n  curves    tensorboard --",
    ):
        assert done.stderr.count(row) == 1, row
    assert "class_path" not in done.stderr, "the configuration is in its file"
    assert len(list((run_dir / "samples").glob("step_*.png"))) == 2
    evaluations = [line for line in lines(run_dir) if "eval/fid64/demo-cnn-v1" in line]
    assert {line["weights"] for line in evaluations} == {"ema"}
    files = {path.name for path in (run_dir / "checkpoints" / "step_00000004").iterdir()}
    networks = {"encoder", "decoder", "discriminator_binary", "ema.encoder", "ema.decoder"}
    assert files == {f"{name}.safetensors" for name in networks | {"optimizer.binary", "optimizer.autoencoder"}} | {
        *("manifest.json", "scores.json")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.train", "nowhere"], "nowhere does not exist"),
        (["--evaluate.every", "2", "--evaluate.extractor", "inception", "--evaluate.weights", "none.pth"], "none.pth"),
        (["--trainer.precision", "fp16"], "fp16, which a CPU would silently train in fp32"),
        (
            ["--trainer.time_limit", "soon"],
            "trainer.time_limit must be minutes, MM:SS, HH:MM:SS or D-HH:MM:SS, such as 23:30:00; got 'soon'",
        ),
        (["--trainer.run_dir", "/dev/null/run"], "/dev/null/run"),
        (["--system", "GAN", "--system.classes", "9"], "has label 9, but system.classes is 9, so every image needs a"),
        (["--system.classes", "9"], "system.classes"),
    ],
)
def test_what_cannot_be_is_refused_before_training(here, tmp_path, arguments, words):
    done = here("--system", "AE", "--trainer.run_dir", tmp_path / "run", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_mistake_ends_the_program_with_code_2_and_no_traceback(command, tmp_path):
    """And it is told although a signal comes before torch is imported, which takes seconds: it is only noted."""
    process = subprocess.Popen(
        **command("--system", "AE", "--data.train", "nowhere"), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    noting = importing = False
    while process.poll() is None and not noting:
        importing = "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
        caught = int(Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0], 16)
        noting = bool(caught >> signal.SIGUSR1 - 1 & 1)
        assert noting or not importing
    process.send_signal(signal.SIGUSR1)
    said = process.communicate()[1]
    assert process.returncode == 2
    assert said.startswith("error: data.train: the data folder")
    assert "nowhere does not exist" in said
    assert "Traceback" not in said


def test_a_world_size_that_does_not_divide_the_batch_is_told_once(ranks, tmp_path):
    done = ranks("--system", "AE", "--trainer.batch_size", "9", "--trainer.run_dir", tmp_path, processes=2).wait()
    assert done.codes == [2, 2]
    assert done.stderr.count("error: trainer.batch_size 9 cannot be dealt evenly to 2 processes: take 8 or 10") == 1


def test_a_corrupt_image_stops_the_run_with_its_name(here, digits, tmp_path):
    from data.shards.reader import Shards

    shutil.copytree(digits / "train", tmp_path / "train")
    shards = Shards(tmp_path / "train")
    corrupt(shards, 700)  # which the seed deals to the second batch or a later one
    done = here(
        *("--system", "AE", "--trainer.run_dir", tmp_path / "run", "--data.train", tmp_path / "train"),
        *("--trainer.batch_size", "256", "--trainer.steps", "5", "--trainer.save_every", "1", "--data.workers", "1"),
    )
    assert done.returncode == 1
    assert f"{shards.paths[0]}, member 000875.png" in done.stderr
    assert weights(tmp_path / "run"), "the last checkpoint is intact"


def sample_checksums(run_dir) -> dict[int, int]:
    """The checksum of the samples that each logged step saw."""
    return {line["step"]: line["sample_checksum"] for line in lines(run_dir) if "sample_checksum" in line}


def test_a_run_of_two_processes_goes_on_with_one_on_the_same_samples(ranks, tmp_path):
    """Killed with -9 in the middle; each step sees the samples, in the places, that arithmetic says."""
    from data.order import Order, sample_checksum

    run = ["--system", "AE", "--trainer.log_every", "1", "--trainer.save_every", "5"]
    run += ["--trainer.batch_size", "64", "--trainer.steps", "26", "--trainer.run_dir", tmp_path]
    two = ranks(*run, processes=2)
    wait_until(lambda: list(tmp_path.glob("checkpoints/step_*")))
    two(signal.SIGKILL)
    assert two.wait().codes == [-signal.SIGKILL] * 2
    one = ranks(*run).wait()
    assert one.returncode == 0, one.stderr
    assert "Resuming at step" in one.stderr
    order, rows = Order([1438], 64, 0), slice(0, 64)
    assert order.steps_per_epoch == 22
    assert sample_checksums(tmp_path) == {step + 1: sample_checksum(step, 0, rows, order[step]) for step in range(26)}


def test_damaged_images_are_skipped_and_told_up_to_a_share(here, digits, tmp_path):
    from data.shards.reader import Shards

    shutil.copytree(digits / "train", tmp_path / "train")
    shards = Shards(tmp_path / "train")
    for position in (7, 700, 1400):
        corrupt(shards, position)
    run = ["--system", "AE", "--data.train", tmp_path / "train", "--trainer.batch_size", "64"]
    run += ["--trainer.steps", "22", "--data.on_error", "skip"]  # an epoch, less 30 images
    done = here(*run, "--trainer.run_dir", tmp_path / "run", "--trainer.save_every", "20")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "seen instead" in line]
    assert 1 <= len(told) <= 3
    assert all("00000.tar, member 00" in line and line.startswith("step ") for line in told)
    assert lines(tmp_path / "run")[-1]["data/skipped"] == len(told)
    export([str(tmp_path / "run"), str(tmp_path / "export")])  # which measures the codes of the run's images
    done = here(*run, "--trainer.run_dir", tmp_path / "strict", "--data.max_skipped", "0.0001")
    assert done.returncode == 1
    assert "images were damaged, more than data.max_skipped 0.0001 allows" in done.stderr
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000022")
    here(*run, "--trainer.run_dir", tmp_path / "cut", "--trainer.save_every", "20")
    assert lines(tmp_path / "run")[-1] == lines(tmp_path / "cut")[-1], "what stood in before a restart counts"


def test_other_data_or_batches_are_refused_unless_accepted(here, digits, tmp_path):
    first = here("--system", "AE", "--trainer.steps", "2", "--trainer.run_dir", tmp_path)
    assert first.returncode == 0, first.stderr
    other = ["--system", "AE", "--trainer.steps", "3", "--trainer.run_dir", tmp_path, "--trainer.batch_size", "4"]
    other += ["--data.train", digits / "test"]
    refused = here(*other)
    assert refused.returncode == 2
    assert "data.train: 1,438 images in 1 shards in the checkpoint, 359 images in 1 shards now" in refused.stderr
    assert "trainer.batch_size: 8 in the checkpoint, 4 now" in refused.stderr
    assert "--trainer.accept_new_data true" in refused.stderr
    accepted = here(*other, "--trainer.accept_new_data", "true")
    assert accepted.returncode == 0, accepted.stderr
    assert "accepted:\n  trainer.batch_size: 8 in the checkpoint, 4 now\n  data.train: 1,438" in accepted.stderr
    again = here(*other, "--trainer.steps", "4")
    assert again.returncode == 0, "it is the run's own data now"
    refused = here(*other, "--trainer.steps", "5", "--trainer.seed", "1", "--trainer.accept_new_data", "true")
    assert refused.returncode == 2, "other settings are not accepted along"
    assert "accept_new_data" not in refused.stderr
    lanes = here(*other, "--trainer.steps", "5", "--data.window", "100", "--data.lanes", "2")
    assert lanes.returncode == 2
    assert "data: data.lanes or data.window gives another order of samples than in the checkpoint" in lanes.stderr
    same = here(*other, "--trainer.steps", "5", "--data.window", "1000", "--data.lanes", "2")
    assert same.returncode == 0, "a set within the window has one order"


def test_processes_with_different_data_are_refused(ranks, digits, tmp_path):
    """Each machine has a copy of its own, and one is another's."""
    for rank, part in enumerate(("train", "test")):
        shutil.copytree(digits / part, tmp_path / f"copy{rank}")
    (tmp_path / "data").symlink_to(tmp_path / "copy0")
    mine = """
from trainer.config.settings import DataConfig
here = DataConfig.open
def there(self, sources, *other):
    return here(self, [s.removesuffix("/data") + "/copy1" * s.endswith("/data") for s in sources], *other)
DataConfig.open = there
"""
    run = ["--system", "AE", "--data.train", tmp_path / "data", "--trainer.run_dir", tmp_path / "run"]
    done = ranks(*run, processes=2, faults={1: mine}).wait()
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "differ in shards" in done.stderr


def test_a_run_that_waits_for_its_data_says_so(here, tmp_path, monkeypatch):
    from data import loader

    read = loader.decode_to
    monkeypatch.setattr(loader, "decode_to", lambda *args: (time.sleep(0.02), read(*args))[1])
    done = here("--system", "AE", "--trainer.steps", "8", "--trainer.run_dir", tmp_path)
    assert done.stderr.count("of the time: raise --data.workers (now 0)") == 1


def test_a_diverging_run_stops_and_names_step_player_and_term(here, digits, tmp_path):
    run = ["--system", "VAE", "--trainer.run_dir", tmp_path, "--trainer.save_every", "2", "--trainer.steps", "40"]
    done = here(*run, "--system.autoencoder.lr", "1e12")
    assert done.returncode == 1
    assert "player autoencoder: not finite: autoencoder/" in done.stderr
    finite = weights(tmp_path) if list((tmp_path / "checkpoints").glob("step_*")) else {}
    assert all(value.isfinite().all() for value in finite.values())
    assert (tmp_path / "state").read_text() == "diverged\n"
    (path,) = (tmp_path / "failures").glob("step_*.json")
    told, step = json.loads(path.read_text()), int(path.stem.removeprefix("step_"))
    assert f"step {step}: player autoencoder" in done.stderr
    assert told["samples"] == [samples_of(digits, step)]
    assert not all(map(math.isfinite, told["terms"].values()))
    assert told["weights"]
    assert all(weight["finite"] for weight in told["weights"].values())
    assert path.with_suffix(".png").exists()


def samples_of(digits, step: int) -> list[str]:
    """Names of the samples that a step with SMALL sees."""
    from data.order import Order
    from data.shards.reader import Shards

    shards = Shards(digits / "train")
    return [shards.name(position) for position in Order(shards.counts, 8, seed=0)[step - 1].tolist()]


def test_bf16_trains_and_says_so(here, tmp_path):
    done = here(
        "--system", "VAEGAN", "--trainer.precision", "bf16", "--trainer.steps", "2", "--trainer.run_dir", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "precision bf16" in done.stderr
    other = here("--system", "VAEGAN", "--trainer.steps", "4", "--trainer.run_dir", tmp_path)
    assert other.returncode == 2
    assert "trainer.precision: bf16 in the checkpoint, no now" in other.stderr
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())


@pytest.mark.parametrize("good", [True, False])
def test_a_demo_cnn_is_trained_beside_the_first_steps(here, demo_cnn, tmp_path, monkeypatch, good):
    """The first evaluation waits for it; what is wrong with it is told there, after a save, and costs no step."""
    run, waits = tmp_path / "run", []

    def start_fit(train, test, data, path):
        def join() -> None:
            waits.append((run / "metrics.jsonl").exists())
            if good:
                shutil.copy(demo_cnn, path)

        return SimpleNamespace(join=join, kill=lambda: None)

    def fit(*_):
        raise ValueError("extractor demo-cnn classifies only 12.0%")

    monkeypatch.setattr("trainer.evaluate.extractors.demo_cnn.start_fit", start_fit)
    monkeypatch.setattr("trainer.evaluate.extractors.build.fit", fit)
    command = ["--system", "VAE", "--trainer.steps", "4", "--evaluate.every", "4", "--evaluate.num", "64"]
    command += ["--trainer.run_dir", run, "--evaluate.extractor"]
    done = here(*command, "demo-cnn")
    assert waits[0], "the run has made steps and logged them"
    assert done.returncode == (0 if good else 1), done.stderr
    name = "demo-cnn-v1" if good else "demo-random-v1"
    if not good:
        assert "classifies only 12.0%. Run the same command with another evaluate.extractor to resume" in done.stderr
        assert here(*command, "demo-random").returncode == 0
    assert [line["step"] for line in lines(run) if f"eval/fid64/{name}" in line] == [4]


def test_an_unset_extractor_is_settled_once_and_kept(here, digits, tmp_path, monkeypatch):
    """Without InceptionV3's weights and a network it is demo-random, also when the weights are there at the resume."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens: a machine without network
    run = ["--system", "AE", "--trainer.run_dir", tmp_path / "run", "--evaluate.every", "9", "--evaluate.num", "2"]
    run += ["--evaluate.metrics", "[fid]", "--trainer.steps"]
    first = here(*run, "1")
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("warning: ") == 1
    assert "warning: evaluate.extractor is unset, and InceptionV3's weights could not be downloaded to " in first.stderr
    path = tmp_path / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    assert "eval/rfid359/demo-random-v1" in lines(tmp_path / "run")[-1]
    (scores,) = (tmp_path / "run" / "checkpoints").glob("*/scores.json")
    assert ": evaluating 2 samples and 359 held-out images ...\n" in first.stderr
    assert json.loads(scores.read_text())["evaluation"]["judged_by"] == "rfid", "which chooses the best checkpoint"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["evaluate"]["extractor"] == "demo-random"
    resumed = configure(["--data.train", str(digits), *map(str, run), "2"])
    assert settle_extractor(resumed, SimpleNamespace(is_main_process=True)) == []
    assert resumed.evaluate.extractor == "demo-random"


def test_all_processes_have_the_extractor_that_the_main_one_chose(digits, monkeypatch):
    config = configure(["--system", "AE", "--data.train", str(digits)])
    monkeypatch.setattr(
        "trainer.distributed.ranks.broadcast_object_list", lambda _: [("demo-random", ["it has random weights"]), None]
    )
    warnings = settle_extractor(config, SimpleNamespace(is_main_process=False))
    assert (warnings, config.evaluate.extractor) == (["it has random weights"], "demo-random")
    assert config.resolved()["evaluate"]["extractor"] == "demo-random"


def test_a_budget_leaves_evaluations_out_and_changes_no_step(here, demo_cnn, tmp_path):
    """The first one, which nobody knows the length of, and the last are made."""
    scored = ["--evaluate.every", "2", "--evaluate.num", "64", "--evaluate.extractor", "demo-cnn"]
    run = ["--system", "GAN", "--trainer.steps", "8", *scored, "--evaluate.weights", demo_cnn, "--trainer.run_dir"]
    assert here(*run, tmp_path / "all").returncode == 0
    done = here(*run, tmp_path / "few", "--evaluate.budget", "0.001")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not scored, or it would take more than evaluate.budget 0.001") == 2

    def scores(name):
        return {line["step"]: line for line in lines(tmp_path / name) if "eval/fid64/demo-cnn-v1" in line}

    whole, few = scores("all"), scores("few")
    assert ([*whole], [*few]) == ([2, 4, 6, 8], [2, 8])
    assert few[8]["eval/fid64/demo-cnn-v1"] == whole[8]["eval/fid64/demo-cnn-v1"]
    a, b = weights(tmp_path / "all"), weights(tmp_path / "few")
    assert all(torch.equal(a[key], b[key]) for key in a)
    again = here(*run, tmp_path / "few", "--evaluate.budget", "0.001", "--trainer.steps", "10", "--evaluate.every", "3")
    assert again.stderr.count("not scored") == 1, "what was spent before counts"


FAULTS = """
import resource, torch
from trainer.distributed.accelerator import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(1)
for i in range(21):
    if i == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**21).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_a_step_frees_is_kept_for_the_next(forked):
    """20 times 8 MiB are 40,960 pages."""
    done = forked(FAULTS).wait()
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) < 10_000


@pytest.mark.parametrize(
    ("environment", "calls"),
    [({}, 2), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, 0), ({"GLIBC_TUNABLES": "glibc.malloc.a=1"}, 0)],
)
def test_thresholds_of_malloc_that_the_environment_sets_stay(monkeypatch, environment, calls):
    set_to = []
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=lambda *of: set_to.append(of) or 1))
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    keep_freed_memory()
    assert len(set_to) == calls
