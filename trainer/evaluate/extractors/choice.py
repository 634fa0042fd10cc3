"""Which extractor a run has while evaluate.extractor is unset."""

from accelerate import Accelerator

from trainer import schemas
from trainer.config.parser import Config
from trainer.distributed.ranks import run_on_main
from trainer.evaluate.extractors.inception import download, hub_path


def settle_extractor(config: Config, accelerator: Accelerator) -> list[str]:
    """Replace an unset evaluate.extractor by inception, or, where its weights are missing, by demo-random.

    A run that resumes keeps the one that it began with, so that its scores stay comparable.

    Returns:
        a warning if it is demo-random now
    """
    if not config.evaluate.every or config.evaluate.extractor is not None:
        return []
    extractor, warnings = run_on_main(accelerator, lambda: _choose(config))
    config.settle_extractor(extractor)
    return warnings


def _choose(config: Config) -> tuple[str, list[str]]:
    start = schemas.newest_start(config.run_dir / "checkpoints")
    if start and start.configuration.evaluate.extractor is not None:
        return start.configuration.evaluate.extractor, []
    if config.evaluate.weights or not (reason := download(hub_path())):
        return "inception", []
    return "demo-random", [
        f"evaluate.extractor is unset, and InceptionV3's weights are not at {hub_path()}: {reason}. Scores are by "
        "demo-random instead, a network with random weights: they compare runs on the same data, and with no published "
        "FID. For InceptionV3, run `python -m trainer.prefetch inception` on a machine with a network, and resume with "
        "--evaluate.extractor inception"
    ]
