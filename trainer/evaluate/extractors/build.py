"""Choice of a feature extractor: InceptionV3, a demo-cnn, one of torch-fidelity's, or a network from a file."""

from pathlib import Path

from accelerate import Accelerator
from torch import nn

from trainer.config.settings import DataConfig, EvaluateConfig
from trainer.distributed.ranks import run_on_main
from trainer.evaluate.extractors.demo_cnn import FILE, Sets, demo_random, fit, is_fit, load_demo_cnn, visible_channels
from trainer.evaluate.extractors.extractor import Extractor
from trainer.evaluate.extractors.file import FileExtractor
from trainer.evaluate.extractors.inception import inception
from trainer.evaluate.extractors.registered import registered


def build_extractor(
    settings: EvaluateConfig,
    data: DataConfig,
    run_dir: Path,
    train: Sets,
    test: Sets,
    accelerator: Accelerator,
    prefix: str = "evaluate.",
) -> Extractor:
    """Return the extractor that the settings name, in eval mode and on the accelerator's device.

    A demo-cnn without weights is trained on `train` and `test` and kept in `run_dir`; demo-random is made from `train`.
    `prefix` is what stands before a setting's name in messages.

    Raises:
        ValueError: the extractor is unknown or not available; the message says what to do.
    """
    extractor: nn.Module
    kind, weights, device = settings.extractor or "inception", settings.weights, accelerator.device
    if kind == "inception":
        extractor = inception(weights, f"{prefix}weights")
    elif kind == "file":
        extractor = FileExtractor(weights, data.size, device, f"{prefix}weights")
    elif kind == "demo-cnn":
        path = Path(weights or run_dir / FILE)
        if weights is None:
            run_on_main(accelerator, lambda: None if is_fit(path, train, test, data) else fit(train, test, data, path))
        extractor = load_demo_cnn(path, visible_channels(data))
    elif weights:
        raise ValueError(f"{prefix}weights has no effect while {prefix}extractor is {kind}; leave it out")
    elif kind == "demo-random":
        extractor = run_on_main(accelerator, lambda: demo_random(train, data))  # other processors round differently
    else:
        extractor = registered(kind)
    return extractor.to(device).eval().requires_grad_(False)
