"""Show what a data set holds, and check it: `python -m data.inspect FOLDER [--verify]`.

FOLDER is what `python -m data.prepare` or `python -m trainer.encode` made, or any folder of WebDataset shards. The
command prints a summary, and writes a contact sheet with some images of each class. With `--verify`, or if FOLDER has
no `dataset.json`, it decodes every sample, and compares the samples with dataset.json and with their checksums in the
index. The exit code is 1 if something is wrong with the data; each problem is listed.
"""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()


import io
from collections.abc import Callable
from pathlib import Path
from statistics import median

from data.command import add_limits, add_workers, command_errors, command_parser, say
from data.dataset import Dataset, Split, Spread
from data.errors import DataError
from data.files import atomically, escaped
from data.images import Limits
from data.inspect.sheet import sheet
from data.inspect.verify import inspect
from data.latents import FORMATS
from data.sources.paths import CONTACT_SHEET
from data.tables import table

MOST_CLASSES, MOST_REJECTED = 30, 20  # that are listed


def describe(folder: Path, dataset: Dataset) -> str:
    """Return the summary of a data set, as it is printed."""
    splits = list(dataset.splits.values())

    def row(name: str, value: Callable[[Split], object]) -> list[object]:
        return [name, *map(value, splits)]

    is_of_latents = any(split.latents for split in splits)
    rows: list[list[object]] = [
        ["", *dataset.splits],
        row("images", lambda split: split.images),
        row("unlabelled", lambda split: split.unlabelled),
        row("shards", lambda split: len(split.shards)),
        row("bytes", lambda split: sum(shard.bytes for shard in split.shards)),
        *([row("shape of the latents", _shape)] if is_of_latents else []),
        *([] if is_of_latents else [row("width", lambda split: _spread(split.width))]),
        *([] if is_of_latents else [row("height", lambda split: _spread(split.height))]),
        row("formats", lambda split: _counts(split.formats)),
        row("modes", lambda split: _counts(split.modes)),
        row("mean", lambda split: _range(split.latents.latents_mean) if split.latents else _figures(split.mean)),
        row("std", lambda split: _range(split.latents.latents_std) if split.latents else _figures(split.std)),
        row("fingerprint of the samples", lambda split: split.fingerprint),
    ]
    labels = sorted({int(label) for split in splits for label in split.labels})
    if len(labels) <= MOST_CLASSES:
        rows += [
            [f"class {escaped(dataset.class_name(label))}", *(split.labels.get(str(label), 0) for split in splits)]
            for label in labels
        ]
    else:
        counts = [[split.labels.get(str(label), 0) for label in labels] for split in splits]
        rows.append([f"{len(labels)} classes", *(f"{min(n)} to {max(n)} images each" for n in counts)])
    lines = [f"{folder}, fingerprint of all samples {dataset.fingerprint}", *table(rows)]
    if rejected := dataset.rejected:
        lines.append(f"rejected: {len(rejected):,}")
        lines += [f"  {one.file}: {one.reason}" for one in rejected[:MOST_REJECTED]]
        lines += ["  ... all are in dataset.json"] if len(rejected) > MOST_REJECTED else []
    return "\n".join(escaped(line) for line in lines)


def _spread(values: Spread | None) -> str:
    return f"{values.min} to {values.max}, median {values.median}" if values else "-"


def _shape(split: Split) -> str:
    """Return the shape of a split's latents: a map, or the numbers of a vector."""
    if not (split.latents and split.width and split.height):
        return "-"
    places = [split.height.max, split.width.max]
    shape = [len(split.latents.latents_mean), *(places if places != [1, 1] else [])]
    return " x ".join(map(str, shape)) + " numbers" * (len(shape) == 1)


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in values.items())


def _range(values: list[float]) -> str:
    """Return the range of what each channel, or each number of a vector, has."""
    return f"{min(values):.4f} to {max(values):.4f}, median {median(values):.4f}" if values else "-"


def _figures(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("data.inspect", __doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="data set or folder of shards to look at")
    add("--verify", action="store_true", help="decode every sample, and compare it with dataset.json and the index")
    add("--sheet", metavar="PNG", type=Path, help="file of the contact sheet (default: FOLDER/contact_sheet.png)")
    add_limits(parser)
    add_workers(parser)
    settings = parser.parse_args(arguments)
    path = settings.sheet or settings.folder / CONTACT_SHEET
    limits = Limits(settings.max_pixels, settings.max_bytes, settings.max_scans)
    with command_errors(parser):
        dataset, problems = inspect(settings.folder, settings.workers, settings.verify, limits)
        say(describe(settings.folder, dataset))
        holds_images = not any({*FORMATS} & {*split.formats} for split in dataset.splits.values())
        if (
            not problems and holds_images
        ):  # opening changed shards would index them again, and hide the change from the next look
            drawn = io.BytesIO()
            sheet(settings.folder, dataset, limits).save(drawn, "PNG")
            try:
                with atomically(path) as temporary, open(temporary, "xb") as file:
                    file.write(drawn.getvalue())
                say(f"contact sheet: {path}")
            except OSError as error:
                trouble = f"{path} cannot be written: {error.strerror}. Name another file with --sheet"
                if settings.sheet:
                    raise DataError(trouble) from error
                say(f"no contact sheet: {trouble}")
    if problems:
        listed = "".join(f"  {escaped(problem)}\n" for problem in problems)
        hint = "If shards were made again, remove their index.json.\n" if "were indexed" in listed else ""
        parser.exit(1, f"{len(problems):,} problems:\n{listed}{hint}")
    if settings.verify:
        say("all samples are valid")


if __name__ == "__main__":
    run_command(main)
