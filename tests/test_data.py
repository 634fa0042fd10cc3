"""Shards are ordinary WebDataset, batches a pure function of the step; any image is read, and bad data is named."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
import webdataset
import xxhash
from conftest import ROOT, wait_until
from PIL import Image

from data import images
from data import index as index_command
from data.errors import DataError
from data.images import Limits, View, decode
from data.loader import Augment, Batches, load, read
from data.order import Order, sample_checksum
from data.processes import PROCESSES, WARNING, prepare_workers, unblock_signals
from data.shards import index
from data.shards.reader import Shards, write
from trainer.config.settings import DataConfig


def encoded(pixels: np.ndarray, form: str = "PNG", mode: str | None = None, **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)).save(file, form, **options)
    return file.getvalue()


def flat(i: int) -> bytes:
    return encoded(np.full((8, 8), i, np.uint8))


def tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def corrupt(shards: Shards, position: int) -> None:
    """Spoil an image, its place in the tar being left as it is."""
    shard, row = shards._place(position)
    with open(shards.paths[shard], "r+b") as file:
        file.seek(int(np.load(f"{shards.paths[shard]}.npy")[row, 0]))
        file.write(b"spoilt")


@pytest.fixture
def numbered(tmp_path) -> Shards:
    """50 flat images whose grey is their number, in shards of 7."""
    write(
        tmp_path / "numbered",
        ({"__key__": f"{i:03d}", "png": flat(i), "cls": str(i % 3)} for i in range(50)),
        per_shard=7,
    )
    return Shards(tmp_path / "numbered")


def batches(shards: Shards, rows: slice = slice(0, 8), augment: Augment = Augment(), size: int = 32) -> Batches:
    return Batches([shards], [Order(shards.counts, 8, 0)], size, 1, rows, augment)


# ---- shards and their index


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

    monkeypatch.setattr("pathlib.Path.replace", refuse)  # root may write anywhere
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
    with pytest.raises(DataError, match=r"00002\.tar has 7 images, and its index says 9 samples: index it anew"):
        Shards(path).image(15)


def test_an_index_of_shards_that_are_gone_or_changed(numbered):
    path = f"{numbered.source}/index.json"
    os.unlink(numbered.paths[1])
    with open(numbered.paths[3], "ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"00001\.tar: it cannot be found.*1 more problem"):
        Shards(path)
    skipping = Shards(path, "skip")
    assert len(skipping) == 50 - 14
    assert "in its index: index it anew" in skipping.problems[1]


def test_the_command_that_indexes_refuses_what_it_would_spoil(numbered, capsys):
    content = (ROOT / numbered.paths[1]).read_bytes()
    for arguments, told in (
        (numbered.paths[:2], "OUT.json, the last word, is"),
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
                patch.setattr(index, "PIECE", piece)
                assert index.checksum(file.fileno(), 7, 5000) % 2**64 == xxhash.xxh3_64_intdigest(content[7:5007])


def test_images_are_not_read_where_there_is_an_index(numbered, monkeypatch):
    """Neither at a start, nor where a table is lost that the index has digests of."""
    before = numbered.fingerprint(), [numbered.image(i) for i in range(50)]
    os.unlink(f"{numbered.paths[2]}.npy")
    monkeypatch.setattr(index, "checksum", lambda *_: pytest.fail("an image was read"))
    again = Shards(f"{numbered.source}/index.json")
    assert (again.fingerprint(), [again.image(i) for i in range(50)]) == before


# ---- what may be wrong with data


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
        for name in (path.name, f".{path.name}.{os.getpid()}"):
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
    shutil.move(f"{numbered.source}/more/00000.tar", f"{numbered.source}/00008.tar")  # the index is written anew
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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_stops_and_is_named(numbered, workers):
    corrupt(numbered, 5)
    with pytest.raises(DataError, match=r"step \d: cannot decode an image: .*00000.tar, member 005.png") as raised:
        list(load(batches(Shards(numbered.source)), range(6), workers))
    assert "Traceback" not in str(raised.value)
    assert "--data.on_error skip" in str(raised.value)


def test_a_neighbour_stands_in_for_a_corrupt_image_on_any_world(numbered):
    for position in (5, 6, 14, 49):
        corrupt(numbered, position)
    skipping = Shards(numbered.source, "skip")
    whole = [one for (one,) in load(batches(skipping), range(6), 0)]
    seen = torch.cat([one.position for one in whole]).tolist()
    stands_in = {5: 0, 6: 0, 14: 15}  # 5's neighbour 6 is corrupt, too, so 5's is the shard's first; 49 has none
    wanted = [p for step in range(6) for p in Order(skipping.counts, 8, 0)[step].tolist()]
    for want, got in zip(wanted, seen, strict=True):
        assert got == stands_in.get(want, want) or (want == 49 and got != 49)
    told = [line for one in whole for line in one.skipped]
    assert len(told) == len([p for p in wanted if p in (5, 6, 14, 49)])
    assert any("member 005.png" in line and "seen instead: " in line and "member 000.png" in line for line in told)
    grey = torch.cat([one.image[:, 0, 0, 0] for one in whole]).tolist()
    assert grey == seen, "the pixels are the stand-in's"
    assert torch.cat([one.label for one in whole]).tolist() == [p % 3 for p in seen], "and so is the label"
    for rank in range(4):
        part = [one for (one,) in load(batches(skipping, slice(2 * rank, 2 * rank + 2)), range(6), rank % 2)]
        for one, all_of in zip(part, whole, strict=True):
            assert torch.equal(one.position, all_of.position[2 * rank : 2 * rank + 2])


def test_no_good_image_at_all_is_an_error(numbered):
    for position in range(50):
        corrupt(numbered, position)
    with pytest.raises(DataError, match="is damaged, and so is all that could stand in for it"):
        list(load(batches(Shards(numbered.source, "skip")), range(1), 0))


# ---- images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_decode_agrees_with_pillow(channels, form):
    """To the pixel where the size fits (a colour JPEG in grey within two: libjpeg does not go through RGB)."""
    for mode in ("RGB", "L"):
        content = encoded(smooth(32, 32), form, mode)
        expected = Image.open(io.BytesIO(content)).convert("L" if channels == 1 else "RGB")
        found = decode(content, 32, channels)
        assert found.shape == (32, 32, channels)
        error = np.abs(found.astype(int).squeeze() - np.asarray(expected)).max()
        assert error <= (2 if (form, mode, channels) == ("JPEG", "RGB", 1) else 0)
    assert decode(encoded(np.full((8, 20), 7, np.uint8), form), 32, channels).tolist() == np.full(
        (32, 32, channels), 7
    ).tolist() or form in ("JPEG", "WEBP")


def smooth(width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([255 * x, 255 * y, 127 + 127 * np.sin(9 * x)], -1).astype(np.uint8)


def test_large_jpegs_are_scaled_while_they_are_decoded():
    content = encoded(smooth(1000, 800), "JPEG", quality=95)
    scaled = decode(content, 64, 3).astype(int)
    whole = decode(encoded(np.asarray(Image.open(io.BytesIO(content)))), 64, 3)
    assert np.abs(scaled - whole).max() <= 3
    assert np.abs(scaled - whole).max() > 0, "it took another way"


def test_decode_of_uncommon_images():
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:, 16:, 3] = 255
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 255
    for content in (encoded(clear), encoded(clear, "WEBP", lossless=True), encoded(clear[..., 2:])):
        assert (decode(content, 32, 3) == half).all(), "transparent is white"
    palette = Image.fromarray(np.repeat([[0, 1]], 32, 0).repeat(16, 1).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 0, 0, 0])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=0)
    assert (decode(file.getvalue(), 32, 3) == half).all(), "palette with a transparent colour"
    assert (decode(encoded(np.full((32, 32), 0x8034, np.uint16)), 32, 1) == 0x80).all(), "sixteen bits"
    cmyk = decode(encoded(smooth(32, 32), "JPEG", "CMYK", quality=95), 32, 3).astype(int)
    assert np.abs(cmyk - smooth(32, 32)).mean() < 3, "CMYK"
    frames = [Image.fromarray(np.full((32, 32), value, np.uint8)) for value in (50, 200)]
    for form in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:])
        assert np.abs(decode(file.getvalue(), 32, 1).astype(int) - 50).max() <= 1, f"the first frame of {form}"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(smooth(48, 32), form, exif=exif)
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    expected = np.asarray(ImageOps.fit(upright, (32, 32), Image.Resampling.BICUBIC))
    assert np.abs(decode(content, 32, 3).astype(int) - expected).max() <= 1


def test_what_cannot_be_decoded_is_a_value_error():
    good = {form: encoded(smooth(40, 40), form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    for content in (b"", b"hello", b"\xff\xd8\xff", *(one[: len(one) // 2] for one in good.values())):
        with pytest.raises(ValueError, match=r"[a-z]{4}"):
            decode(content, 40, 3)
    with pytest.raises(ValueError, match="floating-point"):
        decode(encoded(np.zeros((9, 9), np.float32), "TIFF"), 32, 1)
    for content in good.values():
        for limits, told in (
            (
                Limits(pixels=40 * 40 - 1),
                r"40 x 40 pixels, more than 1,599 \(data.max_pixels, or --max_pixels of data.prepare",
            ),
            (Limits(bytes=len(content) - 1), r"bytes \(data.max_bytes, "),
        ):
            for look in (lambda content, limits: decode(content, 32, 3, limits=limits), images.decode_whole):
                with pytest.raises(ValueError, match=told):
                    look(content, limits)


@pytest.mark.parametrize("size", [40, 64])
def test_a_jpeg_of_many_scans_is_refused(size):
    """130 kB of them take minutes. Whether it has the size asked for or not: it goes another way."""
    content = encoded(smooth(40, 40), "JPEG", progressive=True)
    scan = content[content.rindex(images.SCAN) : -2]
    decode(content, size, 3)
    with pytest.raises(ValueError, match=r"more than 50 scans \(data.max_scans, .*\): encode it anew"):
        decode(content[:-2] + scan * 10_000 + content[-2:], size, 3)


@pytest.mark.parametrize("size", [40, 64])
def test_only_a_jpeg_s_own_scans_are_counted(size):
    """A phone writes a film behind the image, a camera a preview into it."""
    content = encoded(smooth(40, 40), "JPEG", progressive=True)
    segment = b"\xff\xe2" + (2**16 - 1).to_bytes(2) + (images.SCAN + b"\xff\xd9") * ((2**16 - 4) // 4) + b"\xff"
    film = np.random.default_rng(0).bytes(6 * 2**20)
    assert film.count(images.SCAN) > 50
    for one in (content + film, content[:2] + segment + content[2:]):
        assert np.array_equal(decode(one, size, 3), decode(content, size, 3))
    scan = content[content.rindex(images.SCAN) : -2]
    with pytest.raises(ValueError, match="more than 50 scans"):
        decode(content[:2] + segment + content[2:-2] + scan * 60 + content[-2:] + film, size, 3)
    with pytest.raises(ValueError, match="more than 65,536 segments"):
        decode(content[:2] + b"\xff\xfe\0\2" * 2**16 + segment + content[2:], size, 3)


def test_strips_over_white_are_as_the_whole(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    whole = images.decode_whole(encoded(pixels))
    expected = Image.alpha_composite(Image.new("RGBA", (30, 40), "white"), Image.fromarray(pixels)).convert("RGB")
    monkeypatch.setattr(images, "STRIP", 7)
    assert whole.tobytes() == images.decode_whole(encoded(pixels)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_s_limits_are_its_settings(numbered, workers):
    shards = DataConfig(numbered.source, max_pixels=63).open([numbered.source])[0]
    with pytest.raises(DataError, match=r"step 1: cannot decode.*8 x 8 pixels, more than 63 \(data.max_pixels, "):
        next(load(batches(shards), range(1), workers))
    large = DataConfig(numbered.source, max_bytes=10).open([numbered.source])[0]
    assert [len(content) for content in large.images(np.arange(3))[0]] == [11] * 3, "no more is read than tells"
    with pytest.raises(DataError, match=r"more than 10 bytes \(data.max_bytes, "):
        next(load(batches(large), range(1), 0))


def test_flipped_bytes_never_crash():
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        content = bytearray(encoded(smooth(40, 40), form))
        for _ in range(150):
            spoilt = content.copy()
            spoilt[rng.integers(len(content))] ^= int(rng.integers(1, 256))
            with contextlib.suppress(ValueError):
                assert decode(bytes(spoilt), 32, 3).shape == (32, 32, 3)


def test_views_crop_and_flip():
    content = encoded(smooth(64, 64))
    whole = decode(content, 64, 3)
    assert (decode(content, 64, 3, View(flip=True)) == whole[:, ::-1]).all()
    assert (decode(content, 32, 3, View(0.25, 0, 1, 0)) == whole[:32, 32:]).all(), "the upper right quarter"
    wide = decode(content, 32, 1, View(0.125, np.log(2), 0, 0))
    assert np.abs(wide.astype(int) - decode(encoded(smooth(64, 64)[:16, :32]), 32, 1, View(1.0, np.log(2)))).mean() < 3
    assert decode(content, 32, 3, View(1.0, np.log(4 / 3), 0.3, 0.7)).shape == (32, 32, 3), "wider than the image"
    large = encoded(smooth(1600, 1200), "JPEG", quality=95)
    view = View(0.3, 0.1, 0.4, 0.6, True)
    unscaled = decode(encoded(np.asarray(Image.open(io.BytesIO(large)))), 64, 3, view).astype(int)
    assert np.abs(decode(large, 64, 3, view).astype(int) - unscaled).max() <= 3


def test_augmentation_is_drawn_by_seed_step_and_place():
    augment = Augment((0.2, 0.8), flip=True)
    views = augment.views(1000, 1, 2)
    assert views == augment.views(1000, 1, 2)
    assert views[:10] == augment.views(1000, 1, 2)[:10]
    assert views != augment.views(1000, 1, 3)
    assert views != augment.views(1000, 2, 2)
    area, ratio, x, _, flip = np.array(views).T
    assert (area.min(), area.max()) == (pytest.approx(0.2, abs=0.01), pytest.approx(0.8, abs=0.01))
    assert np.abs(ratio).max() == pytest.approx(np.log(4 / 3), abs=0.01)
    assert (x.mean(), flip.mean()) == (pytest.approx(0.5, abs=0.05), pytest.approx(0.5, abs=0.05))


# ---- batches


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_global_batches_do_not_depend_on_world_size_or_workers(tmp_path, world, workers):
    """Across an epoch's border, with random views."""
    pictures = ({"__key__": f"{i}", "png": encoded(smooth(40 + i, 30)), "cls": str(i)} for i in range(50))
    write(tmp_path / "set", pictures, per_shard=7)
    shards, share, steps, augment = Shards(tmp_path / "set"), 8 // world, range(4, 8), Augment((0.3, 1), flip=True)
    whole = [one for (one,) in load(batches(shards, augment=augment), steps, 0)]
    for rank in range(world):
        rows = slice(rank * share, (rank + 1) * share)
        for one, (part,) in zip(whole, load(batches(shards, rows, augment), steps, workers), strict=True):
            assert torch.equal(part.image, one.image[rows])
            assert torch.equal(part.position, one.position[rows])
            assert torch.equal(part.label, one.label[rows])
    plain = [one for (one,) in load(batches(shards), steps, 0)]
    for step, one, unseen in zip(steps, whole, plain, strict=True):
        assert one.position.tolist() == Order(shards.counts, 8, 0)[step].tolist() == one.label.tolist()
        assert (one.image != unseen.image).flatten(1).any(1).all(), "each was cropped"
        again = decode(shards.image(int(one.position[3])), 32, 1, augment.views(8, 0, step)[3])
        assert torch.equal(one.image[3, 0], torch.from_numpy(again)[..., 0])


READER = """
from data.loader import Augment, Batches, load
from data.order import Order, sample_checksum
from data.shards.reader import Shards

def work(source, log, rank, world, first, workers):
    shards, share = Shards(source), 8 // world
    rows = slice(rank * share, (rank + 1) * share)
    batches = Batches([shards], [Order(shards.counts, 8, 0)], 32, 1, rows, Augment((0.3, 1), True))
    with open(log, "a", buffering=1) as file:
        for step, (images,) in enumerate(load(batches, range(first, 10**6), workers), first):
            checksum = sample_checksum(step, 0, rows, images.position.numpy())
            file.write(f"{step} {checksum} {images.image.long().sum()}\\n")
"""


def test_killed_readers_go_on_anywhere_in_any_number(forked, numbered, tmp_path):
    """kill -9 at random moments; what all ranks saw of each step is what one process sees that was never hurt."""
    rng, seen, first = np.random.default_rng(0), {}, 0
    for world, workers in ((2, 1), (1, 0)):
        logs = [tmp_path / f"{first}_{rank}" for rank in range(world)]
        arguments = [(numbered.source, str(log), rank, world, first, workers) for rank, log in enumerate(logs)]
        processes = [forked(f"{READER}\nwork(*{given!r})") for given in arguments]
        wait_until(lambda logs=logs: all(log.exists() and log.stat().st_size for log in logs))
        time.sleep(rng.random() / 2)
        for process in processes:
            process(signal.SIGKILL, kill=os.killpg)
            process.wait()
        ranks = [[line.split() for line in log.read_text().splitlines() if line.count(" ") == 2] for log in logs]
        common = min(len(rank) for rank in ranks) - 1  # the last line may be cut short
        for i in range(common):
            told = [list(map(int, rank[i])) for rank in ranks]
            seen[told[0][0]] = sum(one[1] for one in told) % 2**32, sum(one[2] for one in told)
        first += common
    assert sorted(seen) == list(range(first))
    assert first > 10
    whole = load(batches(numbered, augment=Augment((0.3, 1), True)), range(first), 0)
    for step, (part,) in enumerate(whole):
        assert seen[step] == (sample_checksum(step, 0, slice(0, 8), part.position.numpy()), part.image.long().sum())


def test_two_unpaired_sets_have_orders_of_their_own(numbered, digits):
    other = Shards(digits / "test")
    both = Batches([numbered, other], [Order(numbered.counts, 8, 0), Order(other.counts, 8, 5)], 32, 1, slice(0, 8))
    (a, b), *_ = load(both, range(3, 4), 0)
    assert a.position.tolist() == Order(numbered.counts, 8, 0)[3].tolist()
    assert b.position.tolist() == Order(other.counts, 8, 5)[3].tolist()
    assert torch.equal(b.image, read(other, b.position.numpy(), 32, 1).image)


def test_a_dead_worker_is_an_error_in_seconds(numbered):
    before = set(multiprocessing.active_children())  # another test's may take a moment to end
    arriving = load(batches(numbered), range(10**6), 1)
    next(arriving)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a process that reads data died"):
        for _ in arriving:
            pass


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_die_with_their_parent(forked, numbered, tmp_path):
    told = tmp_path / "told"
    parent = forked(f"""
import multiprocessing, time
from pathlib import Path
from data.loader import Batches, load
from data.order import Order
from data.shards.reader import Shards
shards = Shards({numbered.source!r})
arriving = load(Batches([shards], [Order(shards.counts, 8, 0)], 32, 1, slice(0, 8)), range(10**6), 2)
next(arriving)
Path({str(told)!r}).write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()) + ".")
time.sleep(600)
""")
    wait_until(lambda: told.exists() and told.read_text().endswith("."))
    pids = [int(pid) for pid in told.read_text().strip(".").split()]
    assert len(pids) == 2
    assert all(is_alive(pid) for pid in pids)
    parent(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 60)
