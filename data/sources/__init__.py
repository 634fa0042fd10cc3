"""Where images come from: each format has one file here, and one entry in SOURCES.

A source lists its images once; its reader then reads any of them, in any process and any order. No name that a source
brings along is ever written to.
"""

from collections.abc import Callable
from pathlib import Path

from data.errors import DataError
from data.files import near
from data.sources.archive import open_tar, open_zip
from data.sources.digits import open_digits
from data.sources.folder import find, open_folder
from data.sources.listed import Listed
from data.sources.parquet import open_parquet
from data.sources.paths import SPLITS
from data.sources.shards import open_shards
from data.sources.source import BOUNDS, MAX_RATIO, Bounds, Item, Request, Source
from data.sources.torchvision import open_torchvision

__all__ = ["BOUNDS", "MAX_RATIO", "SPLITS", "Bounds", "Item", "Listed", "Request", "Source", "find", "open_source"]

# What a name on the command line may be, and what opens it or returns None; the first that opens it does.
SOURCES: dict[str, Callable[[Request], Source | None]] = {
    "digits": open_digits,
    "torchvision:NAME": open_torchvision,
    "a .parquet file or a folder of them": open_parquet,
    "WebDataset shards (a folder of .tar, or a pattern: shards/{000..009}.tar)": open_shards,
    "a .zip of a folder of images": open_zip,
    "a .tar, .tar.gz, .tar.xz or .tar.bz2 of one": open_tar,
    "a folder of images": open_folder,
}


def open_source(
    name: str, spool: Path, root: Path, download: bool = False, splits: bool = True, bounds: Bounds = BOUNDS
) -> Source:
    """Open the images that `name` stands for: one of SOURCES. The arguments are those of `Request`.

    Raises:
        DataError: There is no such source, it is damaged, or it holds no images.
    """
    request = Request(name, spool, root, download, splits, bounds)
    for open_ in SOURCES.values():
        if source := open_(request):
            return source
    problem = "is a file of no known kind" if request.path.exists() else f"does not exist{near(request.path)}"
    first, *others = reversed(SOURCES)
    raise DataError(f"{name} {problem}. Expected {first}, or {', '.join(others)}")
