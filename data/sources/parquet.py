"""Parquet files as Hugging Face writes them: a column of images, one of labels, the classes' names in the schema."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from data.errors import DataError
from data.files import parse, regular_file
from data.shards.tars import label_of
from data.sources.paths import split_of
from data.sources.source import Item, RangeReader, Request, Source, number_classes


def open_parquet(request: Request) -> Source | None:
    """Open a Parquet file or a folder of them; the images are copied to the spool, where they can be read one by one.

    Raises:
        DataError: pyarrow is not installed, a file is damaged, or no column holds images.
    """
    if not (paths := request.files(".parquet")):
        return None
    request.check_alone(paths)
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{paths[0]} is a Parquet file, and pyarrow, which reads those, is not installed: pip install pyarrow, or "
            "'.[parquet]' of this project"
        ) from error
    folder = request.path if request.path.is_dir() else request.path.parent
    items, labels, classes = _copy_images(paths, folder, request)
    if not items:
        raise DataError(f"{paths[0]} holds no rows: name a file that has images")
    if any(isinstance(label, str) for label in labels):
        labels, classes = number_classes(labels)
    try:
        numbers = [-1 if label is None else label_of(label) for label in labels]
    except ValueError as error:
        raise DataError(f"a label of {paths[0]}: {error}") from error
    items = [item._replace(label=number) for item, number in zip(items, numbers, strict=True)]
    return Source(items, RangeReader([request.spool], request.bounds.image.bytes), classes)


def _copy_images(paths: list[Path], folder: Path, request: Request) -> tuple[list[Item], list[Any], list[str]]:
    """Write all images to the spool; return their items and labels, and the classes' names."""
    items, labels, classes = list[Item](), list[Any](), list[str]()
    with open(request.spool, "wb") as file:
        for path in tqdm(paths, desc="unpacking", unit=" files", disable=None, leave=False):
            start, packed = file.tell(), path.stat().st_size
            split, stamp, name = split_of(path, folder), path.stat().st_mtime_ns, path.relative_to(folder)
            for number, (content, label, names) in enumerate(_rows(path)):
                where = (0, file.tell(), file.write(content))
                request.bounds.check(file.tell() - start, path, packed)
                key = f"{name.with_suffix('')}/{number:08d}"
                items.append(Item(key, f"{name}, row {number}", where, len(content), stamp, split))
                labels.append(label)
                classes = classes or names
    return items, labels, classes


def _rows(path: Path) -> Iterator[tuple[bytes, int | str | None, list[str]]]:
    """Yield image, label and the classes' names of each row."""
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(regular_file(path))
        image, label, names = _columns(path, file.schema_arrow)
        for batch in file.iter_batches(64, columns=[image, label] if label else [image]):
            for row in batch.to_pylist():
                content = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
                yield content or b"", row[label] if label else None, names
    except DataError:
        raise
    except Exception as error:  # pyarrow raises nearly anything on damaged bytes
        raise DataError(f"cannot read {path} as Parquet: {error}. Fetch it again") from error


def _columns(path: Path, schema: Any) -> tuple[str, str | None, list[str]]:
    """Return the column of images, the one of labels, and the names of their classes."""
    metadata = parse((schema.metadata or {}).get(b"huggingface", b"{}"), dict[str, Any])
    features = metadata.get("info", {}).get("features", {})
    types = {column.name: str(column.type) for column in schema}
    binary = [name for name, type_ in types.items() if type_.startswith(("binary", "large_binary", "struct<bytes: "))]
    images = [name for name in ("image", "img") if name in binary] or binary
    if not images or (len(images) > 1 and images[0] not in ("image", "img")):
        raise DataError(
            f"{path} has {len(binary)} columns that may hold encoded images, none of them called image. Expected a "
            f"column `image` of bytes, or of struct{{bytes, path}}; its columns: "
            + ", ".join(f"{name} ({type_})" for name, type_ in types.items())
        )
    named = [
        name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    ]
    label = "label" if "label" in types else next(iter(named), None)
    if label is not None and not (types[label].startswith(("int", "uint")) or "string" in types[label]):
        label = None
    names = features[label].get("names", []) if label in named else []
    return images[0], label, msgspec.convert(names, list[str])
