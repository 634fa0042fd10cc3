"""Scores: closed forms, agreement with torch-fidelity, the extractor's gate, refusals."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from evaluators import Playback, evaluator_of, fidelity, in_blocks, scores_of_a_fresh_vae, timeless
from systems_under_test import SMALL
from torch_fidelity.metric_isc import isc_features_to_metric

from data.loader import read
from data.shards.reader import Shards, write
from models import VAE, CycleGAN
from trainer.evaluate.budget import Budget
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.extractors.demo_cnn import load_demo_cnn
from trainer.evaluate.hints import hints
from trainer.evaluate.ranks import EvaluationRanks


def test_fid_and_is_agree_with_torch_fidelity(data, demo_cnn):
    evaluator = evaluator_of(data, demo_cnn)
    train = Shards(data.train)
    samples = read(train, np.arange(200), 32, 1).image
    scores = evaluator(Playback(samples))
    test = read(Shards(data.test), np.arange(359), 32, 1).image
    (fake, logits), (real, _) = (in_blocks(evaluator.extractor, images) for images in (samples, test))
    assert scores["eval/fid200/demo-cnn-v1"] == fidelity(fake, real)
    expected = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)["inception_score_mean"]
    # Both are float64, of the same logits: sums of 200 images' 10 probabilities, rounded to 2^-53 at every term.
    assert scores["eval/is200/demo-cnn-v1"] == pytest.approx(float(expected), rel=200 * 10 * 2**-53 * 10)


def test_perfect_reconstructions_score_perfectly_and_worse_ones_worse(data, demo_cnn):
    evaluator = evaluator_of(data, demo_cnn, 20)
    samples = read(Shards(data.train), np.arange(20), 32, 1).image
    perfect = evaluator(Playback(samples))
    assert perfect["eval/rfid359/demo-cnn-v1"] < 1e-6
    assert perfect["eval/psnr359"] > 100
    darker = evaluator(Playback(samples, lambda image: image * 0.5 - 0.5))
    noisy = evaluator(Playback(samples, lambda image: (image + 0.7 * torch.randn_like(image)).clamp(-1, 1)))
    assert darker["eval/rfid359/demo-cnn-v1"] > 0.5
    assert noisy["eval/rfid359/demo-cnn-v1"] > 0.5
    shifted = evaluator(Playback(samples, lambda image: image + 10 / 127.5))
    test = read(Shards(data.test), np.arange(359), 32, 1).image.double()
    error = ((test + 10).clamp(max=255) - test).square().flatten(1).mean(1)
    assert shifted["eval/psnr359"] == pytest.approx((10 * torch.log10(255**2 / error)).mean().item(), rel=1e-9)


def test_ssim_and_sharpness_of_reconstructions(data, demo_cnn):
    evaluator = evaluator_of(data, demo_cnn, 20)
    samples = read(Shards(data.train), np.arange(20), 32, 1).image
    perfect = evaluator(Playback(samples))
    assert perfect["eval/ssim359"] == pytest.approx(1)
    assert perfect["eval/sharpness_reconstructed359"] == pytest.approx(1)
    blurred = evaluator(Playback(samples, lambda image: torch.nn.functional.avg_pool2d(image, 5, 1, 2)))
    assert blurred["eval/sharpness_reconstructed359"] < 0.7
    assert blurred["eval/ssim359"] < 0.9


def test_samples_have_the_held_out_shares_of_classes_and_reconstructions_their_own(data, demo_cnn):
    class Told(Playback):
        classes, labels = 10, {}

        def sample(self, z, label):
            self.labels.setdefault("sample", []).append(label)
            return super().sample(z)

        def reconstruct(self, image, label):
            self.labels.setdefault("reconstruct", []).append(label)
            return image

    held_out = Shards(data.test)
    system = Told(read(held_out, np.arange(359), 32, 1).image)
    evaluator_of(data, demo_cnn, 359, system)(system)
    told = {use: torch.cat(labels) for use, labels in system.labels.items()}
    assert told["reconstruct"].tolist() == held_out.labels.tolist()
    assert sorted(told["sample"].tolist()) == sorted(held_out.labels)
    assert told["sample"].tolist() != held_out.labels.tolist()


def test_how_well_z_is_recovered(data, demo_cnn):
    class Reader(Playback):
        share = 1.0

        def sample(self, z):
            self.z = z
            return super().sample(z)

        def posterior(self, image):
            shape = (len(image), 4)
            return (self.share * self.z if len(self.z) == len(image) else torch.zeros(shape)), torch.zeros(shape)

    samples = read(Shards(data.train), np.arange(20), 32, 1).image
    reader = Reader(samples)
    assert evaluator_of(data, demo_cnn, 20)(reader)["eval/z_recovered20"] == pytest.approx(1)
    reader = Reader(samples)
    reader.share = 0.5
    assert evaluator_of(data, demo_cnn, 20)(reader)["eval/z_recovered20"] == pytest.approx(0.75)


def test_translations_are_scored_in_each_direction(data, demo_cnn):
    """Translators that leave images alone: each direction has the distance between the domains, cycles are perfect."""

    class Lazy(CycleGAN):
        def translate(self, image, direction):
            return image

    system = Lazy(32, 1, 4, blocks=1).eval()
    extractor = load_demo_cnn(demo_cnn, 1).eval().requires_grad_(False)
    tests = [Shards(data.test), Shards(data.train)]
    scores = Evaluator(Accelerator(cpu=True), extractor, tests, data, num=20, seed=0, system=system)(system)
    there, back = scores["eval/fid359/a2b/demo-cnn-v1"], scores["eval/fid1438/b2a/demo-cnn-v1"]
    assert there == pytest.approx(back, rel=1e-6)
    assert 0.01 < there < 2
    assert scores["eval/cycle_psnr359/a2b"] > 100


def test_evaluating_leaves_the_training_randomness_and_repeats_itself(data, demo_cnn):
    evaluator, system = evaluator_of(data, demo_cnn, 70), VAE(32, 1, 4, SMALL).eval()
    state = torch.get_rng_state()
    first = evaluator(system)
    assert torch.equal(state, torch.get_rng_state())
    assert first["eval/fid70/demo-cnn-v1"] > 1
    second = evaluator(system)
    assert timeless(first) == timeless(second)


def test_scores_are_the_same_to_the_bit_in_whatever_order_blocks_come(data, demo_cnn, monkeypatch):
    class Brightness:
        name, sha256 = "lpips_vgg", "0"

        def __call__(self, image, other):
            return (image.float() - other.float()).flatten(1).mean(1) / 3

    def scores() -> dict[str, float]:
        torch.manual_seed(0)
        extractor = load_demo_cnn(demo_cnn, 1).eval().requires_grad_(False)
        held_out = [Shards(data.test)]
        evaluator = Evaluator(Accelerator(cpu=True), extractor, held_out, data, num=200, seed=0, lpips=Brightness())
        return timeless(evaluator(VAE(32, 1, 4, SMALL).eval())) | {"real": evaluator.references[0].sharpness}

    expected, blocks = scores(), EvaluationRanks.blocks
    monkeypatch.setattr(EvaluationRanks, "blocks", lambda self, count: reversed([*blocks(self, count)]))
    assert scores() == expected


@pytest.mark.parametrize("world", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_scores_do_not_depend_on_the_number_of_processes(forked, data, demo_cnn, tmp_path, world):
    """Three ranks, the last of which gets no block of the samples; of eight, two get some. Then one of them fails, and
    one has another extractor."""
    arguments = [data.train, data.test, str(demo_cnn), str(tmp_path)]
    done = forked(f"import evaluators\nevaluators.score_as_a_rank(*{arguments!r})", processes=world).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    expected = scores_of_a_fresh_vae(data, demo_cnn)
    assert {"fid100", "is100", "kid100", "recall100"} <= {name.split("/")[1] for name in expected}
    for rank in range(world):
        found, told, refused = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx(expected, rel=1e-12)
        assert told == ("1 of 1024" if rank == 1 else "process 1: 1 of 1024")
        assert "networks differ between processes" in refused
        assert "'other'} on process 1. Give" in refused


def test_a_non_finite_image_is_an_error_and_no_score(data, demo_cnn):
    system = VAE(32, 1, 4, SMALL).eval()
    torch.nn.init.constant_(system.decoder.stem.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluator_of(data, demo_cnn, 20)(system)


def test_networks_in_training_mode_are_refused_by_name(data, demo_cnn):
    system = VAE(32, 1, 4, SMALL).eval()
    evaluator = evaluator_of(data, demo_cnn, 20)
    list(system.decoder.modules())[-1].train()
    with pytest.raises(RuntimeError, match=r"the averaged system .* decoder\..* is in training mode"):
        evaluator(system)
    evaluator.extractor.train()
    with pytest.raises(RuntimeError, match="the extractor must be in eval mode"):
        evaluator(system.eval())


def test_the_extractor_works_in_float32_inside_an_autocast_and_leaves_the_settings(data, demo_cnn):
    evaluator, system = evaluator_of(data, demo_cnn, 70), VAE(32, 1, 4, SMALL).eval()
    images = read(Shards(data.train), np.arange(70), 32, 1).image
    expected = evaluator.score(lambda index: images[index])
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert system.encoder(images[:2].float())[0].dtype == torch.bfloat16
            found = evaluator.score(lambda index: images[index])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert timeless(found) == timeless(expected)


def test_scores_tell_dropped_classes_and_repeated_images(data, demo_cnn):
    """FID, KID and coverage worsen with each class that is left out, and recall and IS fall; so with one image only."""
    train = Shards(data.train)
    images, labels = read(train, np.arange(1438), 32, 1).image, train.labels
    evaluator = evaluator_of(data, demo_cnn, 359)

    def scores(chosen):
        chosen = np.resize(chosen, 359)
        found = evaluator.score(lambda index: images[chosen[index]])
        return {name.split("/")[1].rstrip("0123456789"): value for name, value in found.items() if "demo" in name}

    few = [scores(np.flatnonzero(labels < classes)) for classes in (10, 7, 4, 2)] + [scores(np.array([5]))]
    for name in ("fid", "kid"):
        assert [one[name] for one in few] == sorted(one[name] for one in few), name
    for name in ("is", "recall", "coverage"):
        assert [one[name] for one in few] == sorted((one[name] for one in few), reverse=True), name
    assert few[0]["recall"] > 0.7
    assert few[4]["recall"] < 0.05
    assert few[4]["is"] == pytest.approx(1, abs=1e-6)


def test_images_that_are_none_are_refused(data, demo_cnn):
    evaluator = evaluator_of(data, demo_cnn, 20)
    for images, words in (
        (torch.zeros(20, 1, 32, 32), "expected images as uint8"),
        (torch.zeros(20, 1, 1, 32, 32, dtype=torch.uint8), r"1 or 3, h, w\]; got .*\[20, 1, 1, 32, 32\]"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluator.score(lambda index, images=images: images[index])
    constant = evaluator.score(lambda index: torch.zeros(len(index), 1, 32, 32, dtype=torch.uint8))
    assert constant["eval/fid20/demo-cnn-v1"] > 5
    assert constant["eval/precision20/demo-cnn-v1"] == 0


def test_statistics_are_kept_and_read_again(data, demo_cnn, tmp_path, monkeypatch):
    system = VAE(32, 1, 4, SMALL).eval()

    def evaluator(cache, weights=demo_cnn, **settings):
        extractor = load_demo_cnn(weights, 1).eval().requires_grad_(False)
        seen = replace(data, **settings)
        return Evaluator(
            Accelerator(cpu=True), extractor, [Shards(seen.test)], seen, num=64, seed=0, system=system, statistics=cache
        )

    expected = timeless(evaluator(tmp_path / "kept")(system))
    (path,) = (tmp_path / "kept").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("trainer.evaluate.image_features.read", lambda *_: pytest.fail("real images were read again"))
        again = evaluator(tmp_path / "kept")
    assert timeless(again(system)) == expected
    with np.load(path) as kept:  # as pytorch-fid and clean-fid read it
        mu, sigma = kept["mu"][:], kept["sigma"][:]
    features = in_blocks(again.extractor, read(Shards(data.test), np.arange(359), 32, 1).image)[0].double().numpy()
    # Sums of 359 float64 numbers below 100, and of their squares, whose means are then subtracted.
    np.testing.assert_allclose(mu, features.mean(0), atol=359 * 2**-53 * 100)
    np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), atol=359 * 2**-53 * 100**2)
    assert abs(features).max() < 100

    evaluator(tmp_path / "kept", size=48)
    assert len([*(tmp_path / "kept").iterdir()]) == 2  # of another size: another file
    with pytest.raises(ValueError, match="statistics of other images") as raised:
        evaluator(path, size=48)
    assert "  size: 32 in the file, 48 here" in str(raised.value)
    assert "channels" not in str(raised.value)
    with pytest.raises(ValueError, match=r"\n  count: 359 in the file, 1438 here\n  images: \w+ in the file"):
        evaluator(path, test=data.train)
    other = tmp_path / "other.safetensors"
    tensors = safetensors.torch.load(demo_cnn.read_bytes())
    safetensors.torch.save_file(tensors | {"scale": tensors["scale"] * 2}, other)
    with pytest.raises(ValueError, match=r"\n  extractor_sha256: \w{64} in the file, \w{64} here"):
        evaluator(path, weights=other)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="holds no statistics of images"):
        evaluator(path)


def test_statistics_that_cannot_be_kept_are_told_and_scores_are_made(data, demo_cnn, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    extractor = load_demo_cnn(demo_cnn, 1).eval().requires_grad_(False)
    system = VAE(32, 1, 4, SMALL).eval()
    arguments, settings = (Accelerator(cpu=True), extractor), {"num": 64, "seed": 0, "system": system}
    held_out = [Shards(data.test)]
    found = Evaluator(*arguments, held_out, data, **settings, statistics=tmp_path / "file")(system)
    assert "statistics of the real images are not kept: " in capsys.readouterr().err
    assert timeless(found) == timeless(Evaluator(*arguments, held_out, data, **settings)(system))
    with pytest.raises(ValueError, match=r"statistics of 2 sets of images need a folder; .*one\.npz is one file"):
        Evaluator(*arguments, held_out * 2, data, **settings, statistics=tmp_path / "one.npz")


def test_lpips_of_reconstructions_is_a_mean_over_images(data, demo_cnn):
    class Darkness:
        name, sha256 = "lpips_vgg", "0"

        def __call__(self, image, other):
            return (image.float() - other.float()).flatten(1).mean(1)

    extractor = load_demo_cnn(demo_cnn, 1).eval().requires_grad_(False)
    samples = read(Shards(data.train), np.arange(20), 32, 1).image
    tests, system = [Shards(data.test)], Playback(samples, lambda image: torch.full_like(image, -1))
    scores = Evaluator(Accelerator(cpu=True), extractor, tests, data, num=20, seed=0, system=system, lpips=Darkness())(
        system
    )
    images = read(tests[0], np.arange(359), 32, 1).image
    assert scores["eval/lpips_vgg359"] == pytest.approx(images.double().mean().item(), rel=1e-6)


def test_hints_of_divergence_and_of_collapse():
    facts = {"extractor": "x"}

    def past(name, *values):
        return [{"step": i, name: value, **facts} for i, value in enumerate(values)]

    fid, recall, score = "eval/fid2k/x", "eval/recall2k/x", "eval/is2k/x"
    (told,) = hints(past(fid, 9.0, 5.0, 8.0), {fid: 10.5}, facts)
    assert "more than doubled, from its best 5 at step 1 to 10.5" in told
    assert hints(past(fid, 9.0, 5.0, 11.0), {fid: 10.5}, facts) == []  # was told before
    assert hints(past(fid, 9.0, 5.0), {fid: 9.9}, facts) == []
    assert hints(past(fid, 5.0), {fid: 11.0}, {"extractor": "y"}) == []  # measured in another way
    assert hints([], {fid: 11.0}, facts) == []
    facts = {"extractor": "x", "judged_by": "rfid"}
    assert hints(past(fid, 5.0), {fid: 11.0}, facts) == []  # a tokenizer's samples say nothing
    assert len(hints(past("eval/rfid9/x", 5.0), {"eval/rfid9/x": 11.0}, facts)) == 1
    (told,) = hints(past(recall, 0.3, 0.6), {recall: 0.2}, facts)
    assert "fallen by more than half, from its best 0.6 at step 1 to 0.2" in told
    (told,) = hints(past(score, 9.0), {score: 4.5}, facts)  # of what it is above 1
    assert "may be collapsing" in told
    assert hints(past(score, 9.0), {score: 5.5}, facts) == []


def test_a_budget_counts_what_evaluations_took(data, demo_cnn):
    evaluator = evaluator_of(data, demo_cnn, 20)
    budget = evaluator.budget
    assert budget.affordable(0.01)  # nothing was spent yet
    budget.began, budget.spent, budget.last = time.monotonic() - 100, 10.0, 10.0
    assert budget.affordable(0.2)
    assert not budget.affordable(0.15)
    evaluator(VAE(32, 1, 4, SMALL).eval())
    assert budget.spent == 10 + budget.last
    again, before = Budget(), time.monotonic()  # of a resumed run
    again.resume([{"step": 1, "eval/seconds": 4.0, "eval/seconds_share": 0.5}, {"step": 2}])
    again.resume([{"eval/seconds": 4.0, "eval/seconds_share": 0.5}, {"eval/seconds": 10.0, "eval/seconds_share": 0.14}])
    assert (again.spent, again.last) == (14, 10)
    assert before <= again.began + 14 / 0.14 <= time.monotonic()


def test_one_held_out_image_is_refused(data, demo_cnn, tmp_path):
    extractor = load_demo_cnn(demo_cnn, 1).eval()
    write(tmp_path / "one", [{"__key__": "0", "png": Shards(data.test).image(0)}])
    test = Shards(tmp_path / "one")
    with pytest.raises(ValueError, match="at least 2 real images, better a thousand; the set has 1"):
        Evaluator(Accelerator(cpu=True), extractor, [test], data, num=20, seed=0, system=VAE(32, 1, 4, SMALL))
