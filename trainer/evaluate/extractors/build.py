"""Networks whose features the scores compare: InceptionV3, a small one that is trained on labelled shards, or random,
any of torch-fidelity's, or one from a file.

An extractor takes uint8 images [n, 1 or 3, size, size] to (features [n, D], logits [n, K]), and has a `name` that every
score carries.
"""

from pathlib import Path

from accelerate import Accelerator
from torch import nn

from trainer.config.settings import DataConfig, EvaluateConfig
from trainer.distributed.ranks import run_on_main
from trainer.evaluate.extractors.demo_cnn import Sets, _is_fit, demo_random, fit, load_demo_cnn
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.extractors.file import FileExtractor
from trainer.evaluate.extractors.inception import inception
from trainer.evaluate.extractors.registered import registered


def build(
    settings: EvaluateConfig, data: DataConfig, run_dir: Path, train: Sets, test: Sets, accelerator: Accelerator
) -> Extractor:
    """The extractor that the settings name, on the accelerator's device, in eval mode.

    Raises:
        ValueError: it cannot be had as set; says what to do.
    """
    extractor: nn.Module
    kind, weights, device = settings.extractor, settings.weights, accelerator.device
    if kind == "inception":
        extractor = inception(weights)
    elif kind == "file":
        extractor = FileExtractor(weights, data.size, device)
    elif kind == "demo-cnn":
        kept = Path(weights or run_dir / "demo-cnn-v1.safetensors")
        if weights is None:
            run_on_main(accelerator, lambda: None if _is_fit(kept, train, test, data) else fit(train, test, data, kept))
        extractor = load_demo_cnn(kept, data.channels)
    elif weights:
        raise ValueError(f"evaluate.weights has no effect while evaluate.extractor is {kind}: leave it unset")
    elif kind == "demo-random":
        extractor = run_on_main(accelerator, lambda: demo_random(train, data))  # processors differ in their last digits
    else:
        extractor = registered(kind)
    return extractor.to(device).eval().requires_grad_(False)
