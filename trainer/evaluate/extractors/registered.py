"""Extractors of torch-fidelity's registry."""

import torch
from torch import Tensor, nn

from trainer.distributed.launcher import is_local_main
from trainer.evaluate.extractors.extractor import bicubic, coloured, digest_of


class Registered(nn.Module):
    """An extractor of torch-fidelity's registry, by the layer that it takes for FID.

    There is an inception score where it takes another layer for that. DINOv2 gets images that are resized as those who
    publish its distances do (Stein et al. 2023; Karras et al. 2024): to 224 pixels, bicubic and antialiased;
    torch-fidelity's own resize is another one.

    Args:
        name: in the registry
    """

    def __init__(self, name: str):
        super().__init__()
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        self.name, self.registered = name, name
        self.layers = [kind.get_default_feature_layer_for_metric("fid")]
        logits = kind.get_default_feature_layer_for_metric("isc")
        if logits not in self.layers:
            self.layers.append(logits)
        self.network = kind(name, self.layers).eval()
        self.size = 224 if name.startswith("dinov2") else None
        self.resize = "antialiased bicubic to 224, rounded" if self.size else "torch-fidelity's own"
        found = self(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        self.dim, self.classes = found[0].shape[1], found[1].shape[1] if len(self.layers) > 1 else 0
        self.sha256 = digest_of(self.network)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network(coloured(image if self.size is None else bicubic(image, self.size)))
        return found[0], found[-1]


def check_name(name: str) -> None:
    """Refuse the name of an extractor that there is not.

    Raises:
        ValueError: names those that there are.
    """
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    others = sorted(FEATURE_EXTRACTORS_REGISTRY.keys() - {"inception-v3-compat"})
    if name not in {"inception", "demo-cnn", "demo-random", "file", *others}:
        raise ValueError(
            f"evaluate.extractor is {name}, expected inception, demo-cnn, demo-random, file, or one of "
            f"torch-fidelity's: {', '.join(others)}"
        )


def registered(name: str) -> Registered:
    """An extractor of torch-fidelity's registry; one process a machine downloads it if it is not there.

    Raises:
        ValueError: there is none of that name, or it cannot be had.
    """
    check_name(name)
    found, reason = None, "another process of this machine could not have it"
    if is_local_main():
        found, reason = _try(name)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if found is None and not is_local_main():
        found, reason = _try(name)
    if found is None:
        raise ValueError(
            f"evaluate.extractor is {name}, and it cannot be had: {reason}. It is downloaded by torch.hub into "
            f"{torch.hub.get_dir()}: have it there by python -m trainer.prefetch {name}, on a machine with a network"
        )
    return found


def _try(name: str) -> tuple[Registered | None, str]:
    try:
        return Registered(name), ""
    except Exception as error:  # torch.hub's, its repositories' and the network's
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
