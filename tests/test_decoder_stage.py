"""A decoder that is trained on alone, by the recipe's settings, makes better images of the same codes."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from data.prepare import prepare
from trainer.export.command import main as export

PHOTOS = Path(os.environ.get("DATASETS", ROOT.parent / "shared" / "datasets")) / "clothing.tar"
SCORE = "eval/rfid372/demo-random-v1"


def scored(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line[SCORE] for line in reversed(lines) if SCORE in line)


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason=f"{PHOTOS} is missing; DATASETS names the folder of clothing.tar")
def test_a_decoder_trained_on_alone_scores_better_with_the_same_encoder(here, tmp_path):
    prepare(str(PHOTOS), tmp_path / "photos", size=64, crop=True)
    common = ["--data.train", tmp_path / "photos" / "train", "--data.test", tmp_path / "photos" / "test"]
    common += ["--data.size", "64", "--data.channels", "3", "--trainer.batch_size", "16", "--evaluate.every", "1000"]
    common += ["--evaluate.extractor", "demo-random", "--evaluate.num", "372", "--evaluate.metrics", "[fid]"]
    networks = ["--system.networks.family", "dcgan", "--system.networks.norm", "group"]
    vae = ["--system", "VAE", *networks, "--system.networks.width", "16", "--system.networks.latent_stride", "8"]
    vae += ["--system.latent_dim", "4", "--system.kl_weight", "1e-2", "--system.autoencoder.lr", "2e-3"]
    done = here(*vae, *common, "--trainer.steps", "200", "--trainer.run_dir", tmp_path / "vae", small=[])
    assert done.returncode == 0, done.stderr
    export([str(tmp_path / "vae"), str(tmp_path / "export"), "--num", "64"])
    stage = ["--config", ROOT / "launch" / "recipes" / "decoder-finetune.yaml", *networks, *common]
    stage += ["--trainer.init_from", tmp_path / "export", "--evaluate.lpips", "null"]
    stage += ["--system.perceptual_weight", "0", "--system.perceptual_weights", "null"]
    stage += ["--system.autoencoder.lr", "1e-3", "--system.autoencoder.warmup", "10"]
    stage += ["--system.binary.lr", "1e-3", "--system.binary.start", "20", "--system.binary.ramp", "20"]
    stage += ["--system.binary.counts_from", "20"]
    stage += ["--system.adversarial_weight", 3 * 64**2]  # the recipe's is of images of 256 pixels
    stage += ["--trainer.steps", "200", "--trainer.ema_half_life", "300", "--trainer.run_dir", tmp_path / "tuned"]
    done = here(*stage, small=[])
    assert done.returncode == 0, done.stderr
    before, after = scored(tmp_path / "vae"), scored(tmp_path / "tuned")
    given = load_file(tmp_path / "export" / "encoder.safetensors")
    newest = max((tmp_path / "tuned" / "checkpoints").glob("step_*"))
    for name in ("encoder", "ema.encoder"):
        kept = load_file(newest / f"{name}.safetensors")
        assert given.keys() == kept.keys()
        assert all(torch.equal(kept[key], given[key]) for key in given)
    # With seeds 0 to 3 it was 0.66 to 0.77 of what it was before, with a deviation of 0.06.
    assert after < 0.9 * before
