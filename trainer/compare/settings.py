"""The settings of a comparison, and the runs that follow from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentError
from jsonargparse.typing import NonNegativeInt, PositiveInt

from trainer.config.messages import plain_message
from trainer.config.parser import SAMPLES, Config, name_splits
from trainer.config.parser import parser as make_parser
from trainer.config.settings import DataConfig, EvaluateConfig, Location, TrainerConfig
from trainer.log.metrics_file import is_evaluation, read_metrics

HIDDEN = ("seed", "run_dir", "weights", "statistics", "lpips")  # on the page: paths, and what differs between runs


@dataclass
class Compare:
    """Comparison.

    Args:
        out: folder of the page and of the runs (OUT/SYSTEM/seed_SEED)
        systems: the systems to compare: for each name to show, a class_path and init_args
        seeds: each system is trained once from each of these seeds; three or more show how much scores vary by chance
        jobs: number of runs to train at the same time; they share the machine's CPU cores evenly
        common: init_args of all systems; a system's own init_args override them
    """

    out: Location
    systems: dict[str, dict[str, Any]]
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    jobs: PositiveInt = 1
    common: dict[str, Any] = field(default_factory=dict)


class ComparisonSettings(NamedTuple):
    """All settings of a comparison; `trainer.seed` and `trainer.run_dir` are set for each run."""

    data: DataConfig
    trainer: TrainerConfig
    evaluate: EvaluateConfig
    compare: Compare

    @property
    def out(self) -> Path:
        return Path(self.compare.out)


class PlannedRun(NamedTuple):
    """One system trained from one seed; its folder may be missing, partly trained or complete."""

    name: str
    seed: int
    config: Config

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    def evaluated_step(self) -> int:
        """Return the step of its newest evaluation, 0 before the first."""
        return max((line["step"] for line in read_metrics(self.folder) if is_evaluation(line)), default=0)

    def is_complete(self) -> bool:
        """Return whether the evaluation of its last step is there."""
        return self.evaluated_step() == self.config.trainer.steps


def plan_runs(settings: ComparisonSettings) -> list[PlannedRun]:
    """Return all runs, seed by seed, so that a comparison that is stopped early has some runs of every system.

    Raises:
        ValueError: a setting is missing or out of its range; names it.
    """
    name_splits(settings.data, evaluated=True)
    _check(settings)
    systems = settings.compare.systems
    runs = [
        PlannedRun(name, seed, _config(name, system, seed, settings))
        for seed in settings.compare.seeds
        for name, system in systems.items()
    ]
    for run in runs[: len(systems)]:  # one of each system
        with _naming(run.name):
            built = run.config.system()
            built.players()
            if not built.can("sample"):
                raise ValueError(f"{type(built).__name__} cannot sample from a prior; remove it")
    return runs


def shown_settings(run: PlannedRun, compare: Compare) -> dict[str, Any]:
    """Return the settings to show on the page as plain data, without paths, unset ones and those of a single run."""
    resolved = run.config.resolved()
    sections: dict[str, Any] = {
        section: {key: value for key, value in resolved[section].items() if value is not None and key not in HIDDEN}
        for section in ("trainer", "evaluate")
    }
    seeds = [int(seed) for seed in compare.seeds]  # yaml cannot write a NonNegativeInt
    return sections | {"compare": {"seeds": seeds, "common": compare.common, "systems": compare.systems}}


def _check(settings: ComparisonSettings) -> None:
    compare = settings.compare
    if not compare.systems:
        raise ValueError("compare.systems is empty; expected a class_path and init_args for each name")
    for name in compare.systems:
        if "/" in name or name.startswith(".") or not name.strip():
            raise ValueError(
                f'compare.systems, "{name}": the name becomes a folder, so it must not be blank, contain "/" or start '
                'with "."'
            )
    if not compare.seeds or len({*compare.seeds}) < len(compare.seeds):
        raise ValueError(f"compare.seeds must be different numbers, preferably three or more; got {compare.seeds}")
    if not settings.data.test:
        raise ValueError("data.test is not set; expected the shards of held-out images, which evaluations need")
    if not settings.evaluate.every:
        raise ValueError("evaluate.every must be at least 1, because a comparison needs scores; got 0")
    if settings.evaluate.num == 0:
        raise ValueError("evaluate.num must be at least 2, because a comparison is of samples; got 0")
    if settings.trainer.run_dir or settings.trainer.seed:
        raise ValueError("trainer.run_dir and trainer.seed have no effect here; set compare.out and compare.seeds")


def _config(name: str, system: dict[str, Any], seed: int, settings: ComparisonSettings) -> Config:
    given = system | {"init_args": {**settings.compare.common, **(system.get("init_args") or {})}}
    trainer = replace(settings.trainer, seed=seed, run_dir=Location(settings.out / name / f"seed_{seed}"))
    evaluate = replace(settings.evaluate, extractor=settings.evaluate.extractor or "inception")
    evaluate = replace(evaluate, num=SAMPLES if evaluate.num is None else evaluate.num)  # of an AE, too
    if evaluate.extractor == "demo-cnn" and not evaluate.weights:
        evaluate = replace(evaluate, weights=Location(settings.out / "demo-cnn-v1.safetensors"))
    if not evaluate.statistics:
        evaluate = replace(evaluate, statistics=Location(settings.out / "statistics"))
    parser = make_parser()
    parser.exit_on_error = False
    sections = {"data": asdict(settings.data), "trainer": asdict(trainer), "evaluate": asdict(evaluate)}
    with _naming(name):
        namespace = parser.parse_object({"system": given, **sections})
    return Config(parser, namespace, settings.data, trainer, evaluate)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put a system's name before the message of what is wrong with its settings."""
    try:
        yield
    except (ArgumentError, ValueError) as error:
        raise ValueError(f'compare.systems, "{name}": {plain_message(str(error))}') from error
