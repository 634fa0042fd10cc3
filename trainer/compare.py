"""Train several systems on the same data, each from several seeds, and lay them side by side on one page.

python -m trainer.compare --config launch/recipes/compare-digits.yaml [--section.key value ...]
"""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError
from jsonargparse.typing import NonNegativeInt, PositiveInt

from data.errors import DataError
from data.files import check_yaml, read
from trainer.config import parser
from trainer.config.messages import plain_message
from trainer.config.parser import Config, Parser, in_order
from trainer.config.resume import RESUMABLE_SETTINGS, differences
from trainer.config.settings import DataConfig, EvaluateConfig, Location, TrainerConfig
from trainer.distributed.exit import exit_with_error, user_errors
from trainer.log.run_folder import refuse_links
from trainer.results import Entry, Scored, check_alike, lines_of

MAIN = Path(__file__).resolve().with_name("main.py")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # a run is a process of its own, whatever started this one
FREE_HERE = RESUMABLE_SETTINGS - {"evaluate.num", "evaluate.extractor", "system.perceptual_weights"} | {
    "trainer.precision"
}


@dataclass
class Compare:
    """Comparison.

    Args:
        out: folder of the runs (OUT/SYSTEM/seed_S) and of the page
        systems: class_path and init_args of each system, by the name to show
        seeds: each system is trained from each; three or more show how much is chance
        jobs: runs at a time; they share the machine's cores evenly
        common: init_args of all systems; a system's own come first
    """

    out: Location
    systems: dict[str, dict[str, Any]]
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    jobs: PositiveInt = 1
    common: dict[str, Any] = field(default_factory=dict)


class Settings(NamedTuple):
    data: DataConfig
    trainer: TrainerConfig
    evaluate: EvaluateConfig
    compare: Compare

    @property
    def out(self) -> Path:
        return Path(self.compare.out)


class Run(NamedTuple):
    """One system from one seed; its folder may hold a whole run, a part of one, or nothing yet."""

    name: str
    seed: int
    config: Config

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    def scored(self) -> int:
        """The step of its newest evaluation, 0 before the first."""
        return max((line["step"] for line in lines_of(self.folder) if "extractor" in line), default=0)

    def is_done(self) -> bool:
        return self.scored() == self.config.trainer.steps


class ComparisonParser(Parser):
    hint = "See python -m trainer.compare --help; launch/recipes/compare-digits.yaml is an example."


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not there yet, then write the page of all that is."""
    settings = configure(arguments)
    with user_errors():
        runs = plan(settings)
        refuse_links(settings.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `train` stops its runs on the way out
    try:
        failed = train_all(runs, settings)
        write(runs, failed, settings)
    except KeyboardInterrupt:
        exit_with_error("interrupted; the same command goes on", code=130)
    if failed:
        exit_with_error(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}. The same command tries again", code=1
        )


# ---- what to train


def configure(arguments: Sequence[str] | None = None) -> Settings:
    """The settings of a command line, which override its file's; a mistake in them ends the process with code 2."""
    parser.bound_imports()
    made = ComparisonParser(prog="compare", description=__doc__)
    made.add_argument("--config", action="config", help="a YAML file of these settings")
    sections = {"data": DataConfig, "trainer": TrainerConfig, "evaluate": EvaluateConfig, "compare": Compare}
    for section, kind in sections.items():
        made.add_class_arguments(kind, section)
    found = made.parse_args(in_order(sys.argv[1:] if arguments is None else arguments))
    return Settings(*(kind(**found[section].as_dict()) for section, kind in sections.items()))


def plan(settings: Settings) -> list[Run]:
    """All runs, seed by seed, so that a comparison cut short has some of every system.

    Raises:
        ValueError: a setting cannot be.
    """
    compare = settings.compare
    _check(settings)
    for name, system in compare.systems.items():
        first = _config(name, system, compare.seeds[0], settings)
        try:
            built = first.system()
            built.players()
        except ValueError as error:
            raise ValueError(f'compare.systems, "{name}": {error}') from error
        if not built.can("sample"):
            raise ValueError(f'compare.systems, "{name}": {type(built).__name__} draws no samples: leave it out')
    return [
        Run(name, seed, _config(name, system, seed, settings))
        for seed in compare.seeds
        for name, system in compare.systems.items()
    ]


def _check(settings: Settings) -> None:
    data, trainer, evaluate, compare = settings
    if not compare.systems:
        raise ValueError("compare.systems is empty, expected a class_path and init_args for each name")
    for name in compare.systems:
        if "/" in name or name.startswith(".") or not name.strip():
            raise ValueError(
                f'compare.systems, "{name}": the name is a folder\'s, too: take one without / or a first .'
            )
    if not compare.seeds or len({*compare.seeds}) < len(compare.seeds):
        raise ValueError(f"compare.seeds is {compare.seeds}, expected different seeds, best three or more")
    if not data.test:
        raise ValueError("data.test is not set, and a comparison scores on held-out images: name their shards")
    if not evaluate.every:
        raise ValueError("evaluate.every is 0, and a comparison needs scores: expected 1 or more")
    if trainer.run_dir or trainer.seed:
        raise ValueError("trainer.run_dir and trainer.seed have no effect here: set compare.out and compare.seeds")


def _config(name: str, system: dict[str, Any], seed: int, settings: Settings) -> Config:
    """The configuration of one run.

    Raises:
        ValueError: the system is none, or lacks a setting that it is given.
    """
    compare = settings.compare
    given = system | {"init_args": {**compare.common, **(system.get("init_args") or {})}}
    trainer = replace(settings.trainer, seed=seed, run_dir=Location(settings.out / name / f"seed_{seed}"))
    evaluate = settings.evaluate
    if evaluate.extractor == "demo-cnn" and not evaluate.weights:
        evaluate = replace(evaluate, weights=Location(settings.out / "demo-cnn-v1.safetensors"))
    if not evaluate.statistics:
        evaluate = replace(evaluate, statistics=Location(settings.out / "statistics"))
    made = parser.parser()
    made.exit_on_error = False
    sections = {"data": asdict(settings.data), "trainer": asdict(trainer), "evaluate": asdict(evaluate)}
    try:
        namespace = made.parse_object({"system": given, **sections})
    except ArgumentError as error:
        raise ValueError(f'compare.systems, "{name}": {plain_message(str(error))}') from error
    return Config(made, namespace, settings.data, trainer, evaluate)


# ---- the runs


def train_all(runs: list[Run], settings: Settings) -> dict[str, str]:
    """Train those that are not done; what went wrong, by run."""
    failed = {str(run): trouble for run in runs if (trouble := _other_run(run))}
    for name, trouble in failed.items():
        print(f"{name}: {trouble}", file=sys.stderr, flush=True)
    missing = [run for run in runs if str(run) not in failed and not run.is_done()]
    threads = max(1, len(os.sched_getaffinity(0)) // settings.compare.jobs)
    print(f"{len(runs)} runs in {settings.out}: {len(missing)} to train", flush=True)
    if missing:
        _fit_extractor(settings)
    for count, (run, code, seconds) in enumerate(train(missing, settings.compare.jobs, threads), 1):
        head = f"[{count}/{len(missing)}] {run}:"
        if code == 0 and run.is_done():
            print(f"{head} trained in {seconds:.0f} s", flush=True)
        else:
            failed[str(run)] = _error_of(run.folder / "log.txt")
            print(f"{head} failed with exit code {code}: {failed[str(run)]}", file=sys.stderr, flush=True)
    return failed


def train(runs: list[Run], jobs: int, threads: int) -> Iterator[tuple[Run, int, float]]:
    """Each run's exit code and seconds, as it ends; `jobs` go at a time, and all stop when this does."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment["OMP_NUM_THREADS"] = str(threads)
    waiting, going = list(runs), list[tuple[Run, subprocess.Popen[bytes], float]]()
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                run = waiting.pop(0)
                going.append((run, _start(run, environment), time.monotonic()))
            ended = [entry for entry in going if entry[1].poll() is not None]
            going = [entry for entry in going if entry not in ended]
            yield from ((run, process.returncode, time.monotonic() - began) for run, process, began in ended)
            time.sleep(0.1)
    finally:
        for _, process, _ in going:
            process.terminate()
        for _, process, _ in going:
            process.wait()


def _start(run: Run, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    recipe = run.folder / "recipe.yaml"
    run.config.write(recipe)
    with open(run.folder / "log.txt", "wb") as log:
        command = [sys.executable, str(MAIN), "--config", str(recipe)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _fit_extractor(settings: Settings) -> None:
    """Train the demo-cnn once for all runs, where it is to be trained."""
    data, evaluate = settings.data, settings.evaluate
    if evaluate.extractor != "demo-cnn" or evaluate.weights:
        return
    from accelerate import Accelerator  # these take seconds to import

    from trainer.evaluate.extractors.build import build

    print("preparing the demo-cnn for all runs", flush=True)
    with user_errors():
        train, test = data.open(data.trains, data.on_error), data.open(data.tests)
        build(evaluate, data, settings.out, train, test, Accelerator(cpu=True))


def _other_run(run: Run) -> str | None:
    """Why what its folder holds is another run; training would refuse most of it, but a whole run is not trained."""
    kept = run.folder / "config.yaml"
    if not kept.exists():
        return None
    try:
        check_yaml(text := read(kept).decode())
        changed = differences(yaml.safe_load(text), run.config.resolved(), resumable=FREE_HERE)
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        return f"{kept} is no configuration of a run ({error}): take another --compare.out, or remove the folder"
    if run.scored() > run.config.trainer.steps:
        changed.append(f"trainer.steps: {run.scored()} in the checkpoint, {run.config.trainer.steps} now")
    if not changed:
        return None
    return (
        f"{run.folder} holds a run with other settings: {'; '.join(changed)}. Take the old settings, another "
        "--compare.out, or remove the folder"
    )


def _error_of(log: Path) -> str:
    """What a run said when it failed: its error, or else its last lines."""
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    _, found, message = text.rpartition("error: ")
    return message if found else "\n".join(text.splitlines()[-3:]) + f"\nSee {log}"


# ---- the page


def write(runs: list[Run], failed: dict[str, str], settings: Settings) -> None:
    """The page, the overview and the numbers of all runs that are whole."""
    entries = []
    for name in settings.compare.systems:
        own = [run for run in runs if run.name == name]
        whole = [Scored(run.seed, run.folder) for run in own if str(run) not in failed and run.is_done()]
        system = own[0].config.resolved()["system"]
        entries.append(Entry(name, system["class_path"].rpartition(".")[2], system["init_args"], whole))
    if not any(entry.runs for entry in entries):
        return
    from trainer.report import report  # matplotlib takes seconds to import

    try:
        check_alike(entries)
        report(entries, failed, settings.data, _shown(runs[0], settings.compare), settings.out)
    except (ValueError, DataError, OSError) as error:
        exit_with_error(str(error), code=1)
    print(f"written: {settings.out / 'index.html'}, compare.png and results.json", flush=True)


def _shown(run: Run, compare: Compare) -> dict[str, Any]:
    """The settings that a reader of the page needs, as plain data: no paths, nothing unset, not one run's own."""
    resolved, hidden = run.config.resolved(), ("seed", "run_dir", "weights", "statistics", "lpips")
    sections = {
        section: {key: value for key, value in resolved[section].items() if value is not None and key not in hidden}
        for section in ("trainer", "evaluate")
    }
    seeds = [int(seed) for seed in compare.seeds]  # yaml knows no NonNegativeInt
    return sections | {"compare": {"seeds": seeds, "common": compare.common, "systems": compare.systems}}


if __name__ == "__main__":
    run_command(main)
