"""Images to logits."""

import math
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.networks.blocks import SLOPE, ClassVectors, InstanceNorm, initialize, minibatch_stddev
from models.networks.config import ImageSize, NetworkConfig, halvings, sides
from models.networks.dcgan import strided
from models.networks.families import family_of
from models.networks.spectral_norm import add_spectral_norm


class Discriminator(nn.Module):
    """Levels of convolutions, then logits of the whole image or of each patch (PatchGAN, Isola et al. 2017, 3.2).

    Args:
        logits: outputs per image or patch
        group: images whose common standard deviation the last layer gets as a channel; 0 for none
        patch_halvings: halvings for patches, by default 3 (70 pixels) from 256 pixels on, 2 (34) at 128, 1 (16) at 64
        instance_norm: normalize in a patch discriminator after every convolution but the first and the last
        classes: number of labels; 0 for none. With h the last level's activations, summed over positions, a logit
            gets the term <v, h>, in which v is learned for each class and logit (Miyato & Koyama 2018, eq. 4)
    """

    def __init__(
        self,
        config: NetworkConfig,
        image_size: ImageSize,
        channels: int,
        logits: int,
        spectral_norm: bool = False,
        group: int = 0,
        patch_halvings: int | None = None,
        instance_norm: bool = False,
        classes: int = 0,
    ):
        super().__init__()
        self.patches, self.group = config.patches, group
        if config.patches:
            if patch_halvings is None:
                patch_halvings = min(max(1, (min(sides(image_size)) // 32).bit_length() - 1), 3)
            strides = [*[2] * patch_halvings, 1]
            levels = strided(config, channels, strides, InstanceNorm if instance_norm else None)
            self.head: nn.Conv2d | nn.Linear = nn.Conv2d(config.channels(patch_halvings) + bool(group), logits, 4, 1, 1)
        else:
            ends, count = halvings(image_size)
            levels = family_of(config).down(replace(config, norm="none"), min(sides(image_size)), channels, count)
            self.head = nn.Linear((config.channels(count - 1) + bool(group)) * math.prod(ends), logits)
        self.levels = nn.ModuleList(levels)
        self.projection = ClassVectors(classes, logits * config.channels(len(levels) - 1)) if classes else None
        initialize(self, SLOPE, zero_init_residual=not spectral_norm)
        nn.init.xavier_normal_(self.head.weight)
        if self.projection is not None:  # so that a term is of the size of an activation, as a logit is
            nn.init.normal_(self.projection.weight, std=self.head.weight[0].numel() ** -0.5)
        if spectral_norm:
            add_spectral_norm(self)

    def forward(self, image: Tensor, label: Tensor | None = None, feature_layer: int | None = None) -> Tensor:
        """Map images to logits [n, logits], or of patches [n, logits, h, w], or to the activations of a level.

        `label`, int64 [n], is needed for logits with `classes` only.
        """
        hidden = image
        with sdpa_kernel(SDPBackend.MATH) if self.differentiated_twice(image) else nullcontext():
            for level, layer in enumerate(self.levels):
                hidden = layer(hidden)
                if level == feature_layer:
                    return hidden
        shown = minibatch_stddev(hidden, self.group) if self.group else hidden
        logits = self.head(shown if self.patches else shown.flatten(1))
        if self.projection is None:
            return logits
        vectors = self.projection(label).to(hidden.dtype).unflatten(1, (logits.shape[1], -1))
        return logits + (vectors @ hidden.flatten(2).sum(2, keepdim=True)).squeeze(2)

    def differentiated_twice(self, image: Tensor) -> bool:
        """Return whether a pass may belong to a gradient penalty: both the images and the weights take gradients.

        Fused attention and compiled networks have no second derivatives.
        """
        return torch.is_grad_enabled() and image.requires_grad and next(self.parameters()).requires_grad
