"""Spectral normalization that iterates once per optimizer step; torch's own also depends on micro-batches."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize


class SpectralNorm(nn.Module):
    """weight / sigma, sigma the current estimate of its largest singular value (Miyato et al. 2018, algorithm 1)."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("v", normalize(torch.randn(matrix.shape[1]), dim=0))
        for _ in range(0 if weight.is_meta else 15):  # without values, they would only take seconds
            self.iterate(weight)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        matrix = weight.flatten(1)
        self.v.copy_(normalize(matrix.t() @ self.u, dim=0))
        self.u.copy_(normalize(matrix @ self.v, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight / torch.dot(self.u, weight.flatten(1) @ self.v)


def add_spectral_norm(network: nn.Module) -> None:
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # Without `unsafe`, torch would try a forward pass, whose autocast the meta device does not have.
            parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight), unsafe=True)


def iterate_spectral_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], SpectralNorm):
            module[0].iterate(module.original)
