"""Codes by position, and their statistics."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from systems_under_test import SMALL

from data.loader import read
from data.shards.reader import Shards
from models import AE, GAN, VAE
from trainer.batch import normalize
from trainer.latents import LatentEncoder, LatentSums, latent_statistics


@pytest.fixture(scope="module")
def test_images(digits) -> Shards:
    return Shards(digits / "test")


def encoder(kind=VAE, size=32) -> LatentEncoder:
    torch.manual_seed(0)
    return LatentEncoder(kind(size, 1, 4, SMALL).eval().requires_grad_(False), size, 1, "cpu")


def test_a_code_depends_on_its_image_alone(test_images):
    one = encoder()
    pixels = read(test_images, np.arange(100), 32, 1).image
    together = torch.stack(one(pixels))
    for rows in (slice(0, 1), slice(3, 40), slice(70, 100)):
        assert torch.equal(torch.stack(one(pixels[rows])), together[:, rows])
    block = torch.zeros(64, 1, 32, 32)  # a grey image's strides fit both memory formats, of which this has the usual
    block[:] = normalize(pixels[:64])
    alone = one.system.posterior(block)
    assert torch.equal(together[:, :64], torch.stack(alone))


@pytest.mark.parametrize("of", ["draws", "means"])
def test_statistics_are_numpys_in_any_order(test_images, of):
    one = encoder()
    found = latent_statistics(one, [test_images], of=of)
    mean, log_variance = (
        part.double().numpy() for part in one(read(test_images, np.arange(len(test_images)), 32, 1).image)
    )
    variance = mean.var(0) + (np.exp(log_variance).mean(0) if of == "draws" else 0)
    assert found.images == len(test_images)
    # Sums of a few hundred numbers near 1, in float64.
    assert found.latents_mean == pytest.approx(mean.mean(0), rel=1e-12)
    assert found.latents_std == pytest.approx(variance**0.5, rel=1e-12)
    assert found.shift_factor == pytest.approx(mean.mean(), rel=1e-12)
    spread = mean.var() + (np.exp(log_variance).mean() if of == "draws" else 0)
    assert found.scaling_factor == pytest.approx(spread**-0.5, rel=1e-12)
    forth, back = LatentSums(4, of), LatentSums(4, of)
    codes = [torch.from_numpy(mean).float(), torch.from_numpy(log_variance).float()]
    for rows in torch.arange(len(mean)).split(7):
        forth.update(*(part[rows] for part in codes))
    for rows in torch.arange(len(mean)).flip(0).split(64):
        back.update(*(part[rows] for part in codes))
    assert forth.compute() == back.compute() == found


def test_maps_of_codes_are_measured_by_channel():
    mean, log_variance = torch.randn(3, 2, 4, 4) * torch.tensor([1.0, 5.0])[:, None, None], torch.zeros(3, 2, 4, 4)
    sums = LatentSums(2)
    sums.update(mean, log_variance)
    found = sums.compute()
    assert found.latents_std == pytest.approx((mean.double().var((0, 2, 3), correction=0) + 1).sqrt().tolist())
    assert found.scaling_factor == pytest.approx((mean.double().var(correction=0).item() + 1) ** -0.5)


def test_some_of_the_images_are_spread_over_the_set(test_images):
    one = encoder()
    found = latent_statistics(one, [test_images, test_images], 10)
    assert found.images == 20
    positions = np.arange(10) * len(test_images) // 10
    mean, _ = one(read(test_images, positions, 32, 1).image)
    assert found.latents_mean == pytest.approx(mean.double().mean(0).tolist(), rel=1e-12)


def test_a_certain_code_has_no_variance(test_images):
    one = encoder(AE)
    of_means = latent_statistics(one, [test_images], 9, "means")
    assert latent_statistics(one, [test_images], 9) == replace(of_means, of="draws")


def test_what_has_no_latents_is_refused(test_images):
    with pytest.raises(ValueError, match="GAN has no encoder"):
        encoder(GAN)
    one = encoder()
    for parameter in one.system.parameters():
        parameter.zero_()
    with pytest.raises(ValueError, match="same number"):
        latent_statistics(one, [test_images], 9, "means")
    for parameter in one.system.parameters():
        parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        latent_statistics(one, [test_images], 9)
