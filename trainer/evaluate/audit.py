"""Scores by an independent path: torch-fidelity's `calculate_metrics` on the same images, on one process."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from trainer.batch import strict_fp32
from trainer.evaluate.extractors.extractor import BATCH, Extractor, to_rgb
from trainer.evaluate.extractors.inception import Inception

RELATIVE = 1e-4
# Near zero a relative difference means nothing: what torch-fidelity's own square root errs by, and the others' sums.
ABSOLUTE = {"fid": 1e-4, "kid": 1e-9}
NAMES = {  # of torch-fidelity's results, and of the settings that ask for them
    "fid": ("frechet_inception_distance", "fid"),
    "is": ("inception_score_mean", "isc"),
    "is_std": ("inception_score_std", "isc"),
    "kid": ("kernel_inception_distance_mean", "kid"),
    "kid_std": ("kernel_inception_distance_std", "kid"),
    "precision": ("precision", "prc"),
    "recall": ("recall", "prc"),
}


class Line(NamedTuple):
    """A score, as it was and as torch-fidelity has it."""

    name: str
    value: float
    expected: float
    agrees: bool

    def __str__(self) -> str:
        mark = "agrees" if self.agrees else "DISAGREES"
        return f"audit: {self.name} {self.value:.8g}, torch-fidelity {self.expected:.8g}: {mark}"


class Pixels(Dataset[Tensor]):
    """Images of a callable that gives them by blocks, one by one."""

    def __init__(self, images: Callable[[Tensor], Tensor], num: int, colour: bool):
        self.images, self.num, self.colour = images, num, colour
        self.block, self.held = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> Tensor:
        if i // BATCH != self.block:
            self.block = i // BATCH
            index = torch.arange(self.num)[self.block * BATCH : (self.block + 1) * BATCH]
            held = self.images(index).cpu()
            self.held = to_rgb(held) if self.colour else held
        return self.held[i % BATCH]


def audit(
    extractor: Extractor,
    fake: Callable[[Tensor], Tensor],
    num_fake: int,
    real: Callable[[Tensor], Tensor],
    num_real: int,
    scores: dict[str, float],
    device: torch.device,
) -> list[Line]:
    """What torch-fidelity has for each of our scores that it knows, too.

    InceptionV3 is torch-fidelity's own, built by itself of the same weights; its features, and any other extractor's,
    are handed to its measures in float64, whose own are of float32.

    Args:
        extractor: of the scores
        fake, real: images by their indices [n], uint8 [n, c, h, w]
        num_fake, num_real: how many
        scores: ours, by name
        device: of the extractor
    """
    found = {}
    for name, value in scores.items():
        match = re.fullmatch(rf"eval/([a-z_]+?)\d+k?/{re.escape(extractor.name)}", name)
        if match and match[1] in NAMES:
            found[match[1]] = (name, value)
    asked: dict[str, Any] = {NAMES[measure][1]: True for measure in found}
    if not asked:
        return []
    colour = isinstance(extractor, Inception)
    with strict_fp32(device):
        told = calculate_metrics(
            input1=Pixels(fake, num_fake, colour),
            input2=Pixels(real, num_real, colour),
            feature_extractor=_registered(extractor),
            feature_extractor_weights_path=str(extractor.path) if isinstance(extractor, Inception) else None,
            kid_subset_size=min(1000, num_fake, num_real),
            batch_size=BATCH,
            cuda=device.type == "cuda",
            cache=False,
            save_cpu_ram=True,
            verbose=False,
            **asked,
        )
    lines = []
    for measure, (name, value) in found.items():
        expected = float(told[NAMES[measure][0]])
        limit = max(RELATIVE * abs(expected), ABSOLUTE.get(measure.removesuffix("_std"), 1e-7))
        lines.append(Line(name, value, expected, abs(value - expected) <= limit))
    return lines


def _registered(extractor: Extractor) -> str:
    """A name in torch-fidelity's registry of the extractor, with features in float64."""
    name = f"audited-{extractor.name}-{extractor.sha256[:8]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        own = isinstance(extractor, Inception)
        kind = _doubled(FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"]) if own else _wrapped(extractor)
        register_feature_extractor(name, kind)
    return name


def _doubled(kind: Any) -> type[FeatureExtractorBase]:
    class Doubled(kind):
        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            return tuple(features.double() for features in super().forward(image))

    return Doubled


def _wrapped(extractor: Extractor) -> type[FeatureExtractorBase]:
    class Wrapped(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **settings: Any):
            super().__init__(name, features_list)
            self.calls = [extractor]  # no child: it stays as it is

        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            found = dict(zip(("features", "logits"), self.calls[0](image), strict=True))
            return tuple(found[name].double() for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    return Wrapped
