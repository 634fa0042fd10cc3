"""Train several systems on the same data, each from several seeds, and show their scores and images on one page.

python -m trainer.compare --config launch/recipes/compare-digits.yaml [--section.key value ...]
"""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()

import signal
import sys
from collections.abc import Sequence

from data.errors import DataError
from trainer.compare.runs import train_missing
from trainer.compare.settings import Compare, ComparisonSettings, PlannedRun, plan_runs, shown_settings
from trainer.config.parser import Parser, bound_imports, in_order
from trainer.config.settings import DataConfig, EvaluateConfig, TrainerConfig
from trainer.distributed.exit import exit_with_error, user_errors
from trainer.report.results import Entry, Run, differently_scored
from trainer.run_folder import refuse_links


class ComparisonParser(Parser):
    """The parser of a comparison's command line."""

    hint = "See python -m trainer.compare --help; launch/recipes/compare-digits.yaml is an example."


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the runs that are not complete, then write the page of all complete ones."""
    settings = configure(arguments)
    with user_errors():
        runs = plan_runs(settings)
        refuse_links(settings.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the runs are stopped, too
    try:
        failed = train_missing(runs, settings)
        write(runs, failed, settings)
    except KeyboardInterrupt:
        exit_with_error("interrupted; run the same command to continue", code=130)
    if failed:
        exit_with_error(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}. Run the same command to retry", code=1
        )


def configure(arguments: Sequence[str] | None = None) -> ComparisonSettings:
    """Return the settings of a command line, which override those of its file.

    Raises:
        SystemExit: a setting is wrong; it is named on stderr, and the exit code is 2.
    """
    bound_imports()
    usage = "python -m trainer.compare --config COMPARISON [--SECTION.SETTING VALUE ...]"
    parser = ComparisonParser(prog="trainer.compare", usage=usage, description=__doc__)
    parser.add_argument("--config", action="config", help="a YAML file of these settings")
    sections = {"data": DataConfig, "trainer": TrainerConfig, "evaluate": EvaluateConfig, "compare": Compare}
    for section, kind in sections.items():
        parser.add_class_arguments(kind, section)
    found = parser.parse_args(in_order(sys.argv[1:] if arguments is None else arguments))
    return ComparisonSettings(*(kind(**found[section].as_dict()) for section, kind in sections.items()))


def write(runs: list[PlannedRun], failed: dict[str, str], settings: ComparisonSettings) -> None:
    """Write the page, the overview picture and the numbers of all complete runs, if there are any."""
    entries = []
    for name in settings.compare.systems:
        own = [run for run in runs if run.name == name]
        complete = [Run(run.folder) for run in own if str(run) not in failed and run.is_complete()]
        system = own[0].config.resolved()["system"]
        entries.append(Entry(name, system["class_path"].rpartition(".")[2], system["init_args"], complete))
    if not any(entry.runs for entry in entries):
        return
    from trainer.compare.page import write_page  # importing matplotlib takes seconds

    try:
        if folders := differently_scored(entries):
            raise ValueError(
                f"{' and '.join(map(str, folders))} were evaluated with different extractor weights, held-out images "
                "or numbers of samples, so their scores are not comparable. Remove the older runs, and run the same "
                "command again"
            )
        write_page(entries, failed, settings.data, shown_settings(runs[0], settings.compare), settings.out)
    except (ValueError, DataError, OSError) as error:
        exit_with_error(str(error), code=1)
    print(f"written: {settings.out / 'index.html'}, compare.png and results.json", flush=True)


if __name__ == "__main__":
    run_command(main)
