"""Shards are ordinary WebDataset; their index follows them, and bad shards are named."""

import json
import os
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
import webdataset
import xxhash
from conftest import ROOT
from sample_images import encoded, flat, tar

from data import index as index_command
from data.errors import DataError
from data.loader import read
from data.processes import PROCESSES, WARNING, prepare_workers, unblock_signals
from data.shards import index, tars
from data.shards.reader import Shards, write


def test_digits_are_genuine_webdataset_shards(digits):
    train = list(webdataset.WebDataset(str(digits / "train" / "00000.tar"), shardshuffle=False).decode("pil"))
    test = list(webdataset.WebDataset(str(digits / "test" / "00000.tar"), shardshuffle=False).decode("pil"))
    assert len(train) + len(test) == 1797
    assert train[0]["png"].size == (8, 8)
    assert {sample["cls"] for sample in test} == set(range(10))
    from sklearn.datasets import load_digits

    first_held_out = (load_digits().images[4] * (255 / 16)).round()
    assert np.array_equal(np.asarray(test[0]["png"])[..., 0], first_held_out)


def test_reading_by_position_agrees_with_webdataset(numbered):
    expected = [(s["png"], int(s["cls"])) for s in webdataset.WebDataset(numbered.paths, shardshuffle=False)]
    assert [(numbered.image(i), numbered.labels[i]) for i in range(50)] == expected
    mixed = np.array([49, 3, 20, 3, 7, 48])
    contents, labels = numbered.images(mixed)
    assert list(zip(contents, labels.tolist(), strict=True)) == [expected[i] for i in mixed]
    assert numbered.counts.tolist() == [7] * 7 + [1]
    index_of = json.loads((ROOT / numbered.source / "index.json").read_text())
    assert [shard["nsamples"] for shard in index_of["shardlist"]] == numbered.counts.tolist()


def test_an_index_names_shards_wherever_they_are(numbered, tmp_path):
    """index.json itself, and one that `python -m data.index` makes of a brace pattern."""
    assert Shards(f"{numbered.source}/index.json").fingerprint() == numbered.fingerprint()
    out = tmp_path / "elsewhere" / "all.json"
    index_command.main([f"{numbered.source}/0000{{0..7}}.tar", str(out)])
    again = Shards(out)
    assert again.fingerprint() == numbered.fingerprint()
    assert again.image(33) == numbered.image(33)
    with pytest.raises(DataError, match="need an index: python -m"):
        Shards(f"{numbered.source}/0000{{0..7}}.tar")
    out.write_text('{"shardlist": [{"url": "a.tar"}]}')
    with pytest.raises(DataError, match=r"all\.json is no index of shards .*nsamples"):
        Shards(out)


def test_what_was_read_does_not_travel_to_workers(numbered):
    before = len(pickle.dumps(numbered))
    for i in range(50):
        numbered.image(i)
    assert len(pickle.dumps(numbered)) < before + 200
    assert pickle.loads(pickle.dumps(numbered)).image(7) == numbered.image(7)


def files_of_index(shards: Shards) -> list:
    folder = type(ROOT)(shards.source)
    return [*folder.glob("*.npy"), folder / "index.json"]


def test_shards_in_a_folder_that_cannot_be_written_read_the_same(numbered, monkeypatch):
    for path in files_of_index(numbered):
        path.unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.rename", refuse)  # root may write anywhere
    again = Shards(numbered.source)
    assert again.fingerprint() == numbered.fingerprint()
    assert again.image(20) == numbered.image(20)
    assert not os.path.exists(f"{numbered.source}/00000.tar.npy")


def test_what_is_lost_of_an_index_is_made_anew(numbered):
    before, held = numbered.fingerprint(), [numbered.image(i) for i in range(50)]
    for path in files_of_index(numbered):
        content = path.read_bytes()
        for spoil in (path.unlink, lambda path=path: path.write_bytes(b"spoilt")):
            spoil()
            again = Shards(numbered.source)
            assert [again.image(i) for i in range(50)] == held
            assert os.path.exists(f"{numbered.source}/00003.tar.npy")
            assert again.fingerprint() == before
        path.write_bytes(content)


def test_the_index_of_another_program_is_left_alone(numbered):
    path, before = type(ROOT)(numbered.source) / "index.json", numbered.fingerprint()
    content = json.loads(path.read_text())
    shards = [{key: shard[key] for key in ("url", "nsamples", "filesize")} for shard in content["shardlist"]]
    path.write_text(json.dumps({"wids_version": 1, "name": "mine", "shardlist": shards}))
    theirs = path.read_bytes()
    assert Shards(path).fingerprint() != before, "as it is given, it tells less"
    assert Shards(path).image(33) == numbered.image(33)
    for _ in range(2):
        assert Shards(numbered.source).fingerprint() == before
        assert (path.read_bytes(), path.with_name(".index.json").exists()) == (theirs, True)
    shards[2]["nsamples"] = 9  # wids counts keys, some of which may have no image
    path.write_text(json.dumps({"shardlist": shards}))
    path.with_name("00002.tar.npy").unlink()
    with pytest.raises(DataError, match=r"00002\.tar has 7 images, and its index says 9 samples: index it again"):
        Shards(path).image(15)


def test_a_shard_that_is_made_again_has_its_new_labels_by_another_programs_index_too(tmp_path):
    for label in (1, 2):
        numbers = ({"__key__": f"{i:03d}", "png": flat(i), "cls": str(label)} for i in range(9))
        write(tmp_path / str(label), numbers)
    shard, theirs = tmp_path / "00000.tar", tmp_path / "index.json"
    shutil.copy(tmp_path / "1" / "00000.tar", shard)
    entry = {"url": shard.name, "nsamples": 9, "filesize": shard.stat().st_size}
    theirs.write_text(json.dumps({"wids_version": 1, "shardlist": [entry]}))
    for label in (1, 1, 2, 2):
        if label == 2:
            shutil.copy(tmp_path / "2" / "00000.tar", shard)
        assert set(Shards(theirs).labels) == {label}


def test_an_index_of_shards_that_are_gone_or_changed(numbered):
    path = f"{numbered.source}/index.json"
    os.unlink(numbered.paths[1])
    with open(numbered.paths[3], "ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"00001\.tar: it cannot be found.*1 more problem"):
        Shards(path)
    skipping = Shards(path, "skip")
    assert len(skipping) == 50 - 14
    assert "in its index: index it again" in skipping.problems[1]


def test_the_command_that_indexes_refuses_what_it_would_spoil(numbered, capsys):
    content = (ROOT / numbered.paths[1]).read_bytes()
    for arguments, told in (
        (numbered.paths[:2], "OUT.json, the last argument, is"),
        ([f"{numbered.source}/nowhere.tar", "o.json"], "nowhere.tar: it cannot be read: No such file"),
        (["x/{0..3.tar", "o.json"], "nbalanced"),
        ([numbered.source, "o.json"], "is a folder, which is indexed when it is read"),
    ):
        with pytest.raises(SystemExit) as stopped:
            index_command.main([*arguments])
        assert (stopped.value.code, told in capsys.readouterr().err) == (2, True)
    assert (ROOT / numbered.paths[1]).read_bytes() == content


def test_several_processes_index_one_folder(numbered):
    for path in files_of_index(numbered):
        path.unlink()
    prepare_workers()
    prepare_workers()
    assert sys.warnoptions.count(WARNING) == 1, "however often a process asks for workers"
    with PROCESSES.Pool(3, unblock_signals) as pool:
        assert {shards.fingerprint() for shards in pool.map(Shards, [numbered.source] * 6)} == {numbered.fingerprint()}


def test_a_large_folder_is_indexed_in_parallel(numbered, monkeypatch):
    for path in files_of_index(numbered):
        path.unlink()
    monkeypatch.setattr(index, "PARALLEL", 1)
    assert Shards(numbered.source).fingerprint() == numbered.fingerprint()


def test_a_replaced_shard_is_indexed_anew(numbered, tmp_path):
    before = numbered.fingerprint()
    write(tmp_path / "other", ({"__key__": f"{i}", "png": flat(i)} for i in range(3)))
    shutil.copyfile(tmp_path / "other" / "00000.tar", numbered.paths[0])
    os.utime(numbered.paths[0], (0, 0))  # as by a copy that keeps an older file's time
    again = Shards(numbered.source)
    assert again.counts[0] == 3
    assert again.labels[0] == -1
    assert again.fingerprint() != before


def same_size(i: int) -> bytes:
    """A flat PGM: as many bytes as any other, whatever its grey."""
    return encoded(np.full((8, 8), i, np.uint8), "PPM")


def test_images_remade_under_the_same_names_are_another_set(tmp_path):
    prints = set()
    for shift in (0, 100):
        write(tmp_path / "set", ({"__key__": f"{i}", "pgm": same_size(i + shift)} for i in range(9)), per_shard=4)
        prints.add(Shards(tmp_path / "set").fingerprint())
    assert len(prints) == 2
    assert Shards(f"{tmp_path}/set/index.json").fingerprint() in prints, "the index has it, too"


def test_an_index_has_a_checksum_of_every_image(numbered):
    for number, entry in enumerate(numbered.shards):
        table = np.load(f"{numbered.paths[number]}.npy")
        first = int(numbered.ends[number] - numbered.counts[number])
        sums = [xxhash.xxh3_64_intdigest(numbered.image(first + row)) for row in range(len(table))]
        assert table[:, 3].astype(np.uint64).tolist() == sums
        assert entry.checksum == index.digest(table[:, 3])
    with open(numbered.paths[0], "rb") as file:
        content = file.read()
        for piece in (100, 10**6):  # what is read in pieces has the same checksum
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tars, "PIECE", piece)
                assert tars.checksum(file.fileno(), 7, 5000) % 2**64 == xxhash.xxh3_64_intdigest(content[7:5007])


def test_images_are_not_read_where_there_is_an_index(numbered, monkeypatch):
    """Neither at a start, nor where a table is lost that the index has digests of."""
    before = numbered.fingerprint(), [numbered.image(i) for i in range(50)]
    os.unlink(f"{numbered.paths[2]}.npy")
    monkeypatch.setattr(index, "checksum", lambda *_: pytest.fail("an image was read"))
    again = Shards(f"{numbered.source}/index.json")
    assert (again.fingerprint(), [again.image(i) for i in range(50)]) == before


# ---- what may be wrong with shards


def test_missing_empty_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        Shards(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no shards"):
        Shards(tmp_path / "empty")
    (tmp_path / "empty" / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match=r"a\.tar: it is damaged, cut short, compressed or no tar"):
        Shards(tmp_path / "empty")


def member_end(path: str, n: int) -> int:
    with tarfile.open(path) as file:
        member = file.getmembers()[n]
    return member.offset_data + -(-member.size // 512) * 512


PROBLEMS = {
    "cut in a header": (lambda path: os.truncate(path, member_end(path, 3) + 100), "cut short", 1),
    "cut in an image": (lambda path: os.truncate(path, member_end(path, 3) - 500), "cut short", 1),
    "cut between two samples": (lambda path: os.truncate(path, member_end(path, 3)), "neither a member nor the end", 1),
    "missing": (os.unlink, "in index.json, but not in the folder", 0),
    "no samples": (lambda path: tar(path, {}), "it holds no samples", 0),
    "empty": (lambda path: os.truncate(path, 0), "empty", 0),
    "a key twice": (
        lambda path: tar(path, {"a.png": flat(1), "b.png": flat(2), "a.cls": b"1"}),
        "the key a appears twice",
        2,
    ),
    "two images": (lambda path: tar(path, {"a.png": flat(1), "a.jpg": flat(2)}), "sample a has 2 images", 1),
    "no image": (lambda path: tar(path, {"a.png": flat(1), "b.txt": b"?"}), "sample b has no image", 1),
    "a label that is no number": (lambda path: tar(path, {"a.png": flat(1), "b.cls": b"cat"}), "'cat'", 1),
    "a label of 2^64": (lambda path: tar(path, {"a.png": flat(1), "b.cls": b"%d" % 2**64}), "is no number of a", 1),
    "a label of 10^9": (lambda path: tar(path, {"a.png": flat(1), "b.cls": b"%d" % 10**9}), "expected 0 to", 1),
    "a label below none": (lambda path: tar(path, {"a.png": flat(1), "b.cls": b"-7"}), "expected 0 to", 1),
    "a FIFO": (lambda path: (os.unlink(path), os.mkfifo(path)), "it is a FIFO, and no regular file", 0),
    "a link to itself": (lambda path: (os.unlink(path), os.symlink(path, path)), "it cannot be read: Too many", 0),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_bad_shard_stops_or_is_left_out(numbered, problem):
    """Whatever of it is whole is kept where errors are skipped; the same whoever looks, and when."""
    spoil, told, left = PROBLEMS[problem]
    spoil(numbered.paths[2])
    for _ in range(2):  # the second finds the index of the first
        with pytest.raises(DataError, match="00002.tar.*" + told) as raised:
            Shards(numbered.source)
        assert "--data.on_error skip" in str(raised.value)
        skipping = Shards(numbered.source, "skip")
        assert len(skipping) == 50 - 7 + left
        assert told in skipping.problems[0]
        assert len(read(skipping, np.arange(len(skipping)), 32, 1).skipped) == 0


def header(name: str, size: int, **other) -> bytes:
    """Of a tar's member, whatever size it claims."""
    info = tarfile.TarInfo(name)
    info.size = 0
    for key, value in other.items():
        setattr(info, key, value)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else size.to_bytes(12, "big", signed=True)
    block[124] |= 0x80 * (size >= 8**11)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


def pax(key: str, value: str) -> bytes:
    record = f" {key}={value}\n"
    length = len(record) + 2
    content = f"{length}{record}".encode()
    return header("pax", len(content), type=tarfile.XHDTYPE) + content.ljust(512, b"\0")


LONG = header("long", 5, type=tarfile.GNUTYPE_LONGNAME) + b"a.png".ljust(512, b"\0")
HOSTILE = {
    "a negative size": header("b.png", -512),
    "a negative size that leads far back": header("b.png", -(2**62)),
    "a negative size of no file": header("b", -1024, type=b"Z"),
    "a negative size by pax": pax("size", "-9") + header("b.png", 0),
    "a size without end": header("b.png", 2**62),
    "a size beyond any number": header("b.png", 2**87),
    "an extended header without end": header("x", 2**40, type=tarfile.XHDTYPE),
    "an extended header of negative size": header("x", -512, type=tarfile.XHDTYPE),
    "a name in a name in a name": LONG * 5000,
    "a sparse file": header("b.png", 0, type=tarfile.GNUTYPE_SPARSE),
}


@pytest.mark.parametrize("problem", HOSTILE)
def test_a_hostile_tar_is_a_damaged_one(tmp_path, problem):
    """And what is before the damage counts. It may neither loop, nor take memory, nor the stack."""
    tar(tmp_path / "x.tar", {"a.png": flat(1)})
    end = member_end(tmp_path / "x.tar", 0)
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:end] + HOSTILE[problem] + bytes(10240))
    entry, table = index.scan(tmp_path / "x.tar")
    assert len(table) <= 1
    assert entry.problems[0].startswith("it is damaged, cut short, compressed or no tar: ")


def test_only_regular_files_are_opened(numbered):
    """Beside shards, too: a FIFO there is as a file that is missing, whatever name it has."""
    before, folder = numbered.fingerprint(), ROOT / numbered.source
    for name in ("index.json", "00003.tar.npy", ".index.lock"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        assert Shards(folder).fingerprint() == before
    (folder / "00003.tar.npy").unlink()
    os.mkfifo(folder / "00003.tar.npy")
    assert Shards(folder).image(21) == numbered.image(21)
    (folder / "x.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"x\.json cannot be read: it is a device, and no regular file"):
        Shards(folder / "x.json")


def test_an_index_is_written_through_no_link(numbered, tmp_path):
    (tmp_path / "precious").write_text("mine")
    for path in files_of_index(numbered):
        path.unlink()
        for name in (path.name, f".unfinished.{path.name}.{os.getpid()}"):
            (path.parent / name).symlink_to(tmp_path / "precious")
    assert Shards(numbered.source).fingerprint() == numbered.fingerprint()
    assert (tmp_path / "precious").read_text() == "mine"


ENTRY = {"url": "a.tar", "nsamples": 1, "filesize": 10240}


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        {"shardlist": {}},
        {"shardlist": [None]},
        *({"shardlist": [ENTRY | {"url": value}]} for value in (3, None, "", ["a.tar"])),
        *({"shardlist": [ENTRY | {"nsamples": value}]} for value in (2**62, 2**80, -1, 1.5, "7", 21)),
        *({"shardlist": [ENTRY | {"filesize": value}]} for value in (2**62, -1, None, {})),
        {"shardlist": [ENTRY | {"problems": [1]}]},
        {"shardlist": [ENTRY | {"table": 7}]},
    ],
    ids=json.dumps,
)
def test_an_index_of_another_shape_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"x\.json is no index of shards .*(\$|expected)"):
        Shards(tmp_path / "x.json")


def test_an_index_that_is_deep_is_refused(tmp_path):
    for content in ("[" * 10**5, '{"a":' * 10**5, '{"shardlist": ' + "[" * 10**5 + "]" * 10**5 + "}"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DataError, match=r"x\.json is no index of shards"):
            Shards(tmp_path / "x.json")


def test_a_missing_shard_is_told_until_its_line_is_gone(numbered):
    os.unlink(numbered.paths[7])
    with pytest.raises(DataError, match=r"00007\.tar"):
        Shards(numbered.source)
    write(type(ROOT)(numbered.source) / "more", [{"__key__": "0", "png": flat(0)}])
    shutil.move(f"{numbered.source}/more/00000.tar", f"{numbered.source}/00008.tar")  # the index is written again
    with pytest.raises(DataError, match=r"00007\.tar"):
        Shards(numbered.source)
    os.unlink(f"{numbered.source}/index.json")
    assert len(Shards(numbered.source)) == 50


def test_a_shard_that_changes_under_the_run_is_named(numbered):
    numbered.image(0)
    os.truncate(numbered.paths[0], member_end(numbered.paths[0], 8) - 500)
    with pytest.raises(DataError, match=r"00000\.tar ends at byte \d+, but its index .* cut short or replaced"):
        numbered.image(4)
    with pytest.raises(DataError, match=r"00000\.tar was replaced since it was indexed"):
        pickle.loads(pickle.dumps(numbered)).image(4)  # as another process opens it
    content = (ROOT / numbered.paths[2]).read_bytes()
    (ROOT / numbered.paths[2]).write_bytes(content[::-1])
    with pytest.raises(DataError, match=r"00002\.tar was replaced since it was indexed"):
        numbered.image(15)
    os.unlink(numbered.paths[1])
    with pytest.raises(DataError, match=r"cannot open shard .*00001\.tar: No such file"):
        numbered.image(8)
