"""The benchmarks, whose tables go into a document: `make bench`, or `python -m benchmarks [SECTION ...] [options]`.

Each section is a module of this folder that prints tables; `python -m benchmarks.SECTION --help` says what they are and
lists further options. Its tables become a section of the document, under the machine's name and the date; the section
of a former run on the same machine is replaced, those of other machines stay.
"""

import argparse
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.common import machine

# Minutes on an idle two-core machine, what each answers, and its data set.
SECTIONS = {
    "step": (8, "Step against Pythae, the plain loop and the limit", None),
    "run": (5, "Whole run against its bare step", None),
    "growth": (6, "Peak memory, and growth", None),
    "quality": (30, "Quality after a fixed time", "datasets/mnist"),
}


def replaced(document: str, title: str, body: str) -> str:
    """Return a document whose section `## title` is `body`; a new one goes to the end."""
    section = f"## {title}\n\n{body.strip()}\n"
    old = re.search(rf"^## {re.escape(title)}$.*?(?=^##? |\Z)", document, re.MULTILINE | re.DOTALL)
    if not old:
        return f"{document.rstrip()}\n\n{section}"
    rest = document[old.end() :]
    return f"{document[: old.start()]}{section}{rest and chr(10)}{rest}"


def measure(section: str, options: list[str]) -> str:
    """Return what a section prints, which also appears at once."""
    command = [sys.executable, "-m", f"benchmarks.{section}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        printed = [print(line, end="", flush=True) or line for line in process.stdout]
    if process.returncode:
        raise SystemExit(f"error: the section {section} failed, see above; nothing of it was written")
    return "".join(printed)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = "; ".join(f"{name}: {what} ({minutes} minutes)" for name, (minutes, what, _) in SECTIONS.items())
    options.add_argument("sections", nargs="*", metavar="SECTION", help=f"{known}. All by default")
    options.add_argument("--rounds", type=int, help="repetitions of each measurement; sections have their own defaults")
    options.add_argument("--small", action="store_true", help="the smallest sizes, which only try the benchmarks")
    options.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"), help="document (docs/benchmarks.md)")
    given = options.parse_args()
    chosen = given.sections or [*SECTIONS]
    if unknown := [name for name in chosen if name not in SECTIONS]:
        options.error(f"there is no section {', '.join(unknown)}, expected some of {', '.join(SECTIONS)}")
    data = {name: ["--data", folder] for name in chosen if (folder := SECTIONS[name][2])}
    if missing := [f"{name} needs {folder}" for name, (_, folder) in data.items() if not Path(folder).exists()]:
        options.error(
            f"{', '.join(missing)}: make it with python -m data.prepare (docs/data.md), or name other sections"
        )
    words = [*(["--rounds", str(given.rounds)] if given.rounds else []), *(["--small"] if given.small else [])]
    where, minutes = machine(), sum(SECTIONS[name][0] for name in chosen)
    print(f"{', '.join(chosen)}: about {minutes} minutes on two idle cores. {where}\n", flush=True)
    for name in chosen:
        load = os.getloadavg()[0]
        tables = measure(name, [*words, *data.get(name, [])])
        note = f"{datetime.now(UTC):%Y-%m-%d}, load {load:.1f} before and {os.getloadavg()[0]:.1f} after: `make bench"
        body = f'{note} ARGS="{" ".join([name, *words])}"`\n\n{tables}'
        document = given.out.read_text() if given.out.exists() else "# Benchmarks\n"
        given.out.write_text(replaced(document, f"{SECTIONS[name][1]}: {where}", body))


if __name__ == "__main__":
    main()
