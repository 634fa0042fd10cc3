"""The adaptive weight of an adversarial loss, from its gradients at the decoder's last layer (VQGAN, LDM)."""

import torch
from torch import Tensor

from models import losses
from models.system import Loss, System, Terms, last_layer


class AdaptiveWeight:
    """The ratio of the gradient norms of two losses at a decoder's last layer (Esser et al. 2021, eq. 7).

    It is that of the step before, so that no pass has to wait for it, and is a buffer of the system.

    Args:
        system: a system with a `decoder`
        limit: the largest weight
    """

    def __init__(self, system: System, limit: float):
        self.system, self.limit = system, limit
        system.register_buffer("adaptive_weight", torch.zeros(()))

    @property
    def _weight(self) -> Tensor:
        return self.system.get_buffer("adaptive_weight")

    def __call__(self, decoded: Tensor, reconstruction: Tensor, generator_loss: Tensor) -> Loss:
        """Return the weight as a Loss's value, with what is logged of it and what `after` needs.

        Args:
            decoded: images that the decoder made, of which both losses are
            reconstruction: mean over pixels
            generator_loss: without its weight and ramp, or the ratio would cancel these
        """
        weight = self._weight.clone()
        terms = {"adaptive_weight": weight, "adaptive_saturated": (weight >= self.limit).to(weight.dtype)}
        return Loss(weight, terms, self._gradients(decoded, reconstruction, generator_loss))

    def after(self, statistics: Terms) -> None:
        """Take the weight from the gradients of a step; nothing, if they are of a step without a generator loss."""
        if "adversarial" in statistics:
            weight = losses.adaptive_weight(statistics["reconstruction"], statistics["adversarial"], self.limit)
            self._weight.copy_(torch.where(weight.isfinite(), weight, self._weight))  # fp16 may overflow now and then

    def _gradients(self, decoded: Tensor, reconstruction: Tensor, generator_loss: Tensor) -> Terms:
        last = last_layer(self.system.get_submodule("decoder")).weight
        gradients = {}
        for name, value in {"reconstruction": reconstruction, "adversarial": generator_loss}.items():
            # fp16 has a small range, so a gradient is scaled up on its way to the images, which are fp32, and rescaled
            # there to magnitudes that sum to 2^8: products with activations below 2^8 then sum to less than 2^16.
            (of_images,) = torch.autograd.grad(2**12 * value, decoded, retain_graph=True)
            size = of_images.abs().sum().clamp(min=1e-30) / 2**8
            (gradient,) = torch.autograd.grad(decoded, last, of_images / size, retain_graph=True)
            gradients[name] = gradient * (size / 2**12)
        return gradients
