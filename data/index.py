"""Index WebDataset shards: `python -m data.index SHARDS OUT.json`, for shards that no folder of this machine holds.

SHARDS are URLs or paths of tars, with braces as WebDataset writes them: `s3://bucket/train-{000..127}.tar`. A folder of
tars needs no command: it is indexed where it lies, when it is first read.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from braceexpand import braceexpand
from msgspec.structs import replace
from tqdm import tqdm

from data.command import command_errors
from data.files import escaped, try_write
from data.shards.index import Shard, index_json, save_table, scan


def main(arguments: list[str] | None = None) -> None:
    from data.shards.remote import download, is_remote, size_of

    parser = argparse.ArgumentParser(
        prog="python -m data.index",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="URLs or paths of tars, with braces for many")
    parser.add_argument("out", metavar="OUT.json", type=Path, help="the index: data.train takes it")
    parser.add_argument("--jobs", type=int, default=4, help="shards read at once")
    settings = parser.parse_args(arguments)

    def one(url: str) -> Shard:
        if not is_remote(url):
            shard, table = scan(Path(url))
            if len(table):
                save_table(Path(url), table)
            return replace(shard, url=os.path.abspath(url))
        with tempfile.TemporaryFile(dir=settings.out.parent) as file:  # without a name, so that nothing stays of it
            download(url, file, size_of(url))
            return replace(scan(Path(f"/proc/self/fd/{file.fileno()}"))[0], url=url, mtime_ns=0)

    if settings.out.suffix != ".json":
        parser.error(f"OUT.json, the last word, is {settings.out}: expected the name of the index to write, x.json")
    with command_errors(parser):
        urls = [url for given in settings.shards for url in braceexpand(given)]
        if folders := [url for url in urls if os.path.isdir(url)]:
            raise ValueError(f"{folders[0]} is a folder, which is indexed when it is read: name tars")
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max(1, settings.jobs)) as pool:
            try:
                shards = list(tqdm(pool.map(one, urls), "indexing", len(urls), unit="shard", disable=None))
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr, flush=True)
                os._exit(130)  # downloads cannot be ended, and Python would wait for them
        if not any(shard.nsamples for shard in shards):
            raise ValueError(f"no shard has an image: {shards[0].url}: {'; '.join(shards[0].problems)}")
        if not try_write(settings.out, index_json(shards)):
            raise ValueError(f"{settings.out} cannot be written: name another OUT.json")
    for shard in shards:
        for problem in shard.problems:
            print(escaped(f"{shard.url}: {problem}"))
    print(f"{settings.out}: {sum(shard.nsamples for shard in shards):,} images in {len(shards):,} shards")


if __name__ == "__main__":
    main(sys.argv[1:])
