"""Scores of a system's reconstructions, and of its codes."""

from torch import Tensor

from data.loader import Samples
from models import System
from trainer.batch import normalize
from trainer.evaluate.extractors.lpips import LPIPS
from trainer.evaluate.feature_scores import FeatureScores
from trainer.evaluate.image_features import ImageFeatures
from trainer.metrics.images import Codes, Spectrum, psnr, ssim
from trainer.metrics.statistics import ReferenceStatistics, short


def reconstruction_scores(
    system: System,
    held_out: Samples,
    reference: ReferenceStatistics,
    images: ImageFeatures,
    scores: FeatureScores,
    lpips: LPIPS | None,
) -> dict[str, float]:
    """Return FID, PSNR, SSIM and sharpness of held-out images' reconstructions, and how their codes fit the prior.

    Args:
        system: a system that can reconstruct, in eval mode
        held_out: images that it reconstructs
        reference: their statistics
        images: reads them, and gives features
        scores: computes the FID in the background
        lpips: network of another score, the distance LPIPS
    """
    ranks, device = images.ranks, images.ranks.device
    sums = {name: images.sum() for name in ("psnr", "ssim", *([lpips.name] if lpips else []))}
    codes, spectrum = Codes(system.latent_shape[0], device), Spectrum(device)
    maps = len(system.latent_shape) == 3 and min(system.latent_shape[1:]) > 1

    def reconstructed(index: Tensor) -> Tensor:
        image, label, *_ = images.read(held_out, index)
        made = images.pixels(system.reconstruct(normalize(image), *system.told(label)))
        pair = image.to(device), made.to(device)
        values = {"psnr": psnr(*pair), "ssim": ssim(*reversed(pair))}
        if lpips:
            values[lpips.name] = lpips(image, made)
        for name, value in values.items():
            sums[name].add(value.to(device).double().sum())
        posterior = [part.to(device) for part in system.posterior(normalize(image))]
        for sums_of_codes in (codes, spectrum) if maps else (codes,):
            sums_of_codes.update(*posterior)
        return made

    statistics, count = images.statistics(reconstructed, len(held_out)), short(len(held_out))
    gap, active = codes.compute(ranks.sum(codes.parts))
    high = {f"eval/spectrum{count}": spectrum.compute(ranks.sum(spectrum.parts), len(held_out))} if maps else {}
    return {
        **scores.start_fid(f"rfid{count}", statistics, reference),
        **{f"eval/{name}{count}": ranks.total(value) / len(held_out) for name, value in sums.items()},
        f"eval/sharpness_reconstructed{count}": statistics.sharpness / (reference.sharpness or float("nan")),
        f"eval/prior_gap{count}": gap,
        f"eval/active_units{count}": active,
        **high,
    }
