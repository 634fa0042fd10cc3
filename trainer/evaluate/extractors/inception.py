"""InceptionV3 as torch-fidelity has it: the network of published FIDs."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.distributed.launcher import is_local_main
from trainer.evaluate.extractors.extractor import first_line, to_rgb

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"


class Inception(nn.Module):
    """torch-fidelity's InceptionV3 of its file of weights: 2048 features, and 1008 logits without their bias."""

    name = "inception-v3"
    dim = 2048
    resize = "TensorFlow 1's bilinear to 299"
    classes = 1008
    sha256: str

    def __init__(self, weights: Path):
        super().__init__()
        self.path = weights
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(to_rgb(image))


def inception(weights: str | None, setting: str = "evaluate.weights") -> Inception:
    """Return InceptionV3 with weights from a file, or from TORCH_HOME; one process per machine downloads them there.

    Raises:
        ValueError: there are no weights and no network, or the file holds other weights.
    """
    path = Path(weights) if weights else hub_path()
    if weights and not path.exists():
        raise ValueError(f"{setting} names {path}, which does not exist; expected torch-fidelity's {INCEPTION_FILE}")
    if not weights:
        _download_once(path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would also run code in the file
        extractor = Inception(path)
    except Exception as error:  # pickle, zip and load_state_dict raise many kinds of errors on other files
        raise ValueError(
            f"{path} does not hold the weights of the FID's InceptionV3 ({first_line(error)}); expected "
            f"torch-fidelity's {INCEPTION_FILE}, not torchvision's inception_v3, which is another network"
        ) from error
    extractor.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if not extractor.sha256.startswith(INCEPTION_SHA256):
        extractor.name = f"inception-v3-weights-{extractor.sha256[:8]}"
    return extractor


def hub_path() -> Path:
    """Return where the weights are, or will be downloaded to, unless a file is named."""
    return Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)


def download(path: Path) -> str:
    """Download the weights to a path if it does not exist; return why it still does not, or ""."""
    if path.exists():
        return ""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        return f"InceptionV3's weights could not be downloaded to {path}: {first_line(error)}"
    return ""


def _download_once(path: Path) -> None:
    """Have one process per machine download the weights if they are missing; every process calls this."""
    reason = download(path) if is_local_main() else "another process of this machine could not download them"
    if torch.distributed.is_initialized():
        from accelerate import PartialState  # takes a second, and trainer.prefetch needs none

        PartialState().wait_for_everyone()
    if not path.exists():
        raise ValueError(
            f"extractor inception lacks its weights, and {reason}. Run `python -m trainer.prefetch inception` on a "
            f"machine with a network, or put {INCEPTION_FILE} (from torch-fidelity's releases on GitHub) at {path}, or "
            "name that file by --evaluate.weights (of trainer.evaluate: --weights), or choose --evaluate.extractor "
            "demo-random (of trainer.evaluate: --extractor demo-random), which needs no file, or for a run on labelled "
            "images demo-cnn; by neither is an FID comparable with published ones"
        )
