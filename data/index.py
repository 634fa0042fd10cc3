"""Index WebDataset shards that are in no folder of this machine: `python -m data.index SHARDS OUT.json`.

SHARDS are URLs or paths of tars, with braces as WebDataset writes them: `s3://bucket/train-{000..127}.tar`. Set
data.train or data.test to OUT.json. A folder of tars on this machine needs no command: its first reader indexes it.
"""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()


import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from braceexpand import braceexpand
from msgspec.structs import replace
from tqdm import tqdm

from data.command import command_errors, command_parser
from data.files import escaped, try_write
from data.shards.index import Shard, index_json, save_table, scan
from data.shards.remote import download, is_remote, size_of


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("data.index", __doc__)
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="URLs or paths of tars, with braces for many")
    parser.add_argument("out", metavar="OUT.json", type=Path, help="file of the index")
    jobs = "shards that are read at once; more of them help if each download is slow (default: %(default)s)"
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help=jobs)
    settings = parser.parse_args(arguments)
    out = settings.out
    if out.suffix != ".json":
        parser.error(f"OUT.json, the last argument, is {out}: expected the name of the index to write, such as x.json")
    with command_errors(parser):
        urls = [url for given in settings.shards for url in braceexpand(given)]
        if folders := [url for url in urls if os.path.isdir(url)]:
            raise ValueError(f"{folders[0]} is a folder, which is indexed when it is read: name tars")
        out.parent.mkdir(parents=True, exist_ok=True)
        shards, bar = [], tqdm(desc="indexing", total=len(urls), unit="shard", disable=None)
        with bar, ThreadPoolExecutor(max(1, settings.jobs)) as pool:
            try:
                for scanned in [pool.submit(_scan, url, out.parent) for url in urls]:
                    # A Ctrl-C just before a wait is noticed after it, hence short waits.
                    while wait([scanned], timeout=0.2).not_done:
                        pass
                    shards.append(scanned.result())
                    bar.update()
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr, flush=True)
                os._exit(130)  # Python's exit would wait for downloads, which cannot be interrupted
        if not any(shard.nsamples for shard in shards):
            raise ValueError(f"no shard has an image: {shards[0].url}: {'; '.join(shards[0].problems)}")
        if not try_write(out, index_json(shards)):
            raise ValueError(f"{out} cannot be written: name another OUT.json")
    for shard in shards:
        for problem in shard.problems:
            print(escaped(f"{shard.url}: {problem}"))
    print(f"{out}: {sum(shard.nsamples for shard in shards):,} images in {len(shards):,} shards")


def _scan(url: str, folder: Path) -> Shard:
    """Return a shard's entry; a remote shard is downloaded to a file without a name in `folder`."""
    if not is_remote(url):
        shard, table = scan(Path(url))
        if len(table):
            save_table(Path(url), table)
        return replace(shard, url=os.path.abspath(url))
    with tempfile.TemporaryFile(dir=folder) as file:
        download(url, file, size_of(url))
        return replace(scan(Path(f"/proc/self/fd/{file.fileno()}"))[0], url=url, mtime_ns=0)


if __name__ == "__main__":
    run_command(main)
