"""Scores computed again by torch-fidelity's `calculate_metrics` from the same images, on one rank."""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from trainer.batch import visible_pixels
from trainer.evaluate.accumulators import ImagesByIndex
from trainer.evaluate.extractors.extractor import BATCH, Extractor
from trainer.precision import strict_fp32

RELATIVE = 1e-4
# Limits near zero, where a relative difference means nothing: rounding of torch-fidelity's own square root and sums.
ABSOLUTE = {"fid": 1e-4, "kid": 1e-9}
NAMES = {  # torch-fidelity's names of our scores, and of the settings that request them
    "fid": ("frechet_inception_distance", "fid"),
    "is": ("inception_score_mean", "isc"),
    "is_std": ("inception_score_std", "isc"),
    "kid": ("kernel_inception_distance_mean", "kid"),
    "kid_std": ("kernel_inception_distance_std", "kid"),
    "precision": ("precision", "prc"),
    "recall": ("recall", "prc"),
}


class AuditedScore(NamedTuple):
    """A score, and torch-fidelity's value of it."""

    name: str
    value: float
    expected: float
    agrees: bool

    def __str__(self) -> str:
        mark = "agrees" if self.agrees else "DISAGREES"
        return f"audit: {self.name} {self.value:.8g}, torch-fidelity {self.expected:.8g}: {mark}"


class _ImageDataset(Dataset[Tensor]):
    """A dataset of `num` images, which `images` gives in blocks."""

    def __init__(self, images: ImagesByIndex, num: int):
        self.images, self.num, self.block, self.loaded = images, num, -1, torch.empty(0)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> Tensor:
        if i // BATCH != self.block:
            self.block = i // BATCH
            self.loaded = visible_pixels(self.images(torch.arange(self.num).split(BATCH)[self.block])).cpu()
        return self.loaded[i % BATCH]


def audit(
    extractor: Extractor,
    fake: ImagesByIndex,
    num_fake: int,
    real: ImagesByIndex,
    num_real: int,
    scores: dict[str, float],
    device: torch.device,
) -> list[AuditedScore]:
    """Return torch-fidelity's values of our scores, for those that it computes too.

    torch-fidelity gets the images, and the extractor with features in float64, as it computes in their precision.

    `fake` and `real` give images by their indices, of which there are `num_fake` and `num_real`.
    """
    known = {}
    for name, value in scores.items():
        match = re.fullmatch(rf"eval/([a-z_]+?)\d+k?(?:/[\w.-]+)?/{re.escape(extractor.name)}", name)
        if match and match[1] in NAMES:
            known[match[1]] = (name, value)
    if not known:
        return []
    requested: dict[str, Any] = {NAMES[metric][1]: True for metric in known}
    with strict_fp32(device):
        results = calculate_metrics(
            input1=_ImageDataset(fake, num_fake),
            input2=_ImageDataset(real, num_real),
            feature_extractor=_register(extractor),
            kid_subset_size=min(1000, num_fake, num_real),
            batch_size=BATCH,
            cuda=device.type == "cuda",
            cache=False,
            save_cpu_ram=True,
            verbose=False,
            **requested,
        )
    audited = []
    for metric, (name, value) in known.items():
        expected = float(results[NAMES[metric][0]])
        limit = max(RELATIVE * abs(expected), ABSOLUTE.get(metric.removesuffix("_std"), 1e-7))
        audited.append(AuditedScore(name, value, expected, abs(value - expected) <= limit))
    return audited


def _register(extractor: Extractor) -> str:
    """Register the extractor, with features in float64, and return its name in torch-fidelity's registry."""

    class Adapter(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **unused: Any):
            super().__init__(name, features_list)

        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            outputs = dict(zip(("features", "logits"), extractor(image), strict=True))
            return tuple(outputs[name].double() for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    name = f"audited-{extractor.name}-{extractor.sha256[:8]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, Adapter)
    return name
