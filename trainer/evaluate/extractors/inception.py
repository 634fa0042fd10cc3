"""InceptionV3 as torch-fidelity has it: the network of published FIDs."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.distributed.launcher import is_local_main
from trainer.evaluate.extractors.extractor import coloured

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"


class Inception(nn.Module):
    """torch-fidelity's InceptionV3, the network of published FIDs: 2048 features, 1008 logits without their bias."""

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
        return self.network(coloured(image))


def inception(weights: str | None) -> Inception:
    """InceptionV3 from a file, from TORCH_HOME, or downloaded into TORCH_HOME by one process a machine.

    Raises:
        ValueError: there are no weights and no network, or the file is not InceptionV3's weights.
    """
    path = Path(weights) if weights else Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    if weights and not path.exists():
        raise ValueError(f"evaluate.weights: {path} does not exist; expected torch-fidelity's {INCEPTION_FILE}")
    if not weights:
        _download(path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would load code, too
        found = Inception(path)
    except Exception as error:  # pickle's, zip's and load_state_dict's many ways to say that a file is another one
        raise ValueError(
            f"evaluate.weights: {path} does not hold the weights of the FID's InceptionV3 "
            f"({str(error).splitlines()[0]}); expected torch-fidelity's {INCEPTION_FILE}, not "
            "torchvision's inception_v3, which is another network"
        ) from error
    found.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.sha256.startswith(INCEPTION_SHA256):
        found.name = f"inception-v3-weights-{found.sha256[:8]}"
    return found


def _download(path: Path) -> None:
    """Have one process a machine fetch the weights if they are not there; every process calls this."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    reason = "another process of this machine could not download them"
    if is_local_main() and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            reason = f"they could not be downloaded: {error}"
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if not path.exists():
        raise ValueError(
            f"evaluate.extractor is inception, but its weights are not there, and {reason}. Put {INCEPTION_FILE} (from "
            f"torch-fidelity's releases on GitHub; or by python -m trainer.prefetch inception, with a network) "
            f"at {path}, or name it with --evaluate.weights PATH; or take "
            "--evaluate.extractor demo-cnn, which is trained on labelled shards, or demo-random, or train without "
            "scores: --evaluate.every 0"
        )
