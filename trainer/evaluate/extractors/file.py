"""An extractor from a TorchScript or torch.export file."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.evaluate.extractors.extractor import BATCH, coloured


class FileExtractor(nn.Module):
    """A network of the user's, from a TorchScript file or one of `torch.export`.

    It is given uint8 images [n, 3, size, size], n from 1 to 64, and gives features [n, D], or features and logits.

    Args:
        weights: the file
        size: of the images
        device: it runs on

    Raises:
        ValueError: there is no such file, or it is not such a network.
    """

    resize = "the file's own"

    def __init__(self, weights: str | None, size: int, device: torch.device):
        super().__init__()
        if not weights:
            raise ValueError(
                "evaluate.extractor is file: name a TorchScript file, or one of torch.export, with --evaluate.weights"
            )
        try:
            content = Path(weights).read_bytes()
        except OSError as error:
            raise ValueError(f"evaluate.weights: {weights} cannot be read: {error.strerror}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.name = f"{Path(weights).stem}-{self.sha256[:8]}"
        self._calls = [_network_of(weights, device)]  # no child: an exported program has no eval mode
        shape, generator = (BATCH, 3, size, size), torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        try:
            with torch.no_grad():
                found = [self(images[:n]) for n in (BATCH, 2)]
            dims = {(features.shape[1], logits.shape[1]) for features, logits in found}
            (self.dim, classes), lengths = dims.pop(), [len(features) for features, _ in found]
            fits = not dims and lengths == [BATCH, 2] and all(f.is_floating_point() for f, _ in found)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
            raise ValueError(self._expected(weights, size, str(error).strip().splitlines()[-1])) from error
        if not fits:
            raise ValueError(self._expected(weights, size, f"it gives {[list(f.shape) for f, _ in found]}"))
        many, few = found[0][0][:2], found[1][0]
        if not many.isfinite().all():
            raise ValueError(self._expected(weights, size, "its features are not finite"))
        if not torch.allclose(many, few, rtol=1e-2, atol=1e-2 * many.abs().max().item()):
            raise ValueError(
                self._expected(weights, size, "an image's features depend on those beside it: export it in eval mode")
            )
        self.classes = classes if found[0][1] is not found[0][0] else 0

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self._calls[0](coloured(image))
        return (found, found) if isinstance(found, Tensor) else (found[0], found[-1])

    @staticmethod
    def _expected(weights: str, size: int, found: str) -> str:
        return (
            f"evaluate.weights: {weights} is not an extractor: of uint8 images [n, 3, {size}, {size}], any n up to "
            f"{BATCH}, it must give features [n, D], or features and logits ({found})"
        )


def _network_of(path: str, device: torch.device) -> Callable[[Tensor], Any]:
    """A TorchScript file's module, or an exported program's.

    Raises:
        ValueError: it is neither.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".torch.jit", FutureWarning)  # of its end, some day
            return torch.jit.load(path, map_location=device).eval()
    except RuntimeError:
        pass  # it may be an exported program
    try:
        from torch.export.passes import move_to_device_pass

        # Where it was exported is written all over a program: a module's own `to` would not do.
        return move_to_device_pass(torch.export.load(path), device).module()
    except Exception as error:  # zip's, pickle's and the loader's ways to say that a file is another one
        raise ValueError(
            f"evaluate.weights: {path} is neither a TorchScript file nor one of torch.export.save "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
