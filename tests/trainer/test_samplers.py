"""Samplers: draws by position, and what they are fitted to."""

import pickle

import numpy as np
import pytest
import torch
from sample_images import flat
from systems_under_test import SMALL
from threadpoolctl import threadpool_info, threadpool_limits

from data.shards.reader import Shards, write
from models import AE
from trainer.latents import LatentEncoder
from trainer.samplers import Mixture, Sampler, chosen, fit

NOISE = 0.5  # standard deviation of every code of `Levels`


class Levels(AE):
    """A code is the image's grey, and its square, in [0, 1]; both are uncertain by NOISE."""

    def __init__(self):
        super().__init__(32, 1, 2, SMALL)

    def posterior(self, image):
        grey = (image[:, 0, 0, 0] + 1) / 2
        mean = torch.stack([grey, grey.square()], 1)
        return mean, torch.full_like(mean, 2 * float(np.log(NOISE)))


@pytest.fixture
def levels(tmp_path) -> tuple[LatentEncoder, Shards]:
    """An encoder, and 200 images of which 60 are dark, and the others light."""
    greys = [20 + i % 5 if i % 10 < 3 else 220 + i % 7 for i in range(200)]
    write(tmp_path / "levels", ({"__key__": f"{i:03d}", "png": flat(grey)} for i, grey in enumerate(greys)))
    return LatentEncoder(Levels().eval(), 32, 1, "cpu"), Shards(tmp_path / "levels")


def draws(sampler, n=3000):
    return sampler(0, torch.arange(n))


@pytest.mark.parametrize("kind", ["prior", "mixture", "resample"])
def test_a_draw_depends_on_seed_and_number_alone(levels, kind):
    sampler = Sampler("prior", (2,)) if kind == "prior" else fit(kind, *levels, components=2)
    together = sampler(3, torch.arange(50))
    assert together.dtype == torch.float32
    assert torch.equal(sampler(3, torch.tensor([49, 7])), together[[49, 7]])
    assert not torch.equal(sampler(4, torch.arange(50)), together)
    assert torch.equal(pickle.loads(pickle.dumps(sampler))(3, torch.arange(50)), together)


@pytest.mark.parametrize("kind", ["mixture", "resample"])
def test_what_is_drawn_is_distributed_as_the_codes(levels, kind):
    encoder, images = levels
    fitted = fit(kind, encoder, images, components=2)
    z = draws(fitted)
    light = z[:, 0] > 0.5
    # The first number of a code is N(0.09, NOISE^2) in 30 % of the images, and N(0.87, NOISE^2) in the others. Mean and
    # variance are known to their standard errors, of the 200 codes that are fitted, and of 3000 draws; five of these
    # are allowed.
    mean, variance = 0.3 * 22 / 255 + 0.7 * 223 / 255, NOISE**2 + 0.3 * 0.7 * (201 / 255) ** 2
    errors = (1 / 200 + 1 / 3000) if kind == "mixture" else 1 / 3000
    assert z[:, 0].mean().item() == pytest.approx(mean, abs=5 * (variance * errors) ** 0.5)
    assert z[:, 0].var().item() == pytest.approx(variance, rel=5 * (2 * errors) ** 0.5)
    assert 0.3 < light.double().mean() < 0.8
    assert fitted.facts["images"] == 200
    assert fitted.facts["fingerprint"] == images.fingerprint()


def test_resampled_codes_are_those_of_images_with_their_posteriors_noise(levels):
    encoder, images = levels
    fitted = fit("resample", encoder, images, num=50)
    sure = Mixture(**{**vars(fitted), "truncation": 1e-9})
    z = draws(sure, 400)
    greys = torch.tensor([20 + i % 5 if i % 10 < 3 else 220 + i % 7 for i in chosen(images, 50)]) / 255
    distances = (z[:, :1] - greys).abs()
    assert distances.min(1).values.max() < 1e-6
    # Each of 50 images is missed by 400 draws with a probability of (49/50)^400 = 0.0003.
    assert len(distances.min(1).indices.unique()) >= len(greys.unique()) - 1
    noise = (fitted(0, torch.arange(400)) - z) / NOISE
    assert noise.std().item() == pytest.approx(1, rel=5 * (2 * 800) ** -0.5)


def test_a_mixture_is_that_of_its_components():
    factor = torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=torch.float64)
    mixture = Mixture(
        "mixture",
        (2, 1),
        bounds=torch.tensor([0.25, 1.0]),
        means=torch.tensor([[-50.0, 0.0], [50.0, 7.0]]),
        factors=torch.stack([torch.eye(2, dtype=torch.float64), factor]),
    )
    z = draws(mixture)
    assert z.shape == (3000, 2, 1)
    right = z[z[:, 0, 0] > 0].flatten(1)
    # Five standard errors of a share, of means and of covariances.
    assert len(right) / 3000 == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 3000) ** 0.5)
    assert right.mean(0).tolist() == pytest.approx([50, 7], abs=5 * 2 / len(right) ** 0.5)
    assert torch.cov(right.T).flatten().tolist() == pytest.approx(
        (factor @ factor.T).flatten().tolist(), abs=5 * 4 * (2 / len(right)) ** 0.5
    )


@pytest.mark.parametrize("truncation", [0.5, 2.0])
def test_truncation_scales_deviations_from_the_mean(truncation):
    prior, truncated = draws(Sampler("prior", (3,)), 10), draws(Sampler("prior", (3,), truncation), 10)
    assert torch.equal(truncated, truncation * prior)
    parts = {"bounds": torch.ones(1), "means": torch.full((1, 2), 10.0), "factors": torch.ones(1, 2)}
    whole, part = draws(Mixture("m", (2,), **parts), 10), draws(Mixture("m", (2,), truncation, **parts), 10)
    assert torch.allclose(part - 10, truncation * (whole - 10), atol=1e-5)  # float32 near 10


def test_a_sampler_is_told_by_its_name():
    assert Sampler("prior", (2,)).name == ""
    assert Sampler("prior", (2,), 0.7).name == "prior-0.7"
    parts = {"bounds": torch.ones(1), "means": torch.ones(1, 2), "factors": torch.ones(1, 2)}
    assert Mixture("mixture", (2,), **parts).name == "mixture"
    assert Mixture("mixture", (2,), 0.7, **parts).name == "mixture-0.7"


def test_a_mixture_is_fitted_by_one_thread_whose_sums_are_the_same_everywhere(levels, monkeypatch):
    from sklearn.mixture import GaussianMixture  # it takes seconds to import

    used, plain = [], GaussianMixture.fit

    def noting(self, codes):
        used.extend(pool["num_threads"] for pool in threadpool_info())
        return plain(self, codes)

    monkeypatch.setattr(GaussianMixture, "fit", noting)
    with threadpool_limits(2):
        once = fit("mixture", *levels, components=3)
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}
    again = fit("mixture", *levels, components=3)
    assert {*used} == {1}
    for name in ("bounds", "means", "factors"):
        assert torch.equal(getattr(once, name), getattr(again, name))


def test_codes_of_too_many_numbers_get_no_covariances(levels):
    encoder, images = levels
    with pytest.raises(ValueError, match=r"more images than 12; there are 12\. Use --sampler resample"):
        fit("mixture", encoder, images, num=12)
    encoder.system.latent_shape = (5, 16, 16)
    with pytest.raises(ValueError, match="codes of 1,280 numbers, at most 1,024"):
        fit("mixture", encoder, images)
