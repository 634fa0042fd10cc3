"""Which extractor a run has while evaluate.extractor is unset."""

import sys

from accelerate import Accelerator

from trainer import schemas
from trainer.config.parser import Config
from trainer.distributed.ranks import run_on_main
from trainer.evaluate.extractors.inception import download, hub_path


def settle_extractor(config: Config, accelerator: Accelerator) -> list[str]:
    """Replace an unset evaluate.extractor by inception, or, where its weights cannot be had, by demo-random.

    The main process chooses for all. A run that resumes keeps what it began with, so that its scores stay comparable.

    Returns:
        a warning if it is demo-random now
    """
    if not config.evaluate.every or config.evaluate.extractor is not None:
        return []
    extractor, warnings = run_on_main(accelerator, lambda: _choose(config))
    config.settle_extractor(extractor)
    return warnings


def extractor_so_far(config: Config) -> str | None:
    """Return the extractor of the run's checkpoints, if there are any that have one."""
    start = schemas.newest_start(config.run_dir / "checkpoints")
    return start.configuration.evaluate.extractor if start else None


def _choose(config: Config) -> tuple[str, list[str]]:
    if extractor := extractor_so_far(config):
        return extractor, []
    path = hub_path()
    if config.evaluate.weights or path.exists():
        return "inception", []
    print(f"evaluate.extractor is unset: downloading InceptionV3's weights to {path}", file=sys.stderr, flush=True)
    if not (reason := download(path)):
        return "inception", []
    return "demo-random", [
        f"evaluate.extractor is unset, and {reason}. So scores are by demo-random, a network with random weights: they "
        "compare runs on the same data, and with no published FID. For those by InceptionV3 run `python -m "
        "trainer.prefetch inception` on a machine with a network, and name --evaluate.extractor inception"
    ]
