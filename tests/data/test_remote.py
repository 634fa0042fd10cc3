"""Shards elsewhere: a real HTTP server that misbehaves, a real S3 API, commands; a cache that processes share."""

import errno
import fcntl
import http.server
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, wait_until
from remote_reader import ALL, SAMPLES, SHARDS, read_all
from sample_images import flat

from data import index as index_command
from data.errors import DataError, UnreachableError
from data.loader import Batches, load
from data.order import Order
from data.processes import PROCESSES, prepare_workers, unblock_signals
from data.shards import remote
from data.shards.cache import Cache, _size
from data.shards.reader import Shards, write
from trainer.config.settings import DataConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("remote") / "set"
    samples = ({"__key__": f"{i:03d}", "png": flat(i), "cls": str(i % 3)} for i in ALL.tolist())
    write(out, samples, per_shard=SAMPLES)
    return out


@pytest.fixture(scope="module")
def expected(folder) -> list[bytes]:
    return Shards(folder).images(ALL)[0]


def room_for(shards: Shards, n: int) -> int:
    """Bytes of a cache for so many shards and their tables."""
    return n * (max(shard.filesize for shard in shards.shards) + 32 * SAMPLES + 256)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the folder with ranges; `server.trouble(path, first)` says how a GET goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(b"" if (content := self._content()) is None else content, 200, False)

    def do_GET(self) -> None:
        content, asked = self._content(), re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2])) if asked else (0, len(content or b"") - 1)
        if content is None:
            return self._answer(b"", 404)
        trouble = self.server.trouble(self.path, first)
        self.server.asked.append((self.path, first, trouble))
        if trouble == "500":
            return self._answer(b"", 500)
        if trouble == "stall":
            time.sleep(1.5)
        if trouble == "no ranges":
            return self._answer(content, 200)
        part = content[first : last + 1]
        return self._answer(part[: len(part) // 2] if trouble == "short" else part, 206, cut=trouble == "cut")

    def _content(self) -> bytes | None:
        path = self.server.folder / self.path.strip("/")
        return path.read_bytes() if path.is_file() else None

    def _answer(self, content: bytes, code: int, body: bool = True, cut: bool = False) -> None:
        self.send_response(code if content else max(code, 404))
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True
            self.connection.close()

    def log_message(self, *_) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:  # a client that was killed, or hung up on
        pass


@pytest.fixture
def server(folder, monkeypatch):
    made = Server(("127.0.0.1", 0), Handler)
    made.folder, made.trouble, made.asked = folder, lambda path, first: "", []
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.05, 0.1, 0.1))
    monkeypatch.setattr(remote, "STALL", 1.0)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def bucket(folder, s3):
    """The shards in a bucket: s3://pictures/set."""
    s3.mkdir("pictures")
    s3.put(str(folder), "pictures/", recursive=True)
    return "s3://pictures/set"


def tars(shards: Shards, cache: Path) -> int:
    return len(list(cache.glob("*.tar")))


# ---- anything that can be named


def test_shards_at_urls_read_as_those_here(server, bucket, folder, expected, tmp_path):
    local = Shards(folder)
    commands, braces = tmp_path / "commands.json", tmp_path / "braces.json"
    index_command.main([*(f"pipe:cat {path}" for path in local.paths), str(commands)])
    index_command.main([f"{server.url}/{{00000..00011}}.tar", str(braces)])
    index_command.main([f"{server.url}/{{00000..00011}}.tar", str(folder / "whole.json")])  # URLs of its own host
    sources = [server.url, f"{server.url}/index.json", f"{server.url}/whole.json", bucket, f"file://{folder}"]
    sources += [str(commands), str(braces)]
    for i, source in enumerate(sources):
        shards = Shards(source, cache=Cache(tmp_path / str(i), 10**9))
        contents, labels = shards.images(ALL)
        assert contents == expected, source
        assert labels.tolist() == (ALL % 3).tolist()
        assert tars(shards, tmp_path / str(i)) == SHARDS
        assert shards.name(15).endswith("00001.tar, member 015.png")
        if not source.endswith(("commands.json",)):
            assert shards.fingerprint() == local.fingerprint(), "a set that moved is the same set"


def test_a_run_trains_on_remote_shards_as_on_local_ones(server, here, digits, tmp_path):
    """The loader's workers, the fetching process and the trainer share one cache."""
    server.folder = digits / "train"
    run = ["--system", "AE", "--trainer.steps", "3", "--data.workers", "2", "--trainer.log_every", "1"]
    far = here(*run, "--data.train", server.url, "--data.cache", tmp_path / "c", "--trainer.run_dir", tmp_path / "far")
    assert far.returncode == 0, far.stderr
    near = here(*run, "--trainer.run_dir", tmp_path / "near")
    assert near.returncode == 0, near.stderr
    from test_run import lines

    assert lines(tmp_path / "far") == lines(tmp_path / "near")


# ---- what may go wrong on the way


@pytest.mark.parametrize("trouble", ["500", "cut", "stall", "short", "no ranges"])
def test_a_misbehaving_server_costs_time_only(server, expected, tmp_path, monkeypatch, trouble):
    monkeypatch.setattr(remote, "CHUNK", 7000)
    rng = np.random.default_rng(0)
    often = {"stall": 0.05, "no ranges": 1.0}.get(trouble, 0.3)
    server.trouble = lambda path, first: trouble if path.endswith(".tar") and rng.random() < often else ""
    shards = Shards(server.url, cache=Cache(tmp_path, 10**9))
    assert shards.images(ALL)[0] == expected
    assert trouble in {told for _, _, told in server.asked}


def test_what_has_come_is_not_fetched_again(server, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 4096)
    server.trouble = lambda path, first: "500" if path.endswith("03.tar") and first >= 3 * 4096 else ""
    shards = Shards(server.url, cache=Cache(tmp_path, 10**9))
    with pytest.raises(UnreachableError, match=r"cannot fetch http://.*/00003\.tar: 500.*; tried 6 times"):
        shards.image(35)
    server.trouble = lambda path, first: ""
    server.asked.clear()
    assert Shards(server.url, cache=Cache(tmp_path, 10**9)).image(35) == expected[35]
    assert min(first for path, first, _ in server.asked if path.endswith(".tar")) == 3 * 4096


def test_commands_fail_with_their_code_and_stall_no_longer_than_allowed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01,))
    monkeypatch.setattr(remote, "STALL", 0.3)
    path = folder / "00000.tar"
    for command, told in (
        (f"head -c 999 {path}", "code 0 after 999 bytes"),
        ("exit 3", "code 3"),
        ("sleep 9", "nothing"),
    ):
        entry = Shards(folder).shards[0]
        with pytest.raises(DataError, match=told):
            Cache(tmp_path, 10**9).fetch(f"pipe:{command}", entry)
    flaky = f"test -e {tmp_path}/tried || {{ touch {tmp_path}/tried; exit 1; }}; cat {path}"
    Cache(tmp_path, 10**9).fetch(f"pipe:{flaky}", entry)


def test_remote_mistakes_are_told(server, folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"cannot fetch http://.*/nowhere/index\.json: .*tried 6 times") as missing:
        Shards(f"{server.url}/nowhere")
    assert missing.type is DataError, "a mistake, which does not pass"
    with pytest.raises(DataError, match=r"a\.tar names shards, which need an index: python -m data\.index"):
        Shards(f"{server.url}/a.tar")
    with pytest.raises(DataError, match=r"cannot open nosuch://x/index\.json: .*nosuch"):
        Shards("nosuch://x")
    small = Shards(server.url, cache=Cache(tmp_path / "small", 1000))
    with pytest.raises(
        DataError, match=r"data\.cache_gb \(--cache_gb of trainer.evaluate\) is 1e-06, and the shard http.* alone has"
    ):
        small.image(0)
    shards = Shards(server.url, cache=Cache(tmp_path / "changed", 10**9))
    content = bytearray((folder / "00000.tar").read_bytes())
    content[:10] = b"other.png\0"
    (tmp_path / "00000.tar").write_bytes(content)
    server.folder = tmp_path
    with pytest.raises(DataError, match=r"is another one than its index says.*index it again"):
        shards.image(0)
    content = bytearray((folder / "00000.tar").read_bytes())
    content[int(np.load(folder / "00000.tar.npy")[3, 0]) + 50] ^= 1
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(
        DataError, match=r"images of the shard http.*00000\.tar have other checksums than its index says"
    ):
        shards.image(0)
    assert not list((tmp_path / "changed").glob("*.tar"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache .*file: .*name another folder"):
        Shards(f"file://{folder}", cache=Cache(tmp_path / "file", 10**9)).image(0)


# ---- what strangers' files may name


FOREIGN = {
    "pipe:touch ran": "a command",
    "/etc/passwd.tar": "an absolute path",
    "//127.0.0.1/0.tar": "a host without a scheme",
    "file:///etc/passwd.tar": "a file of this machine",
    "http://127.0.0.2/0.tar": "another host",
    "http://127.0.0.1:1/0.tar": "another port",
    "https://127.0.0.1/0.tar": "another scheme",
    "http://127.0.0.1:x/0.tar": "no port",
    "s3://pictures/0.tar": "another kind of store",
    "0.tar::file:///etc/passwd": "a chain",
    "reference://0.tar": "a kind of URL that runs templates",
}


@pytest.mark.parametrize("url", FOREIGN, ids=FOREIGN.values())
def test_an_index_elsewhere_names_nothing_but_what_is_beside_it(server, tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    server.folder = tmp_path
    entry = {"url": url, "nsamples": 1, "filesize": 10240}
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": [entry]}))
    with pytest.raises(
        DataError, match=f"index http.*/index.json names the shard {re.escape(url)}: an index that is el"
    ):
        Shards(server.url, cache=Cache(tmp_path / "cache", 10**9)).image(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json"], "nothing ran, nothing was written"


def test_a_run_s_manifest_names_no_commands_and_no_index_of_some(folder, tmp_path, monkeypatch):
    """`trainer.evaluate` opens a downloaded run's data so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "PAUSES", ())
    commands = tmp_path / "commands.json"
    entry = {"url": f"pipe:touch ran; cat {folder}/00000.tar", "nsamples": 10, "filesize": 10240}
    commands.write_text(json.dumps({"shardlist": [entry]}))
    for source in ("pipe:touch ran", str(commands), f"file://{commands}", "reference://x", "x::file://y"):
        with pytest.raises(DataError, match="is taken from a command line, or from an index on this machine"):
            DataConfig(source, cache=str(tmp_path / "cache")).open([source], by_user=False)[0].image(0)
    assert not (tmp_path / "ran").exists()
    assert len(DataConfig(str(folder)).open([str(folder)], by_user=False)[0]) == len(ALL)
    with pytest.raises(DataError):  # it is asked for, by the user's own index, and is no tar
        DataConfig(str(commands), cache=str(tmp_path / "cache")).open([str(commands)])[0].image(0)
    assert (tmp_path / "ran").exists()


def test_nothing_is_written_beside_data_that_a_manifest_names(folder, tmp_path):
    for tar in Path(folder).glob("*.tar"):
        shutil.copy(tar, tmp_path)
    before = sorted(tmp_path.iterdir())
    shards = DataConfig(str(tmp_path)).open([str(tmp_path)], by_user=False)[0]
    assert [shards.image(position) for position in (0, 15)] == [Shards(folder).image(position) for position in (0, 15)]
    assert sorted(tmp_path.iterdir()) == before
    Shards(tmp_path)
    assert (tmp_path / "index.json").exists(), "the user's own"


def test_an_index_without_end_is_not_read(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MAX_JSON", 10)
    with pytest.raises(DataError, match=r"index\.json has more than 10 bytes"):
        Shards(server.url)


# ---- the cache


def test_a_cache_leaves_other_files_alone(server, folder, tmp_path):
    """Whatever folder it is told to use: it may be full of shards."""
    others = ["0.npy", "photos.tar", "photos.tar.npy", ".photos.tar.npy.7", "x.part", "x.y.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"0" * 10**6)
    shards = Shards(server.url, cache=Cache(tmp_path, room_for(Shards(folder), 1)))
    shards.image(0), shards.image(30)
    assert all((tmp_path / name).exists() for name in others)


def in_processes(jobs: list[tuple]) -> list[list[bytes]]:
    prepare_workers()
    with PROCESSES.Pool(len(jobs), unblock_signals) as pool:
        return pool.starmap(read_all, jobs)


def bytes_in(folder: Path) -> int:
    """Of whole files and of those on their way, which another process may rename or drop meanwhile."""
    total = 0
    for path in [*folder.glob("*.part"), *folder.glob("*.tar"), *folder.glob("*.npy")]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_processes_share_downloads(server, expected, tmp_path):
    assert all(found == expected for found in in_processes([(server.url, str(tmp_path), 10**9, i) for i in range(3)]))
    fetched = [path for path, _, _ in server.asked if path.endswith(".tar")]
    assert sorted(fetched) == sorted({*fetched}), "each shard once"
    server.asked.clear()
    assert read_all(server.url, str(tmp_path), 10**9, 0) == expected
    assert not [path for path, _, _ in server.asked if path.endswith(".tar")], "a warm start fetches nothing"


def test_the_cache_never_passes_its_limit(server, folder, expected, tmp_path):
    """Three processes read all shards at random through room for four."""
    limit, most, done = room_for(Shards(folder), 4), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, bytes_in(tmp_path))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = in_processes([(server.url, str(tmp_path), limit, i) for i in range(3)])
    done.set()
    watcher.join()
    assert all(one == expected for one in found)
    assert limit / 2 < most <= limit
    assert len([path for path, _, _ in server.asked if path.endswith(".tar")]) > SHARDS, "shards were dropped"


def test_the_shard_unused_for_longest_is_dropped(server, folder, tmp_path):
    shards = Shards(server.url, cache=Cache(tmp_path, room_for(Shards(folder), 3)))
    for position in (0, 10, 20, 0, 30, 0, 20):  # shard 1 has to go, then nothing
        shards.image(position)
        time.sleep(0.01)
    fetched = [path for path, _, _ in server.asked if path.endswith(".tar")]
    assert fetched == [f"/0000{i}.tar" for i in (0, 1, 2, 3)]


def test_what_is_done_with_goes_before_what_is_still_to_be_used(server, folder, tmp_path):
    shards = Shards(server.url, cache=Cache(tmp_path, room_for(Shards(folder), 3)))
    for position in (0, 10, 20):
        shards.image(position)
        time.sleep(0.01)
    shards.release(2)
    shards.image(30)
    server.asked.clear()
    shards.image(0), shards.image(10)
    assert not server.asked
    shards.image(20)
    assert server.asked


def test_room_is_given_once(tmp_path, monkeypatch):
    """Two processes that look for room at once, and it is there for one."""
    files = Cache._files
    monkeypatch.setattr(Cache, "_files", lambda self: (time.sleep(0.2), list(files(self)))[1])
    found: list[bool] = []

    def reserve(name: str) -> None:
        found.append(Cache(tmp_path, 150)._reserve(tmp_path / f"{name}.tar", tmp_path / f"{name}.100.part", 100))

    def hold_then_reserve(name: str) -> None:
        reserve(name)
        if found[-1]:  # as who fetches it does
            with open(tmp_path / f"{name}.100.part") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                time.sleep(0.5)

    threads = [threading.Thread(target=hold_then_reserve, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, True] or len(list(tmp_path.glob("*.part"))) == 1


def test_a_set_made_anew_at_the_same_place_is_another_one(tmp_path):
    for value in (1, 201):
        write(tmp_path / "set", ({"__key__": f"{i}", "png": flat(value + i)} for i in range(3)))
        shards = Shards(f"file://{tmp_path}/set", cache=Cache(tmp_path / "cache", 10**9))
        assert shards.image(2) == flat(value + 2)


def test_a_full_disk_is_told_and_what_a_kill_left_goes(server, folder, tmp_path, monkeypatch):
    limit = room_for(Shards(folder), 2)
    shards = Shards(server.url, cache=Cache(tmp_path, limit))
    with monkeypatch.context() as patch:
        patch.setattr("data.shards.cache.save_table", lambda *_: False)
        with pytest.raises(DataError, match=r"data\.cache .*table cannot be written.*make room"):
            shards.image(0)
    for left in (".unfinished.0123.tar.npy.77", "4567.tar.npy"):
        (tmp_path / left).write_bytes(b"0" * 1000)
    for position in (0, 10, 20, 30):
        shards.image(position)
    assert bytes_in(tmp_path) <= limit
    assert len(list(tmp_path.glob("*.npy*")) + list(tmp_path.glob(".unfinished.*"))) == 2


def test_a_disk_smaller_than_the_limit_keeps_fewer_shards(server, folder, expected, tmp_path, monkeypatch):
    room, download = 3 * max(path.stat().st_size for path in folder.glob("*.tar")), remote.download

    tries = itertools.count()

    def download_half_and_fill_the_disk(url, file, size):
        assert next(tries) < 1000, "it does not end"
        if bytes_in(tmp_path) + size > room:
            file.write(remote.read(url)[: size // 2])
            _full()
        download(url, file, size)

    monkeypatch.setattr("data.shards.cache.download", download_half_and_fill_the_disk)
    shards = Shards(server.url, cache=Cache(tmp_path, 10**9))
    assert [shards.image(position) for position in range(len(expected))] == expected
    assert 1 <= len(list(tmp_path.glob("*.tar"))) <= 3
    assert shards.cache.limit <= room


def test_the_output_of_a_command_that_fills_the_disk_is_not_asked_for_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(remote, "_run", lambda *call: calls.append(call) or _full())
    with pytest.raises(OSError, match="No space left"):
        remote.download("pipe:cat shard", io.BytesIO(), 10)
    assert len(calls) == 1


def _full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_tmpdir_that_is_too_long_for_sockets_is_named(tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    code = "from data.processes import prepare_workers; prepare_workers()"
    environment = {**os.environ, "TMPDIR": str(long), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert f"ValueError: the workers of data.workers cannot be started in TMPDIR {long}" in done.stderr


def test_a_killed_fetch_is_taken_over(forked, server, expected, tmp_path):
    """kill -9 while shards are on their way: another process goes on, and none of what is there is damaged."""
    server.trouble, cache = lambda path, first: time.sleep(0.05) or "", tmp_path / "cache"
    reading = f"""
from remote_reader import read_all
from data.shards import remote
remote.CHUNK = 3000
read_all({server.url!r}, {str(cache)!r}, 10**9, 5)
"""
    for size in (3000, 6000):
        process = forked(reading)
        wait_until(lambda size=size: any(_size(path) >= size for path in cache.glob("*.part")))
        process(signal.SIGKILL)
        assert process.wait().codes == [-signal.SIGKILL]
    assert list(cache.glob("*.part")), "something was on its way"
    server.trouble = lambda path, first: ""
    assert read_all(server.url, str(cache), 10**9, 0) == expected


def test_a_command_of_a_killed_fetch_does_not_hold_the_lock(forked, tmp_path):
    index = tmp_path / "index.json"
    entry = {"url": "pipe:sleep 600", "nsamples": 1, "filesize": 10_240}
    index.write_text(json.dumps({"wids_version": 1, "shardlist": [entry]}))
    fetching = forked(
        f"""
import numpy as np
from data.shards.cache import Cache
from data.shards.reader import Shards
Shards({str(index)!r}, cache=Cache({str(tmp_path / "cache")!r}, 10**9)).images(np.array([0]))
"""
    )
    wait_until(lambda: commands_of(fetching.pids[0]))
    (command,) = commands_of(fetching.pids[0])
    fetching(signal.SIGKILL)
    fetching.wait()
    (part,) = (tmp_path / "cache").glob("*.part")
    with open(part, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.killpg(command, signal.SIGKILL)


def commands_of(pid: int) -> list[int]:
    """The shells that a process has started."""
    return [child.pid for child in psutil.Process(pid).children() if "sleep 600" in " ".join(child.cmdline())]


def tars_asked(server) -> set[str]:
    return {path for path, _, _ in [*server.asked] if path.endswith(".tar")}


def test_shards_are_fetched_before_they_are_needed(server, expected, tmp_path):
    before = set(multiprocessing.active_children())
    shards = Shards(server.url, cache=Cache(tmp_path, 10**9))
    order = Order(shards.counts, 4, 0, lanes=2, window=20)
    arriving = load(Batches([shards], [order], 32, 1, slice(0, 4)), range(25), 0, ahead=slice(0, 4))
    next(arriving)
    wait_until(lambda: tars(shards, tmp_path) == SHARDS)  # there is room for all
    assert sum(len(images.position) for (images,) in arriving) == 24 * 4
    assert not set(multiprocessing.active_children()) - before


def test_no_more_is_fetched_ahead_than_the_cache_has_room_for(server, folder, tmp_path):
    shards = Shards(server.url, cache=Cache(tmp_path, room_for(Shards(folder), 6)))
    order = Order(shards.counts, 4, 0, lanes=1, window=10)  # one shard after another
    arriving = load(Batches([shards], [order], 32, 1, slice(0, 4)), range(30), 0, ahead=slice(0, 4))
    next(arriving)
    wait_until(lambda: len(tars_asked(server)) > 1)
    time.sleep(0.5)  # in which it would ask for more
    assert len(tars_asked(server)) <= 5
    for (images,) in arriving:
        assert images.image[:, 0, 0, 0].tolist() == images.position.tolist()
    fetched = [path for path, _, _ in server.asked if path.endswith(".tar")]
    assert len(fetched) <= SHARDS + 2, "each was there when its turn came, and had not been dropped before"
