"""Extractors of torch-fidelity's registry."""

import torch
from torch import Tensor, nn

from trainer.distributed.launcher import is_local_main
from trainer.evaluate.extractors.extractor import first_line, resize, to_rgb, weights_sha256


class Registered(nn.Module):
    """An extractor of torch-fidelity's registry, with the layer that torch-fidelity uses for FID.

    It has classes if torch-fidelity uses another layer for the inception score. DINOv2 gets images resized to 224
    pixels, bicubic and antialiased, as in published distances (Stein et al. 2023; Karras et al. 2024); torch-fidelity
    would resize differently.
    """

    def __init__(self, name: str):
        super().__init__()
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        self.name = name
        self.layers = [kind.get_default_feature_layer_for_metric("fid")]
        logits = kind.get_default_feature_layer_for_metric("isc")
        if logits not in self.layers:
            self.layers.append(logits)
        self.network = kind(name, self.layers).eval()
        self.size = 224 if name.startswith("dinov2") else None
        self.resize = "antialiased bicubic to 224, rounded" if self.size else "torch-fidelity's own"
        features, last = self(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        self.dim, self.classes = features.shape[1], last.shape[1] if len(self.layers) > 1 else 0
        self.sha256 = weights_sha256(self.network)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network(to_rgb(image if self.size is None else resize(image, self.size, "bicubic")))
        return found[0], found[-1]


def check_name(name: str) -> None:
    """Check that there is an extractor of a name.

    Raises:
        ValueError: names those that there are.
    """
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    others = sorted(FEATURE_EXTRACTORS_REGISTRY.keys() - {"inception-v3-compat"})
    if name not in {"inception", "demo-cnn", "demo-random", "file", *others}:
        raise ValueError(
            f"unknown extractor {name}: expected inception, demo-cnn, demo-random, file, or one of torch-fidelity's: "
            f"{', '.join(others)}"
        )


def registered(name: str) -> Registered:
    """Return an extractor of torch-fidelity's registry; one process per machine downloads it if it is missing.

    Raises:
        ValueError: there is none of that name, or it is not available.
    """
    check_name(name)
    found, reason = _try(name) if is_local_main() else (None, "")
    if torch.distributed.is_initialized():
        from accelerate import PartialState  # takes a second, and trainer.prefetch needs none

        PartialState().wait_for_everyone()
    if not is_local_main():
        found, reason = _try(name)
    if found is None:
        raise ValueError(
            f"extractor {name} is not available: {reason}. torch.hub downloads it into {torch.hub.get_dir()}: run "
            f"`python -m trainer.prefetch {name}` on a machine with a network"
        )
    return found


def _try(name: str) -> tuple[Registered | None, str]:
    try:
        return Registered(name), ""
    except Exception as error:  # torch.hub, its repositories and the network raise many kinds of errors
        return None, f"{type(error).__name__}: {first_line(error)}"
