"""A feature extractor from a TorchScript or torch.export file."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.images import Size, sides
from trainer.evaluate.extractors.extractor import BATCH, first_line, to_rgb


class FileExtractor(nn.Module):
    """A user's network, from a TorchScript file or one of `torch.export`. To load such a file runs its code.

    The network gets uint8 images [n, 3, height, width], n from 1 to 64, and returns features [n, D], or features and
    logits [n, K].

    Raises:
        ValueError: the file is missing, or is not such a network.
    """

    resize = "the file's own"

    def __init__(self, weights: str | None, size: Size, device: torch.device, setting: str = "evaluate.weights"):
        super().__init__()
        if not weights:
            raise ValueError(f"the extractor file needs {setting}: name a file of TorchScript or torch.export")
        try:
            content = Path(weights).read_bytes()
        except OSError as error:
            raise ValueError(f"{setting} {weights} cannot be read: {error.strerror}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.name = f"{Path(weights).stem}-{self.sha256[:8]}"
        self._calls = [_load(weights, device)]  # not a submodule: an exported program has no eval mode
        height, width = sides(size)
        try:
            self.dim, self.classes = self._try(size, device)
        except Exception as error:  # a foreign network may raise anything
            raise ValueError(
                f"{setting} {weights} is not an extractor: from uint8 images [n, 3, {height}, {width}], n up to "
                f"{BATCH}, it must return features [n, D], or features and logits ({_last_line(error)})"
            ) from error

    def _try(self, size: Size, device: torch.device) -> tuple[int, int]:
        """Features and classes that the network gives for random images."""
        shape, generator = (BATCH, 3, *sides(size)), torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        with torch.no_grad():
            (many, logits), (few, few_logits) = self(images), self(images[:2])
        shapes = [[*values.shape] for values in (many, logits, few, few_logits)]
        expected = [[n, values.shape[-1]] for n in (BATCH, 2) for values in (many, logits)]
        if shapes != expected or not (many.is_floating_point() and few.is_floating_point()):
            raise ValueError(f"it returns {many.dtype} {shapes[0]} and {few.dtype} {shapes[2]}")
        if not many[:2].isfinite().all():
            raise ValueError("its features are not finite")
        if not torch.allclose(many[:2], few, rtol=1e-2, atol=1e-2 * many[:2].abs().max().item()):
            raise ValueError("the features of an image depend on the other images: export it in eval mode")
        return shapes[0][1], 0 if logits is many else shapes[1][1]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self._calls[0](to_rgb(image))
        return (found, found) if isinstance(found, Tensor) else (found[0], found[-1])


def _load(path: str, device: torch.device) -> Callable[[Tensor], Any]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".torch.jit", FutureWarning)  # torch.jit is deprecated
            return torch.jit.load(path, map_location=device).eval()
    except RuntimeError:
        pass  # it may be an exported program
    try:
        from torch.export.passes import move_to_device_pass

        # A program holds the device of its export in many places, so a module's own `to` is not enough.
        return move_to_device_pass(torch.export.load(path), device).module()
    except Exception as error:  # zip, pickle and the loader raise many kinds of errors on other files
        raise ValueError(
            f"the weights {path} are neither a TorchScript file nor one of torch.export.save ({first_line(error)})"
        ) from error


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
