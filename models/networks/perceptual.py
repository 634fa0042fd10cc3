"""Distances between images in a trained network's features."""

from collections.abc import Iterator
from functools import partial
from importlib.resources import files
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from models.networks.dino import DINO
from models.networks.trained import Trained
from models.resize import resize

PerceptualKind = Literal["lpips", "convnext", "dino"]


class Perceptual(nn.Module):
    """The distance of images in the features of a frozen network, in fp32.

    lpips: squared differences of normalized features of VGG16's five blocks, weighted by LPIPS's linear layers, which
    torchmetrics ships (Zhang et al. 2018, eq. 1). convnext: the squared difference of ConvNeXt-S's logits at 224 pixels
    (as in 1d-tokenizer). dino: 1 - cos of the features of each patch, the mean over four depths of one of DINO's vision
    transformers. `weights` is a file of torchvision's vgg16 or convnext_small weights, or one that `DINO` takes, which
    `setting` gives.
    """

    def __init__(self, kind: PerceptualKind, weights: str, setting: str = "system.perceptual_weights"):
        super().__init__()
        self.kind = kind
        self.trained = DINO(weights, setting) if kind == "dino" else _torchvisions(kind, weights, setting)
        if kind == "lpips":
            self.trained.network = self.trained.network.features
            path = files("torchmetrics") / "functional" / "image" / "lpips_models" / "vgg.pth"
            with path.open("rb") as shipped:
                layers = torch.load(shipped, map_location="cpu", weights_only=True)  # on meta while tensors are fake
            for i in range(5):
                self.register_buffer(f"linear{i}", layers[f"lin{i}.model.1.weight"].to("cpu"))
        self.eval()

    @property
    def sha256(self) -> str:
        return self.trained.sha256

    @property
    def setting(self) -> str:
        return self.trained.setting

    def forward(self, target: Tensor, prediction: Tensor) -> Tensor:
        """Return the mean distance of images [n, 1 or 3, height, width] in [-1, 1], a scalar."""
        with torch.autocast(target.device.type, enabled=False):
            if self.kind == "lpips":
                return torch.stack([part.mean() for part in self._lpips(target, prediction)]).sum()
            pairs = zip(*(self._features(image) for image in (target, prediction)), strict=True)
            if self.kind == "dino":
                return torch.stack([1 - cosine_similarity(a, b).mean() for a, b in pairs]).mean()
            ((a, b),) = pairs
            return (a - b).square().mean()

    def each(self, target: Tensor, prediction: Tensor) -> Tensor:
        """Return LPIPS [n] of images [n, 1 or 3, height, width] in [-1, 1]; 0 if they are the same."""
        return torch.stack([part.mean((1, 2)) for part in self._lpips(target, prediction)]).sum(0)

    def _features(self, image: Tensor) -> list[Tensor]:
        if self.kind == "dino":
            return self.trained(image)
        hidden = self.trained.standardized(image)
        if self.kind == "convnext":
            return [self.trained.network(resize(hidden, (224, 224)))]
        features = []
        for layer in list(self.trained.network)[:-1]:
            if isinstance(layer, nn.MaxPool2d):
                features.append(hidden)
            hidden = layer(hidden)
        return [*features, hidden]

    def _lpips(self, target: Tensor, prediction: Tensor) -> Iterator[Tensor]:
        """Yield the distance at each position of each block's features."""
        blocks = zip(*(self._features(image) for image in (target, prediction)), strict=True)
        for i, pair in enumerate(blocks):
            # The small number is inside the root, as in torchmetrics, or the gradient of flat images would be infinite.
            a, b = (x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt() for x in pair)
            yield ((a - b).square() * self.get_buffer(f"linear{i}")).sum(1)


def _torchvisions(kind: PerceptualKind, weights: str, setting: str) -> Trained:
    import torchvision.models  # takes a second

    build, name = {"lpips": ("vgg16", "VGG16"), "convnext": ("convnext_small", "ConvNeXt-S")}[kind]
    empty = partial(getattr(torchvision.models, build), weights=None)
    return Trained(weights, setting, f"torchvision's state_dict of {name}", lambda state: (empty(), state))
