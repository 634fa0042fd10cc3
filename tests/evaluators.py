"""Evaluators and extractors that tests of scores share."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from systems_under_test import SMALL
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from data.shards.reader import Shards
from models import VAE
from trainer.config.settings import DataConfig
from trainer.evaluate.accumulators import extract_features
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.extractors.demo_cnn import load_demo_cnn
from trainer.evaluate.ranks import BLOCK


def evaluator_of(data, path, num=200, system=None) -> Evaluator:
    extractor = load_demo_cnn(path, 1).eval().requires_grad_(False)
    system = system or VAE(32, 1, 4, SMALL)
    return Evaluator(Accelerator(cpu=True), extractor, [Shards(data.test)], data, num=num, seed=0, system=system)


class Playback(VAE):
    """A "system" whose samples and reconstructions are given images."""

    def __init__(self, samples, reconstruct=lambda image: image):
        super().__init__(32, 1, 4, SMALL)
        self.samples, self.transform, self.at = samples, reconstruct, 0
        self.eval()

    def sample(self, z):
        self.at += len(z)
        return self.samples[self.at - len(z) : self.at].float() / 127.5 - 1

    def reconstruct(self, image):
        return self.transform(image)


def in_blocks(extractor, images):
    """Features and logits as they are scored: a convolution of another number of images rounds otherwise."""
    found = [extract_features(extractor, block) for block in images.split(BLOCK)]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def scores_of_a_fresh_vae(data, path) -> dict[str, float]:
    torch.manual_seed(0)
    scores = evaluator_of(data, path, 100)(VAE(32, 1, 4, SMALL).eval())
    return timeless(scores)


class FailsOnOneRank(VAE):
    """Its samples have a pixel that is not finite, on rank 1."""

    def __init__(self, rank):
        super().__init__(32, 1, 4, SMALL)
        self.rank = rank
        self.eval()

    def sample(self, z):
        image = super().sample(z)[:1].clone()
        image[0, 0, 0, 0] = float("nan") if self.rank == 1 else 0.0
        return torch.cat([image, torch.zeros(len(z) - 1, 1, 32, 32)]) if self.rank != 1 else image


def timeless(scores) -> dict[str, float]:
    return {name: score for name, score in scores.items() if not name.startswith("eval/seconds")}


def random_inception(path: Path) -> None:
    """A file of random weights for the real architecture."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), path)


def score_as_a_rank(train_folder: str, test_folder: str, weights: str, out: str) -> None:
    """One rank of test_scores_do_not_depend_on_the_number_of_processes."""
    rank = Accelerator(cpu=True).process_index
    settings = DataConfig(train_folder, test_folder, 32, 1, 0)
    found = scores_of_a_fresh_vae(settings, Path(weights))
    told = refused = ""
    evaluator = evaluator_of(settings, Path(weights), 100)
    try:
        evaluator(FailsOnOneRank(rank))
    except FloatingPointError as error:
        told = str(error).partition(" pixels")[0]
    if rank == 1:
        evaluator.extractor.sha256 = "other"
    try:
        Evaluator(evaluator.accelerator, evaluator.extractor, evaluator.held_out, settings, num=100, seed=0)
    except ValueError as error:
        refused = str(error)
    Path(out, f"{rank}.json").write_text(json.dumps([found, told, refused]))
    torch.distributed.barrier()


def fidelity(fake: torch.Tensor, real: torch.Tensor):
    """torch-fidelity's Frechet distance, within what float64 leaves of it: it takes roots of the D eigenvalues of A B,
    each of which is known to D 2^-52 of |A| |B|, so that one that is 0 adds the root of that, twice."""
    stats = [fid_features_to_statistics(part.double()) for part in (fake, real)]
    expected = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    size, dim = np.prod([np.linalg.norm(part["sigma"], 2) for part in stats]), fake.shape[1]
    return pytest.approx(expected, abs=2 * dim * (dim * 2**-52 * size) ** 0.5)
