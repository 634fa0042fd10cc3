"""Write one page about runs, which needs no other file: `python -m trainer.report RUN [RUN ...]`.

It shows how their settings differ, their scores, sample grids, curves, speed and memory, and whether they look healthy.
The runs may still be training.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

from data.files import near
from trainer.distributed.exit import CommandParser, user_errors
from trainer.report.results import Entry, Run
from trainer.run_folder import refuse_links
from trainer.run_place import local_run, run_place

MOST = 10  # runs on a page: as many colours as curves can have


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="python -m trainer.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("runs", metavar="RUN", nargs="+", type=run_place, help=f"a run's folder or its URL; up to {MOST}")
    made.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the page to write; one that is there is replaced (default: report.html in the folder of the run, of "
        "several, or of one at a URL, in the current folder)",
    )
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    settings = parser().parse_args(arguments)
    alone = settings.runs[0] if len(settings.runs) == 1 else ""
    out: Path = settings.out or (alone if isinstance(alone, Path) else Path()) / "report.html"
    with user_errors(), ExitStack() as stack:
        if settings.out and (out.is_dir() or not out.parent.is_dir()):
            what = "is a folder" if out.is_dir() else f"lies in {out.parent}, which does not exist"
            raise ValueError(f"--out {out} {what}: name a file in an existing folder, such as report.html")
        entries = open_entries([stack.enter_context(local_run(run, log=True)) for run in settings.runs])
        from trainer.files import write_atomically
        from trainer.report.page import report  # importing matplotlib takes a second

        write_atomically(out, report(entries))
    print(f"{out.absolute()}: {len(entries)} run{'s' * (len(entries) > 1)}")


def open_entries(folders: list[Path]) -> list[Entry]:
    """Return an entry for each run's folder, under its shortest name that is not another's as well.

    Raises:
        ValueError: a folder is not a run, or there are too many or the same twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len({*paths}) < len(paths):
        raise ValueError(f"RUN names the same folder twice: {', '.join(map(str, folders))}")
    if len(paths) > MOST:
        raise ValueError(f"RUN names {len(paths)} folders, expected at most {MOST}")
    names = [path.name for path in paths]
    entries = list[Entry]()
    for path in paths:
        refuse_links(path)
        run = Run(path)
        if not run.lines and not run.settings:
            there = "holds neither config.yaml nor metrics.jsonl" if path.is_dir() else f"is not a folder{near(path)}"
            inside = sorted(config.parent.name for config in path.glob("*/config.yaml"))
            hint = f". It holds runs: name them, such as {path / inside[0]}, or all by {path}/*" if inside else ""
            raise ValueError(f"RUN {path} {there}: expected the folder of a run (trainer.run_dir){hint}")
        system = run.settings.get("system") or {}
        kind = str(system.get("class_path", "")).rpartition(".")[2]
        name = path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        name = str(path) if name in [entry.name for entry in entries] else name
        entries.append(Entry(name, kind, system.get("init_args") or {}, [run]))
    return entries
