"""Metrics of images and of codes: sharpness, PSNR, SSIM, how codes fit the prior, and their spectrum."""

import torch
from torch import Tensor, nn

from trainer.batch import peak
from trainer.exact_sum import ExactSum


class Codes(ExactSum):
    """Sums for how codes fit the prior N(0, I): codes [n, dim], or maps of codes [n, dim, ...]."""

    def __init__(self, dim: int, device: torch.device):
        super().__init__((dim + 2, dim + 1), device)
        self.dim = dim

    def update(self, mean: Tensor, log_variance: Tensor) -> None:
        """Add the means and log-variances [n, dim, ...] of posteriors."""
        mean, variance = (
            x.double().flatten(2).transpose(1, 2).reshape(-1, self.dim) if x.dim() > 2 else x.double()
            for x in (mean, log_variance.exp())
        )
        extended = torch.cat([mean, torch.ones_like(mean[:, :1])], 1)
        self.add(torch.cat([extended.T @ extended, nn.functional.pad(variance.sum(0, keepdim=True), (0, 1))]))

    def compute(self, parts: Tensor) -> tuple[float, float]:
        """Return the prior gap and the number of active units, from `parts` summed over ranks.

        The gap is the Frechet distance between the codes' N(m, C) and N(0, I): |m|^2 + tr(C + I - 2 C^(1/2)), where C
        is the covariance of draws from the posteriors, in closed form. A unit is active if the variance of its mean
        over the images is above 0.01 (Burda et al. 2016, section 5.2).
        """
        total = parts.sum(0).cpu()
        count = total[-2, -1]
        mean, variance = total[-2, :-1] / count, total[-1, :-1] / count
        between = total[:-2, :-1] / count - mean[:, None] * mean
        roots = torch.linalg.eigvalsh(between + variance.diag()).clamp(min=0).sqrt()
        gap = mean.square().sum() + (roots - 1).square().sum()
        return gap.item(), (between.diag() > 0.01).double().sum().item()


class Spectrum(ExactSum):
    """Sums for the high frequencies of maps of codes [n, channels, h, w], with h and w at least 2."""

    def __init__(self, device: torch.device):
        super().__init__((3,), device)

    def update(self, mean: Tensor, log_variance: Tensor) -> None:
        """Add the means and log-variances of posteriors; draws from them count in closed form, as white noise does."""
        sides = mean.shape[2:]
        rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64, device=mean.device).abs() for side in sides)
        largest = torch.maximum(rows[:, None], columns)
        power = torch.fft.fft2(mean.double(), norm="ortho").abs().square().mean(1)
        power = power + log_variance.double().exp().mean((1, 2, 3))[:, None, None]
        high, white = largest > 0.25, ((largest > 0.25).sum() / (largest > 0).sum()).double()
        images = [power[:, band].sum(1) / (largest > 0).sum() for band in (high, largest > 0)]
        self.add(torch.stack([*images, white.expand(len(mean))], 1))

    @staticmethod
    def compute(parts: Tensor, count: int) -> float:
        """Return the share of high frequencies in the codes' power, as a multiple of that in white noise.

        High are those above a quarter of a cycle per position, in height or width, which half the size cannot hold.
        The mean of each code's map does not count. 0 is smooth, 1 is white noise. Skorokhodov et al. 2025
        look at the same by a DCT.
        """
        high, whole, white = parts.sum(0).tolist()
        return high / whole / (white / count) if whole else 0.0


def laplacian_variance(image: Tensor) -> Tensor:
    """Return the sharpness [n] of uint8 images [n, c, h, w]: the variance of the Laplacian of their grey values."""
    grey = image.float().sum(1)  # integers, as is everything up to the sums below, which are therefore exact
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    values = laplacian.double().flatten(1)
    n = values.shape[1]
    return (values.square().sum(1) - values.sum(1).square() / n) / (n - 1) / image.shape[1] ** 2


def ssim(image: Tensor, other: Tensor) -> Tensor:
    """Return the structural similarity [n] of images [n, c, h, w] (Wang et al. 2004), to about five digits.

    They are uint8 or uint16.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds

    # Few at once and in float32: 64 images of 256 pixels, in float64, take 20 GB and 30 times as long on a CPU.
    few, largest = max(1, 2**14 // (image.shape[-2] * image.shape[-1])), float(peak(image))
    pairs = zip(image.float().split(few), other.float().split(few), strict=True)
    values = [structural_similarity_index_measure(*pair, data_range=largest, reduction="none") for pair in pairs]
    return torch.cat([value for value in values if isinstance(value, Tensor)])


def psnr(image: Tensor, other: Tensor) -> Tensor:
    """Return 10 log10(peak^2 / mean squared error) [n] of images [n, c, h, w] in decibels, at most 148 or 196.

    The peak is 255 of uint8, and 65535 of uint16.
    """
    error = (image.double() - other.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(peak(image) ** 2 / error.clamp(min=1e-10))
