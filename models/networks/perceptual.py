"""Distances between images in a trained network's features."""

import hashlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

PerceptualKind = Literal["lpips", "convnext"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for images in [0, 1]


class WeightsFile(str):
    """Path of a file of weights, which the trainer's parser makes absolute."""


class Perceptual(nn.Module):
    """The distance of images in the features of a frozen torchvision network, in fp32.

    lpips: squared differences of normalized features of VGG16's five blocks, weighted by LPIPS's linear layers, which
    torchmetrics ships (Zhang et al. 2018, eq. 1). convnext: the squared difference of ConvNeXt-S's logits at 224 pixels
    (as in 1d-tokenizer). `weights` is a file of torchvision's vgg16 or convnext_small weights, which `setting` gives.
    """

    def __init__(self, kind: PerceptualKind, weights: str, setting: str = "system.perceptual_weights"):
        super().__init__()
        import torchvision.models  # takes a second

        self.kind = kind
        with torch.device("meta"):  # to draw weights that the file replaces would take seconds
            network = getattr(torchvision.models, {"lpips": "vgg16", "convnext": "convnext_small"}[kind])(weights=None)
        try:
            with Path(weights).open("rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), assign=True)
        except Exception as error:  # pickle, zipfile and load_state_dict raise many types for a file of another kind
            raise ValueError(
                f"{setting}: {weights} is not torchvision's state_dict of "
                f"{'VGG16' if kind == 'lpips' else 'ConvNeXt-S'} ({str(error).splitlines()[0]})"
            ) from error
        self.network = network.features if kind == "lpips" else network
        if kind == "lpips":
            path = files("torchmetrics") / "functional" / "image" / "lpips_models" / "vgg.pth"
            with path.open("rb") as shipped:
                layers = torch.load(shipped, map_location="cpu", weights_only=True)  # on meta while tensors are fake
            for i in range(5):
                self.register_buffer(f"linear{i}", layers[f"lin{i}.model.1.weight"].to("cpu"))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, target: Tensor, prediction: Tensor) -> Tensor:
        """Return the mean distance of images [n, 1 or 3, height, width] in [-1, 1], a scalar."""
        with torch.autocast(target.device.type, enabled=False):
            if self.kind == "lpips":
                return torch.stack([part.mean() for part in self._lpips(target, prediction)]).sum()
            (a,), (b,) = (self._features(image.float()) for image in (target, prediction))
            return (a - b).square().mean()

    def each(self, target: Tensor, prediction: Tensor) -> Tensor:
        """Return LPIPS [n] of images [n, 1 or 3, height, width] in [-1, 1]; 0 if they are the same."""
        return torch.stack([part.mean((1, 2)) for part in self._lpips(target, prediction)]).sum(0)

    def _features(self, image: Tensor) -> list[Tensor]:
        hidden = ((image.expand(-1, 3, -1, -1) + 1) / 2 - self.get_buffer("mean")) / self.get_buffer("std")
        if self.kind == "convnext":
            return [self.network(interpolate(hidden, (224, 224), mode="bilinear", antialias=True))]
        features = []
        for layer in list(self.network)[:-1]:
            if isinstance(layer, nn.MaxPool2d):
                features.append(hidden)
            hidden = layer(hidden)
        return [*features, hidden]

    def _lpips(self, target: Tensor, prediction: Tensor) -> Iterator[Tensor]:
        """Yield the distance at each position of each block's features."""
        blocks = zip(*(self._features(image.float()) for image in (target, prediction)), strict=True)
        for i, pair in enumerate(blocks):
            # The small number is inside the root, as in torchmetrics, or the gradient of flat images would be infinite.
            a, b = (x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt() for x in pair)
            yield ((a - b).square() * self.get_buffer(f"linear{i}")).sum(1)
