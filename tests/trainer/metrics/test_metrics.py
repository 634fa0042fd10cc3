"""Measures: closed forms, torch-fidelity's numbers on the same features, sums in any order."""

import numpy as np
import pytest
import torch
from evaluators import fidelity
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from trainer.exact_sum import ExactSum
from trainer.metrics.fid import frechet
from trainer.metrics.images import Codes, Spectrum, laplacian_variance, ssim
from trainer.metrics.inception_score import InceptionScore
from trainer.metrics.kid import mmd, subsets
from trainer.metrics.prdc import Neighbours, manifold_scores, neighbours, radii
from trainer.metrics.statistics import ROWS, Gaussian, Moments


def features(n, dim=16, shift=0.0, seed=0) -> torch.Tensor:
    """Correlated, with a mean, and a column that is always 0, as a ReLU's features are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, dim, generator=generator) @ torch.randn(dim, dim, generator=torch.Generator().manual_seed(9))
    mixed = (mixed + shift).relu()
    mixed[:, 0] = 0
    return mixed


def gaussian(*parts) -> Gaussian:
    moments = Moments(parts[0].shape[1], torch.device("cpu"))
    for part in parts:
        moments.update(part)
    return Moments.gaussian(moments.parts)


def all_rows(count) -> list[slice]:
    return [slice(i, min(i + ROWS, count)) for i in range(0, count, ROWS)]


def manifold(fake, real) -> dict[str, float]:
    parts = all_rows(len(fake))
    counts = neighbours(fake, real, radii(fake, parts), radii(real, all_rows(len(real))), parts)
    return manifold_scores(counts, len(fake))


def test_moments_are_numpys():
    values = features(300)
    found = gaussian(*values.split(64))
    np.testing.assert_allclose(found.mu, values.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(values.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    assert found.n == 300
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        gaussian(values[:1])


def test_a_sum_is_the_same_to_the_bit_in_any_order_and_over_any_processes():
    terms = [torch.randn(7, 7, dtype=torch.float64) * 10.0**i for i in (-3, 0, 2, 5) for _ in range(50)]
    forth, back, halves = (ExactSum((7, 7), torch.device("cpu")) for _ in range(3))
    others = ExactSum((7, 7), torch.device("cpu"))
    for term, opposite in zip(terms, reversed(terms), strict=True):
        forth.add(term)
        back.add(opposite)
    for i, term in enumerate(terms):
        (halves if i % 3 else others).add(term)
    expected = sum(terms)
    assert torch.equal(forth.parts, back.parts)
    assert torch.equal(forth.parts, halves.parts + others.parts)
    # The ordinary sum rounds 200 times, to 2^-53 of less than 50 * 4 * 1e5 each time.
    torch.testing.assert_close(forth.parts.sum(0), expected, rtol=0, atol=200 * 2**-53 * 50 * 4 * 1e5)


def test_a_sum_keeps_what_an_ordinary_one_loses_in_some_orders():
    large, small = 2.0**30, 2.0**-40
    assert (large + small) - large == 0 != (large - large) + small == small
    for terms in ([large, small, -large], [large, -large, small]):
        total = ExactSum((), torch.device("cpu"))
        for term in terms:
            total.add(torch.tensor(term, dtype=torch.float64))
        assert total.parts.sum() == small


def test_frechet_distance_in_closed_form():
    """Between Gaussians whose covariances commute: |m|^2 + sum (sqrt a - sqrt b)^2."""
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0, 0.25]).double(), torch.tensor([4.0, 4.0, 1.0, 1.0, 0.0]).double()
    mean = torch.arange(5.0).double()
    one = Gaussian(mean, basis @ a.diag() @ basis.T, 10)
    other = Gaussian(torch.zeros(5).double(), basis @ b.diag() @ basis.T, 10)
    expected = 30 + (a.sqrt() - b.sqrt()).square().sum().item()
    assert frechet(one, other) == pytest.approx(expected, rel=1e-7)
    assert frechet(other, one) == pytest.approx(expected, rel=1e-7)
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n", [300, 12])  # of 16 features: of full rank, and not
def test_frechet_distance_is_torch_fidelitys(n):
    fake, real = features(n, seed=1, shift=0.3), features(400, seed=2)
    assert frechet(gaussian(fake), gaussian(real)) == fidelity(fake, real)


def test_frechet_distance_of_few_images_does_not_depend_on_threads_or_rounding():
    """Of a covariance of low rank most eigenvalues are rounding, whose roots would be seven digits more."""
    fake, real = features(100, 256, seed=1, shift=0.3), features(120, 256, seed=2)
    found = []
    for threads, order in ((1, slice(None)), (2, slice(None)), (1, torch.randperm(100))):
        torch.set_num_threads(threads)
        mean = fake[order].double().mean(0)
        sigma = (fake[order].double() - mean).T @ (fake[order].double() - mean) / 99
        found.append(frechet(Gaussian(mean, sigma, 100), gaussian(real)))
    # Each of 256 eigenvalues errs by 256 * 2^-52 of the largest; a root of one that counts, by a hundred times that.
    assert found == pytest.approx([found[0]] * 3, rel=256 * 256 * 2**-52 * 100)


@pytest.mark.parametrize("power", [-1.0, -2.5])
def test_frechet_distance_of_spectra_that_fall_off(power):
    """tr (A B)^(1/2) is the sum of singular values of the centred features' product, whose small ones count."""
    scales = torch.arange(1, 129).double() ** power
    fake, real = (torch.randn(n, 128, dtype=torch.float64) * scales + shift for n, shift in ((400, 0.1), (300, 0.0)))
    a, b = ((part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (fake, real))
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    expected = (fake.mean(0) - real.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * overlap
    gaussians = (Gaussian(part.mean(0), part.T.cov(), len(part)) for part in (fake, real))
    assert frechet(*gaussians) == pytest.approx(expected.item(), rel=1e-9)


def test_inception_score_is_torch_fidelitys():
    logits = 3 * torch.randn(205, 7)
    metric = InceptionScore(205, 7)
    for index in torch.arange(205).split(64):
        metric.update(logits[index], index)
    expected = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    assert InceptionScore.compute(metric.parts) == pytest.approx([*expected.values()], rel=1e-9)


@pytest.mark.parametrize("n", [1100, 70])
def test_kernel_distance_is_torch_fidelitys(n):
    fake, real = features(n, seed=1, shift=0.1), features(1200, seed=2)
    drawn = subsets(n, 1200, count=5)
    found = [mmd(fake[a], real[b]) for a, b in drawn]
    options = {"kid_subsets": 5, "kid_subset_size": min(1000, n), "verbose": False}
    expected = kid_features_to_metric(fake.double(), real.double(), **options)
    # Means of up to 10^6 products of some 100 in either order, each sum rounded to 2^-53 at every term.
    rounding = 1e6 * 2**-53 * 200
    assert np.mean(found) == pytest.approx(expected["kernel_inception_distance_mean"], abs=rounding)
    assert np.std(found) == pytest.approx(expected["kernel_inception_distance_std"], abs=rounding)


def test_a_subset_of_all_images_is_drawn_once():
    fake, real = features(70, seed=1, shift=0.1), features(70, seed=2)
    ((a, b),) = subsets(70, 70)
    expected = kid_features_to_metric(fake.double(), real.double(), kid_subset_size=70, verbose=False)
    assert mmd(fake[a], real[b]) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert expected["kernel_inception_distance_std"] == pytest.approx(0, abs=70**2 * 2**-53 * 200)  # as above


def test_kernel_distance_of_halves_of_one_set_is_about_zero_and_may_be_below():
    values = features(2000)
    drawn = subsets(1000, 1000, count=4, most=400)
    found = [mmd(values[:1000][a], values[1000:][b]) for a, b in drawn]
    assert abs(np.mean(found)) < 0.2 * mmd(features(400, shift=0.5), values[:400])
    assert abs(np.mean(found)) < 3 * np.std(found)


def test_precision_and_recall_are_torch_fidelitys():
    fake, real = features(333, seed=1, shift=0.3), features(400, seed=2)
    found = manifold(fake, real)
    expected = prc_features_to_metric(fake.double(), real.double(), verbose=False)
    assert found["precision"] == pytest.approx(expected["precision"], abs=1e-7)  # its mean is of float32
    assert found["recall"] == pytest.approx(expected["recall"], abs=1e-7)
    assert 0.1 < found["precision"] < 1
    assert 0.1 < found["recall"] < 1


def test_density_and_coverage_follow_their_definitions():
    """Naeem et al. 2020, equations 3 and 4, written out."""
    fake, real = features(150, seed=1, shift=0.3).double(), features(130, seed=2).double()
    ball = torch.cdist(real, real).kthvalue(6, dim=1).values
    across = torch.cdist(real, fake)
    found = manifold(fake, real)
    assert found["density"] == pytest.approx((across <= ball[:, None]).double().sum().item() / (5 * 150))
    assert found["coverage"] == pytest.approx((across.min(1).values <= ball).double().mean().item())


def test_a_set_covers_itself_and_one_image_repeated_covers_little():
    real = features(200)
    same = manifold(real, real)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    one = manifold(real[3].expand(200, -1), real)
    assert one["precision"] == 1
    assert one["recall"] <= 0.02
    assert one["coverage"] < 0.3
    far = manifold(real + 100, real)
    assert [*far.values()] == [0, 0, 0, 0]


def test_counts_of_neighbours_add_up_over_processes():
    fake, real = features(700, seed=1, shift=0.2), features(300, seed=2)
    parts = all_rows(700)
    fake_radii = radii(fake, parts[::2]) + radii(fake, parts[1::2])
    assert torch.equal(fake_radii, radii(fake, parts))
    real_radii = radii(real, all_rows(300))
    some, others = (neighbours(fake, real, fake_radii, real_radii, parts[i::2]) for i in range(2))
    added = Neighbours(*(a + b for a, b in zip(some, others, strict=True)))
    assert manifold_scores(added, 700) == manifold(fake, real)
    nothing = neighbours(fake, real, fake_radii, real_radii, [])
    assert [part.sum().item() for part in nothing] == [0, 0, 0, 0]


def test_inception_score_needs_its_splits():
    with pytest.raises(ValueError, match="10 splits"):
        InceptionScore(9, 3)


def test_inception_score_of_sure_and_even_predictions_is_the_number_of_classes():
    metric = InceptionScore(4000, 4)
    metric.update(1e3 * torch.eye(4)[torch.arange(4000) % 4], torch.arange(4000))
    assert metric.compute(metric.parts)[0] == pytest.approx(4, rel=0.02)


def test_sharpness_is_the_variance_of_scipys_laplacian():
    from scipy.ndimage import laplace

    image = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    expected = [laplace(x[0].double().numpy())[1:-1, 1:-1].var(ddof=1) for x in image]
    torch.testing.assert_close(laplacian_variance(image), torch.tensor(expected))


def test_the_spectrum_of_noise_of_waves_and_of_flat_codes():
    """White noise has 1 by definition; of 8 x 8 frequencies without the mean 63 count, 64 - 25 of which are high."""

    def spectrum(*of, certain=-torch.inf):
        sums = Spectrum(torch.device("cpu"))
        for mean in of:
            sums.update(mean, torch.full_like(mean, certain))
        return sums.compute(sums.parts, sum(map(len, of)))

    flat = torch.ones(3, 2, 8, 8)
    wave = torch.cos(torch.pi * torch.arange(8) / 4).expand(3, 2, 8, 8)  # one of 8 cycles, which is low
    alternating = torch.cos(torch.pi * torch.arange(8)).expand(1, 2, 8, 8)
    white = (64 - 25) / 63
    assert spectrum(flat) == 0
    assert spectrum(flat, certain=0.0) == pytest.approx(1)
    assert spectrum(wave) == pytest.approx(0, abs=1e-12)
    assert spectrum(alternating, alternating) == pytest.approx(1 / white)
    # Three images with a power of 1/2 in low frequencies, and one with 1 in high ones.
    assert spectrum(wave, alternating) == pytest.approx(1 / 2.5 / white)


def test_prior_gap_in_closed_form():
    """The Frechet distance to N(0, I), of codes with known moments; posterior noise counts without being drawn."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov(correction=0))).T  # exactly N(0, I)'s moments
    codes = Codes(3, torch.device("cpu"))
    for part in z.split(1000):
        codes.update(part, torch.full_like(part, -torch.inf))
    gap, active = codes.compute(codes.parts)
    assert gap == pytest.approx(0, abs=1e-9)
    assert active == 3
    codes = Codes(3, torch.device("cpu"))
    mean = z * torch.tensor([2.0, 0.6, 0.0]) + torch.tensor([0.5, 0.0, 0.0])
    codes.update(mean, torch.tensor([0.0, 0.64, 1.0]).log().expand(4000, 3))  # variances: 4, 0.36 + 0.64, 0 + 1
    gap, active = codes.compute(codes.parts)
    assert gap == pytest.approx(0.25 + (4**0.5 - 1) ** 2, abs=1e-6)
    assert active == 2
    maps = Codes(3, torch.device("cpu"))
    maps.update(z.view(1000, 2, 2, 3).permute(0, 3, 1, 2), torch.full((1000, 3, 2, 2), -torch.inf))
    assert maps.compute(maps.parts)[0] == pytest.approx(0, abs=1e-9)


def test_ssim_is_that_of_torchmetrics_in_float64():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8, generator=generator)
    image[2] = 77  # without variance
    other = (image * torch.linspace(0, 1, 24)).to(torch.uint8)
    from torchmetrics.functional.image import structural_similarity_index_measure  # it takes seconds to import

    expected = structural_similarity_index_measure(image.double(), other.double(), data_range=255.0, reduction="none")
    # Three windowed means of 121 products of up to 255^2 round by at most 122 * 2^-24 of them; c2 is the least divisor.
    bound = 3 * 122 * 2**-24 * 255**2 / (0.03 * 255) ** 2
    torch.testing.assert_close(ssim(image, other).double(), expected, rtol=0, atol=bound)
