"""Any source becomes the same shards, whatever the workers and however often it was killed; faults are named."""

import ctypes
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, wait_until
from generating import run_command
from PIL import Image
from sample_images import encoded, flat

from data import index as index_command
from data import sources
from data.command import say
from data.errors import DataError
from data.files import escaped
from data.images import LIMITS, decode, header, limit_settings
from data.inspect.__main__ import main as inspect_command
from data.inspect.sheet import sheet
from data.inspect.verify import inspect
from data.prepare.__main__ import main as prepare_command
from data.prepare.build import prepare
from data.prepare.plan import PrepareSettings
from data.prepare.writer import convert
from data.shards.reader import Shards, write
from data.shards.tars import members, samples
from data.unfinished import begin, locked


def noise(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def folder_of_images(root: Path, classes=("a", "b"), n=20) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            (root / name / f"{i}.png").write_bytes(flat(100 * c + i))
    return root


def held(out: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Label and bytes of each sample of each split, in order."""
    splits = {}
    for folder in sorted(out.glob("*/")):
        shards = Shards(folder)
        splits[folder.name] = [(int(shards.labels[i]), shards.image(i)) for i in range(len(shards))]
    return splits


def tars(out: Path) -> dict[str, str]:
    """Hashes of all that is pinned; index.json holds the times of files."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "index.json"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def described(out: Path) -> dict:
    return json.loads((out / "dataset.json").read_text())


def run(main, *arguments, capsys) -> tuple[int, str]:
    """Exit code and output of a command, in this process."""
    done = run_command(main, capsys, *arguments)
    return done.returncode, done.out + done.err


def test_the_digits_are_what_they_always_were(digits, tmp_path):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    for split in ("train", "test"):
        chosen = [i for i in range(len(pixels)) if (i % 5 == 4) == (split == "test")]
        write(
            tmp_path / split,
            ({"__key__": f"{i:06d}", "png": encoded(pixels[i]), "cls": str(labels[i])} for i in chosen),
        )
        expected = (tmp_path / split / "00000.tar").read_bytes()
        assert (digits / split / "00000.tar").read_bytes() == expected


def test_a_folder_is_split_by_its_paths(tmp_path):
    source = folder_of_images(tmp_path / "source")
    counts = prepare(str(source), tmp_path / "out", test_fraction=0.25, per_shard=9)
    assert sum(counts.values()) == 40
    assert 3 <= counts["test"] <= 17
    splits = held(tmp_path / "out")
    seen = {split: {decode(content, 8, 1)[0, 0, 0] for _, content in splits[split]} for split in splits}
    assert all((decode(content, 8, 1)[0, 0, 0] >= 100) == label for label, content in splits["train"])
    assert not seen["train"] & seen["test"]
    assert max(described(tmp_path / "out")["splits"]["train"]["shards"], key=lambda s: s["images"])["images"] == 9
    (source / "a" / "new.png").write_bytes(flat(99))
    prepare(str(source), tmp_path / "again", test_fraction=0.25)
    again = {decode(content, 8, 1)[0, 0, 0] for _, content in held(tmp_path / "again")["test"]}
    assert again - {99} == seen["test"], "files that come do not move others"
    assert prepare(str(source), tmp_path / "all", test_fraction=0) == {"train": 41}


def test_a_given_split_is_kept_and_flat_folders_have_no_labels(tmp_path):
    folder_of_images(tmp_path / "source" / "train", n=3)
    folder_of_images(tmp_path / "source" / "val", n=2)
    shutil.rmtree(tmp_path / "source" / "val" / "a")
    assert prepare(str(tmp_path / "source"), tmp_path / "out") == {"train": 6, "validation": 2}
    assert Shards(tmp_path / "out" / "validation").labels.tolist() == [1, 1], "a class has one label in all splits"
    assert prepare(str(tmp_path / "source" / "train" / "a"), tmp_path / "flat", test_fraction=0.5)
    assert (Shards(tmp_path / "flat" / "train").labels == -1).all()


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("training", "TESTING")])
def test_splits_are_named_in_any_case(tmp_path, train, test):
    folder_of_images(tmp_path / "source" / train, n=3)
    folder_of_images(tmp_path / "source" / test, n=2)
    assert prepare(str(tmp_path / "source"), tmp_path / "out") == {"train": 6, "test": 4}
    assert described(tmp_path / "out")["classes"] == ["a", "b"]


def test_images_beside_shards_are_not_left_out_in_silence(tmp_path):
    source = folder_of_images(tmp_path / "source", n=2)
    write(source / "shards", [{"__key__": "0", "png": flat(0)}])
    both = r"images, such as a/0.png .4 in all., and also .* shards/0+.tar .1 in all.: name the folder"
    with pytest.raises(DataError, match=both):
        prepare(str(source), tmp_path / "out")
    for name in "ab":
        shutil.rmtree(source / name)
    (source / "shards" / "contact_sheet.png").write_bytes(flat(0))
    assert prepare(str(source), tmp_path / "out", test_fraction=0) == {"train": 1}


def test_out_appears_whole_or_not_at_all(tmp_path):
    source = folder_of_images(tmp_path / "source")
    (source / "b" / "3.png").unlink()
    (source / "b" / "3.png").symlink_to("nowhere")  # unreadable even by root
    with pytest.raises(DataError, match=r"b/3\.png: it cannot be read: No such file"):
        prepare(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare(str(source), tmp_path / "out", max_rejected=0.1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(DataError, match="exists already"):
        prepare(str(source), tmp_path / "out")


@pytest.mark.parametrize("form", ["tar", "tar.gz", "tgz", "tar.xz", "tar.bz2", "zip"])
def test_an_archive_is_as_the_folder_in_it(tmp_path, form):
    source = folder_of_images(tmp_path / "photos", n=4)
    (source / "a" / "notes.txt").write_text("no image")
    (source / "a" / "._0.png").write_bytes(b"macOS")
    prepare(str(source), tmp_path / "expected", test_fraction=0.3, per_shard=3)
    packed = tmp_path / f"photos.{form}"
    if form == "zip":
        shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path, "photos")
    else:
        with tarfile.open(packed, f"w:{form.split('.')[-1].replace('tgz', 'gz').replace('tar', '')}") as tar:
            tar.add(source, "./photos")
    shutil.rmtree(source)
    prepare(str(packed), tmp_path / "out", test_fraction=0.3, per_shard=3)
    names = [name for name in tars(tmp_path / "expected") if name != "dataset.json"]
    assert {name: tars(tmp_path / "out")[name] for name in names} == {
        name: tars(tmp_path / "expected")[name] for name in names
    }
    assert described(tmp_path / "out")["fingerprint"] == described(tmp_path / "expected")["fingerprint"]
    assert described(tmp_path / "out")["ignored"] == {".png": 1, ".txt": 1}
    assert not (tmp_path / "photos").exists()
    with open(packed, "r+b") as file:
        file.truncate(packed.stat().st_size * 2 // 3)
    with pytest.raises(DataError, match=rf"photos\.{form}.*(fetch it again)"):
        prepare(str(packed), tmp_path / "cut")
    assert not (tmp_path / ".cut.unfinished").exists()


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_hostile_names_touch_nothing(tmp_path, form):
    names = ["../../escaped/0.png", f"{tmp_path}/absolute/1.png", "a/../../b/2.png", "a/\udce9\n.png", "a/link.png"]
    packed = tmp_path / "in" / f"x.{form}"
    packed.parent.mkdir()
    if form == "tar":
        with tarfile.open(packed, "w") as tar:
            for i, name in enumerate(names[:-1]):
                member = tarfile.TarInfo(name)
                member.size = len(flat(i))
                tar.addfile(member, io.BytesIO(flat(i)))
            link = tarfile.TarInfo(names[-1])
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    else:
        with zipfile.ZipFile(packed, "w") as archive:
            for i, name in enumerate(names[:-1]):
                archive.writestr(name.encode("utf-8", "replace").decode(), flat(i))
    before = sorted(tmp_path.rglob("*"))
    prepare(str(packed), tmp_path / "out", test_fraction=0)
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "out" not in (path, *path.parents)] == before
    assert sorted(content for _, content in held(tmp_path / "out")["train"]) == sorted(map(flat, range(4)))


def parquet(path: Path, rows: list[tuple[bytes | None, int | None]], names=("cat", "dog"), column="image") -> None:
    """As `datasets` writes it."""
    import pyarrow
    from pyarrow.parquet import write_table

    features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [(column, kind), ("label", pyarrow.int64())],
        {"huggingface": json.dumps({"info": {"features": features}, "fingerprint": "0"})},
    )
    images = [{"bytes": content, "path": f"{i}.png"} for i, (content, _) in enumerate(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.table({column: images, "label": [label for _, label in rows]}, schema), path, row_group_size=3)


@pytest.mark.parametrize("column", ["image", "img"])
def test_parquet_as_hugging_face_has_it(tmp_path, column):
    rows = [(flat(i), i % 2) for i in range(10)]
    parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", rows[:4], column=column)
    parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", rows[4:8], column=column)
    parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", [(rows[8][0], None), rows[9]], column=column)
    assert prepare(str(tmp_path / "set"), tmp_path / "out") == {"train": 8, "test": 2}
    splits = held(tmp_path / "out")
    assert sorted(splits["train"]) == sorted((label, content) for content, label in rows[:8])
    assert sorted(splits["test"]) == sorted([(-1, rows[8][0]), (1, rows[9][0])])
    assert described(tmp_path / "out")["classes"] == ["cat", "dog"]
    single = tmp_path / "set" / "data" / "train-00000-of-00002.parquet"
    assert sum(prepare(str(single), tmp_path / "one", test_fraction=0.4).values()) == 4


def test_parquet_of_plain_columns(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    content = [flat(i) for i in range(4)]
    write_table(pyarrow.table({"picture": content, "label": ["b", "a", "b", None]}), tmp_path / "x.parquet")
    prepare(str(tmp_path / "x.parquet"), tmp_path / "out", test_fraction=0)
    assert sorted(held(tmp_path / "out")["train"]) == sorted(zip([1, 0, 1, -1], content, strict=True))
    assert described(tmp_path / "out")["classes"] == ["a", "b"]
    write_table(pyarrow.table({"text": ["a"], "label": [0]}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none of them called image.*text \(string\), label \(int64\)"):
        prepare(str(tmp_path / "none.parquet"), tmp_path / "other")
    parquet(tmp_path / "elsewhere.parquet", [(flat(0), 0), (None, 1)])
    with pytest.raises(DataError, match=r"1 of 2 images .*\n  elsewhere.parquet, row 1: it holds no bytes"):
        prepare(str(tmp_path / "elsewhere.parquet"), tmp_path / "other", test_fraction=0)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cannot read .*x\.parquet as Parquet"):
        prepare(str(tmp_path / "x.parquet"), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        prepare(str(tmp_path / "x.parquet"), tmp_path / "out")


def test_webdataset_shards_are_dealt_anew(tmp_path):
    source = folder_of_images(tmp_path / "source")
    prepare(str(source), tmp_path / "first", per_shard=4)
    first = held(tmp_path / "first")
    counts = prepare(str(tmp_path / "first"), tmp_path / "second", per_shard=100)
    assert counts == {split: len(samples) for split, samples in first.items()}, "folders name the split"
    assert {split: sorted(samples) for split, samples in held(tmp_path / "second").items()} == {
        split: sorted(samples) for split, samples in first.items()
    }
    assert described(tmp_path / "second")["classes"] == ["a", "b"]
    pattern = f"{tmp_path}/first/train/{{00000..00002}}.tar"
    assert sum(prepare(pattern, tmp_path / "third", test_fraction=0.5).values()) == 12
    shard = tmp_path / "first" / "train" / "00000.tar"
    assert sum(prepare(str(shard), tmp_path / "fourth", test_fraction=0.4).values()) == 4
    with pytest.raises(DataError, match=r"00099\.tar does not exist"):
        prepare(f"{tmp_path}/first/train/{{00000,00099}}.tar", tmp_path / "fifth")


def test_torchvision_arrays_and_files(tmp_path, capsys):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = noise(0, 5, 28 * 28, 1).reshape(5, 28, 28)
    for part, n in (("train", 5), ("t10k", 2)):
        images = struct.pack(">4i", 2051, n, 28, 28) + pixels[:n].tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + bytes(range(n)))
    assert prepare("torchvision:MNIST", tmp_path / "out", root=tmp_path) == {"train": 5, "test": 2}
    for label, content in held(tmp_path / "out")["train"]:
        assert (decode(content, 28, 1)[..., 0] == pixels[label]).all()
    assert described(tmp_path / "out")["classes"][3] == "3 - three"
    folder_of_images(tmp_path / "folder", n=3)
    prepare("torchvision:ImageFolder", tmp_path / "files", root=tmp_path / "folder", test_fraction=0)
    expected = [(c, flat(100 * c + i)) for c in range(2) for i in range(3)]
    assert sorted(held(tmp_path / "files")["train"]) == sorted(expected), "files keep their bytes"
    code, text = run(prepare_command, "torchvision:CIFAR10", tmp_path / "no", "--root", tmp_path, capsys=capsys)
    assert code == 2
    assert "--download" in text
    code, text = run(prepare_command, "torchvision:CIFAR11", tmp_path / "no", capsys=capsys)
    assert code == 2
    assert "did you mean torchvision:CIFAR10" in text


def test_bytes_are_kept_where_nothing_changes(tmp_path):
    contents = {
        "a.png": encoded(noise(1, 12, 16)),
        "b.jpeg": encoded(noise(2, 12, 16), "JPEG"),
        "c.JPG": encoded(noise(3, 12, 16), "JPEG"),
        "d.webp": encoded(noise(4, 12, 16), "WEBP"),
        "e.gif": encoded(noise(5, 12, 16)[..., 0], "GIF"),
        "f.png": encoded(noise(6, 12, 16), "JPEG"),  # its name lies
    }
    (tmp_path / "in").mkdir()
    for name, content in contents.items():
        (tmp_path / "in" / name).write_bytes(content)
    prepare(str(tmp_path / "in"), tmp_path / "out", test_fraction=0)
    prepare(str(tmp_path / "in"), tmp_path / "sized", test_fraction=0, size=12)
    for out in ("out", "sized"):
        assert sorted(content for _, content in held(tmp_path / out)["train"]) == sorted(contents.values())
    endings = {Path(name).suffix for name, *_ in members(tmp_path / "out" / "train" / "00000.tar")}
    assert endings == {".png", ".jpg", ".jpeg", ".webp", ".gif"}
    assert described(tmp_path / "out")["splits"]["train"]["formats"] == {"GIF": 1, "JPEG": 3, "PNG": 1, "WEBP": 1}


@pytest.mark.parametrize("form", ["keep", "png", "jpeg", "webp"])
@pytest.mark.parametrize("original", ["PNG", "JPEG", "WEBP", "BMP"])
def test_images_are_resized_and_encoded(form, original):
    content = encoded(noise(0, 30, 40), original)
    result, changed = convert(content, PrepareSettings(size=12, format=form))
    with Image.open(io.BytesIO(changed)) as image:
        assert image.size == (16, 12)
        assert image.format == result
    expected = form.upper() if form != "keep" else {"BMP": "PNG"}.get(original, original)
    assert result == expected
    result, changed = convert(content, PrepareSettings(size=12, crop=True, format="png"))
    assert (decode(changed, 12, 3) == decode(content, 12, 3)).all(), "as a run sees the original"
    _, changed = convert(content, PrepareSettings(size=(12, 8), crop=True, format="png"))
    assert (decode(changed, (12, 8), 3) == decode(content, (12, 8), 3)).all()
    assert header(changed)[0] == (8, 12)
    sizes = [len(convert(content, PrepareSettings(format="jpeg", size=12, quality=q))[1]) for q in (20, 95)]
    assert sizes[0] < sizes[1]


def test_changed_images_are_upright_opaque_and_not_too_large():
    with pytest.raises(ValueError, match=r"it would have 64000000 x 64 pixels"):
        convert(encoded(np.zeros((1, 10**6), np.uint8)), PrepareSettings(size=64))
    with pytest.raises(ValueError, match=r"it cannot be written as WEBP"):
        convert(encoded(np.zeros((1, 20000), np.uint8)), PrepareSettings(format="webp"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded(noise(0, 20, 40), "JPEG", exif=exif)
    with Image.open(io.BytesIO(convert(turned, PrepareSettings(size=10))[1])) as image:
        assert image.size == (10, 20)
        assert not image.getexif()
    clear = encoded(np.zeros((8, 8, 4), np.uint8))
    _, changed = convert(clear, PrepareSettings(format="jpeg"))
    assert (decode(changed, 8, 3) == 255).all()
    deep = encoded(np.full((8, 8), 0x8000, np.uint16))
    _, changed = convert(deep, PrepareSettings(size=4))
    assert (decode(changed, 4, 1) == 128).all()


@pytest.mark.parametrize(("form", "options"), [("keep", {}), ("png", {}), ("webp", {"size": (8, 6), "crop": True})])
def test_changed_images_keep_their_alpha_if_asked(form, options):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    content, size = encoded(pixels, "TIFF"), options.get("size", 6)
    _, changed = convert(content, PrepareSettings(alpha=True, format=form, **{"size": 6, "crop": True} | options))
    with Image.open(io.BytesIO(changed)) as image:
        assert image.mode == "RGBA"
    if form != "webp":
        assert (decode(changed, size, 4) == decode(content, size, 4)).all()
    _, changed = convert(content, PrepareSettings(size=6))
    assert (decode(changed, (6, 8), 4)[..., 3] == 255).all(), "over white otherwise"


def images_of_every_kind() -> dict[str, bytes]:
    def saved(image: Image.Image, form: str, **options) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    colour = Image.fromarray(noise(0, 24, 32))
    frames = [Image.fromarray(noise(i, 24, 32)) for i in range(1, 4)]
    exif = Image.Exif()
    exif[0x0112] = 8
    return {
        "grey.png": saved(colour.convert("L"), "PNG"),
        "bits.png": saved(colour.convert("1"), "PNG"),
        "palette.png": saved(colour.convert("P"), "PNG", transparency=3),
        "alpha.png": saved(Image.fromarray(noise(1, 24, 32, 4)), "PNG"),
        "alpha.webp": saved(Image.fromarray(noise(1, 24, 32, 4)), "WEBP"),
        "deep.png": encoded(np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)),
        "deep.tiff": encoded(np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16), "TIFF"),
        "inks.jpg": saved(colour.convert("CMYK"), "JPEG"),
        "turned.jpg": saved(colour, "JPEG", exif=exif),
        "progressive.jpg": saved(colour, "JPEG", progressive=True),
        "several.jpg": saved(colour, "MPO", save_all=True, append_images=frames),
        "moving.gif": saved(colour, "GIF", save_all=True, append_images=frames),
        "moving.webp": saved(colour, "WEBP", save_all=True, append_images=frames),
        "plain.bmp": saved(colour, "BMP"),
        "plain.ppm": saved(colour, "PPM"),
    }


def test_every_kind_of_image(tmp_path):
    images = images_of_every_kind()
    (tmp_path / "in").mkdir()
    for name, content in images.items():
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "bomb.png").write_bytes(encoded(np.zeros((9000, 10000), bool)))
    prepare(str(tmp_path / "in"), tmp_path / "kept", test_fraction=0, max_rejected=0.1)
    assert sorted(content for _, content in held(tmp_path / "kept")["train"]) == sorted(images.values())
    (rejected,) = described(tmp_path / "kept")["rejected"]
    assert rejected["file"] == "bomb.png"
    assert "10000 x 9000 pixels" in rejected["reason"]
    assert inspect(tmp_path / "kept", verify=True)[1] == []
    assert described(tmp_path / "kept")["splits"]["train"]["formats"]["MPO"] == 1
    for name, content in images.items():
        for form in ("png", "jpeg", "webp", "keep"):
            _, changed = convert(content, PrepareSettings(size=16, crop=True, format=form))
            assert decode(changed, 16, 3).shape == (16, 16, 3), name
        if not name.endswith("jpg"):  # runs read some JPEGs by another decoder, a rounding apart
            _, changed = convert(content, PrepareSettings(size=16, crop=True, format="png"))
            apart = np.abs(decode(changed, 16, 3).astype(int) - decode(content, 16, 3)).max()
            assert apart <= name.startswith("deep"), name  # the low bytes count, where these are resized


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty"])
@pytest.mark.parametrize("position", range(4))
def test_a_damaged_image_is_left_out_and_listed(tmp_path, damage, position):
    (tmp_path / "in").mkdir()
    contents = [encoded(noise(i, 16, 16), "JPEG" if i % 2 else "PNG") for i in range(4)]
    bad = {"garbage": b"<html>not found</html>", "cut": contents[position][:-200], "empty": b""}[damage]
    for i, content in enumerate(contents):
        (tmp_path / "in" / f"{i}.png").write_bytes(bad if i == position else content)
    prepare(str(tmp_path / "in"), tmp_path / "out", test_fraction=0, per_shard=2, max_rejected=0.25)
    rest = [content for i, content in enumerate(contents) if i != position]
    assert sorted(content for _, content in held(tmp_path / "out")["train"]) == sorted(rest)
    (rejected,) = described(tmp_path / "out")["rejected"]
    assert rejected["file"] == f"{position}.png"
    assert rejected["reason"]
    assert inspect(tmp_path / "out", verify=True)[1] == []


def test_images_keep_their_names(tmp_path):
    contents = {f"holiday/{i} \n\udce9.png": flat(i) for i in range(12)}
    (tmp_path / "in" / "holiday").mkdir(parents=True)
    for name, content in contents.items():
        (tmp_path / "in" / name).write_bytes(content if content != flat(5) else b"damaged")
    prepare(str(tmp_path / "in"), tmp_path / "out", test_fraction=0, per_shard=5, max_rejected=0.1)
    shards = Shards(tmp_path / "out" / "train")
    assert {shards.original(i): shards.image(i) for i in range(11)} == {
        name: content for name, content in contents.items() if content != flat(5)
    }
    first = shards.original(0)
    assert shards.name(0).endswith(f"00000.tar, member 00000000.png ({escaped(first)})")
    assert shards.names(np.array([3, 0, 3])) == [shards.name(i) for i in (3, 0, 3)]
    prepare(str(tmp_path / "out"), tmp_path / "again", size=16)
    again = Shards(tmp_path / "again" / "train")
    assert {again.original(i) for i in range(len(again))} < {*contents}, "names are kept by another preparation"
    listed = tmp_path / "out" / "train" / "00000.tar.names.json"
    written = json.loads(listed.read_text())
    for change in ({"filesize": 1}, {"names": written["names"][1:]}, {"names": [1] * 5}, {"names": "x"}):
        listed.write_text(json.dumps(written | change))
        assert shards.original(0) == "", "names that are damaged or another shard's"
    assert shards.name(0).endswith("00000.tar, member 00000000.png")


def test_what_cannot_be_read_is_left_out_and_listed(tmp_path):
    source = folder_of_images(tmp_path / "in", n=20)
    (source / "a" / "gone.png").symlink_to("nowhere")
    (source / "a" / "loop.png").symlink_to("loop.png")
    os.mkfifo(source / "a" / "waits.png")
    (source / "a" / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(source / "a" / "speaks.png"))
    settings = {"test_fraction": 0, "max_rejected": 0.2, "max_bytes": 10**6}
    (source / "a" / "large.png").write_bytes(b"0" * (10**6 + 1))
    assert prepare(str(source), tmp_path / "out", **settings) == {"train": 40}
    reasons = {one["file"]: one["reason"] for one in described(tmp_path / "out")["rejected"]}
    assert reasons == {
        f"a/{name}.png": f"it cannot be read: {reason}"
        for name, reason in {
            "device": "it is a device, and no regular file",
            "gone": "No such file or directory",
            "large": "it has more than 1,000,000 bytes",
            "loop": "Too many levels of symbolic links",
            "speaks": "it is a socket, and no regular file",
            "waits": "it is a FIFO, and no regular file",
        }.items()
    }
    with pytest.raises(DataError, match=r"6 of 46 images could not be read, more than --max_rejected 0\.1"):
        prepare(str(source), tmp_path / "other", **settings | {"max_rejected": 0.1})


def test_each_folder_is_read_once_whatever_links_lead_to_it(tmp_path):
    source = folder_of_images(tmp_path / "in", n=3)
    for link, target in {"a/self": ".", "a/up": "..", "0": "b", "b/a": "../a", "z": str(source)}.items():
        (source / link).symlink_to(target)
    folder_of_images(tmp_path / "elsewhere", classes=("c",), n=2)
    (source / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (source / "loop").symlink_to("loop")
    assert prepare(str(source), tmp_path / "out", test_fraction=0) == {"train": 8}
    told = described(tmp_path / "out")
    assert told["classes"] == ["a", "b", "c"], "a folder's own path is its class"
    assert told["ignored"] == {"links to a folder that is listed already": 5, "without ending": 1}


def test_a_sub_folder_that_may_not_be_read_is_ignored(tmp_path, monkeypatch):
    source, closed, scandir = folder_of_images(tmp_path / "in", n=3), set[str](), os.scandir

    def refuse(path):  # by hand: no folder is closed to root
        if str(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (source / "lost+found").mkdir()
    closed.add(str(source / "lost+found"))
    assert prepare(str(source), tmp_path / "out", test_fraction=0) == {"train": 6}
    assert described(tmp_path / "out")["ignored"] == {"folders that this user may not read": 1}
    closed.add(str(source))
    with pytest.raises(PermissionError):
        prepare(str(source), tmp_path / "other", test_fraction=0)


BOMB = bytes(2**20)


@pytest.mark.parametrize("form", ["gz", "xz", "bz2", "zip", "parquet"])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, form):
    """Before it has filled the disk, or memory."""
    monkeypatch.setattr("data.sources.source.SMALL", 2**22)
    packed = tmp_path / (f"x.tar.{form}" if len(form) < 4 and form != "zip" else f"x.{form}")
    if form == "parquet":
        parquet(packed, [(BOMB, 0)] * 16)
    elif form == "zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(16):
                archive.writestr(f"{i}.png", BOMB)
    else:
        with tarfile.open(packed, f"w:{form}") as tar:
            for i in range(16):
                member = tarfile.TarInfo(f"{i}.png")
                member.size = len(BOMB)
                tar.addfile(member, io.BytesIO(BOMB))
    most = 0
    check = sources.Bounds.check

    def watched(self, unpacked, path, size):
        nonlocal most
        most = max(most, unpacked)
        check(self, unpacked, path, size)

    monkeypatch.setattr(sources.Bounds, "check", watched)
    with pytest.raises(
        DataError, match=rf"x\..*{form} has .* bytes, and unpacks to more than .* raise data.prepare's --max_ratio 20"
    ):
        prepare(str(packed), tmp_path / "out", max_ratio=20)
    assert form == "zip" or most <= max(2**22, 20 * packed.stat().st_size) + 2**20, "it stopped there"
    assert sorted(path.name for path in tmp_path.iterdir()) == [packed.name]
    with pytest.raises(DataError, match="16 of 16 images could not be read"):
        prepare(str(packed), tmp_path / "out", max_ratio=10**6, test_fraction=0)


def test_a_zip_s_members_are_bounded_and_of_known_kinds(tmp_path):
    packed = tmp_path / "x.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("good.png", flat(0))
        archive.writestr("large.png", bytes(2000))
        for name, method in {"bzip.png": zipfile.ZIP_BZIP2, "lzma.png": zipfile.ZIP_LZMA}.items():
            archive.writestr(name, flat(0), method)
    prepare(str(packed), tmp_path / "out", test_fraction=0, max_rejected=0.9, max_bytes=1000)
    reasons = {one["file"]: one["reason"] for one in described(tmp_path / "out")["rejected"]}
    assert reasons["large.png"] == f"it has 2,000 bytes, more than 1,000 ({limit_settings('bytes')})"
    assert reasons["bzip.png"] == "it is packed by method 12, expected none or deflate: pack it again"
    assert reasons.keys() == {"large.png", "bzip.png", "lzma.png"}
    content = bytearray(packed.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 227
    packed.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.zip is no zip, or damaged \(zip file version 22\.7\)"):
        prepare(str(packed), tmp_path / "other")


@pytest.mark.parametrize("label", [2**62, -5, 10**9])
def test_a_label_that_no_class_has_is_refused(tmp_path, label):
    parquet(tmp_path / "x.parquet", [(flat(0), 0), (flat(1), label)])
    with pytest.raises(DataError, match=r"a label of .*x\.parquet: .* expected 0 to 1,048,575"):
        prepare(str(tmp_path / "x.parquet"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_many_damaged_images_stop_and_may_be_allowed(tmp_path, capsys):
    source = folder_of_images(tmp_path / "in", n=6)
    for i in range(3):
        (source / "a" / f"{i}.png").write_bytes(b"no")
    command = (source, tmp_path / "out", "--per_shard", 3, "--workers", 1, "--test_fraction", 0)
    code, text = run(prepare_command, *command, capsys=capsys)
    assert code == 2
    assert "more than --max_rejected 0.01" in text
    assert "it is no image of a known kind" in text
    assert "Traceback" not in text
    code, text = run(prepare_command, *command, "--max_rejected", 0.25, capsys=capsys)
    assert code == 0
    assert "9 images in train" in text
    assert "warning: images that cannot be read were left out: 3, such as a/0.png: it is no image" in text
    assert [one["file"] for one in described(tmp_path / "out")["rejected"]] == ["a/0.png", "a/1.png", "a/2.png"]


@pytest.mark.parametrize(
    ("images", "given", "fraction"), [(160, None, 0.3), (600, None, 0.2), (1500, None, 0.1), (600, 0.1, 0.1)]
)
def test_of_few_images_more_are_held_out(images, given, fraction, tmp_path, capsys):
    parquet(tmp_path / "x.parquet", [(flat(0), 0)] * images)
    options = [] if given is None else ["--test_fraction", given]
    code, text = run(prepare_command, tmp_path / "x.parquet", tmp_path / "out", "--workers", 1, *options, capsys=capsys)
    assert code == 0
    assert described(tmp_path / "out")["settings"]["test_fraction"] == fraction
    held_out = described(tmp_path / "out")["splits"]["test"]["images"]
    assert (f"only {held_out} images are held out: scores by fewer than 100 say little" in text) == (held_out < 100)
    assert (held_out < 100) == (images * fraction < 100)


def test_workers_change_no_byte(tmp_path):
    source = folder_of_images(tmp_path / "in", n=30)
    (source / "a" / "0.png").write_bytes(b"no")
    settings = {"per_shard": 7, "size": 6, "max_rejected": 0.1}
    prepare(str(source), tmp_path / "one", workers=1, **settings)
    prepare(str(source), tmp_path / "three", workers=3, **settings)
    assert tars(tmp_path / "one") == tars(tmp_path / "three")
    assert inspect(tmp_path / "one", 3, verify=True) == inspect(tmp_path / "three", 1, verify=True)
    with pytest.raises(DataError, match="more than --max_rejected"):
        prepare(str(source), tmp_path / "four", workers=3, per_shard=1)


def test_a_killed_run_goes_on(forked, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(160):
        (tmp_path / "in" / f"{i}.png").write_bytes(encoded(noise(i, 128, 128)))
    settings = {"per_shard": 4, "size": 100, "format": "png"}
    prepare(str(tmp_path / "in"), tmp_path / "undisturbed", **settings)
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    out, unfinished = tmp_path / "out", tmp_path / ".out.unfinished"
    arguments = [str(tmp_path / "in"), str(out), "--workers", "2", *options]
    command = f"from data.prepare.__main__ import main\nmain({arguments!r})"
    killed = forked(command)
    wait_until(lambda: len(list(unfinished.glob("out/*/*.tar"))) > 2)
    killed(signal.SIGKILL, kill=os.killpg)
    assert killed.wait().codes == [-signal.SIGKILL]
    done = list(unfinished.glob("out/*/*.tar"))
    assert not out.exists()
    for path in done:
        assert len(list(samples(path))) in (1, 2, 3, 4)
    kept = {path: path.stat().st_mtime_ns for path in done}
    with pytest.raises(DataError, match=r"another plan:\n  quality: 95 then, 90 now\n"):
        prepare(str(tmp_path / "in"), out, **settings, quality=90)
    assert kept == {path: path.stat().st_mtime_ns for path in done}
    again = forked(command).wait()
    assert again.returncode == 0, again.stderr
    assert {out / path.relative_to(unfinished / "out"): time for path, time in kept.items()} == {
        out / path.relative_to(unfinished / "out"): (out / path.relative_to(unfinished / "out")).stat().st_mtime_ns
        for path in done
    }, "whole shards are not written again"
    assert tars(out) == tars(tmp_path / "undisturbed")
    assert not unfinished.exists()


def test_a_plan_with_height_and_width_goes_on(tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    for _ in range(2):
        begin(tmp_path, {"size": (16, 24)})
        (tmp_path / "out" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "train" / "00000.tar").touch()
    with pytest.raises(DataError, match=r"size: \[16, 24\] then, \[24, 16\] now"):
        begin(tmp_path, {"size": (24, 16)})


def test_a_split_named_by_some_files_only_is_refused(tmp_path):
    for i, name in enumerate(("train-0", "test-0", "more")):
        parquet(tmp_path / "set" / f"{name}.parquet", [(flat(i), 0)])
    with pytest.raises(
        DataError, match=r"names its splits \(train, test\), but not that of 1 images, such as more.parq"
    ):
        prepare(str(tmp_path / "set"), tmp_path / "out")


def test_two_commands_do_not_work_in_one_folder(tmp_path):
    source = folder_of_images(tmp_path / "in")
    with locked(tmp_path / "out"), pytest.raises(DataError, match="another process"):
        prepare(str(source), tmp_path / "out")


def test_dataset_json_says_what_there_is(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    pixels = [noise(i, 8 + i, 10) for i in range(3)]
    for i, one in enumerate(pixels):
        (tmp_path / "in" / "a" / f"{i}.png").write_bytes(encoded(one))
    (tmp_path / "in" / "3.png").write_bytes(flat(77))
    prepare(str(tmp_path / "in"), tmp_path / "out", test_fraction=0, per_shard=2)
    train = described(tmp_path / "out")["splits"]["train"]
    every = np.concatenate([*(one.reshape(-1, 3) for one in pixels), np.full((64, 3), 77)]) / 255
    assert train["mean"] == pytest.approx(every.mean(0), abs=1e-6)
    assert train["std"] == pytest.approx(every.std(0), abs=1e-6)
    assert train["images"] == 4
    assert (train["labels"], train["unlabelled"]) == ({"0": 3}, 1)
    assert train["modes"] == {"L": 1, "RGB": 3}
    assert train["height"] == {"min": 8, "median": 8, "max": 10}
    assert train["width"] == {"min": 8, "median": 10, "max": 10}
    prepare(str(tmp_path / "in"), tmp_path / "other", test_fraction=0, per_shard=3)
    assert described(tmp_path / "other")["fingerprint"] == described(tmp_path / "out")["fingerprint"]


def test_a_closed_pipe_is_no_error(monkeypatch):
    """As of `python -m data.inspect FOLDER | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        say("a")
        say("b")


def test_inspect_finds_every_fault(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(9):
        content = encoded(noise(i, 32, 32), "JPEG" if i % 2 else "PNG", **({"quality": 95} if i % 2 else {}))
        (tmp_path / "in" / f"{i}.{'jpg' if i % 2 else 'png'}").write_bytes(content)
    good = tmp_path / "good"
    prepare(str(tmp_path / "in"), good, test_fraction=0, per_shard=3)
    code, text = run(inspect_command, good, "--verify", "--workers", 1, capsys=capsys)
    assert code == 0, text
    assert "all samples are valid" in text
    assert Image.open(good / "contact_sheet.png").width > 500

    def verify(name: str, harm) -> str:
        shutil.copytree(good, tmp_path / name)
        harm(tmp_path / name / "train")
        code, text = run(inspect_command, tmp_path / name, "--verify", "--workers", 1, capsys=capsys)
        assert code == 1, text
        assert "Traceback" not in text
        return text

    def flip(at: int):
        def harm(folder: Path) -> None:
            content = bytearray((folder / "00001.tar").read_bytes())
            content[at] ^= 1
            (folder / "00001.tar").write_bytes(content)

        return harm

    for sample in samples(good / "train" / "00001.tar"):
        assert "train/00001.tar" in verify(f"flip-{sample.key}", flip(sample.offset + sample.size // 2))
        if sample.name.endswith("png"):
            assert f"member {sample.name}: " in verify(f"crc-{sample.key}", flip(sample.offset + sample.size // 3))
    assert "neither a member nor the end" in verify("header", flip(sample.offset - 400))
    assert "00002.tar" in verify("missing", lambda folder: (folder / "00002.tar").unlink())
    assert "cut short" in verify("cut", lambda folder: os.truncate(folder / "00000.tar", 3000))
    assert "has the same key" in verify("more", lambda folder: double(folder / "00009.tar"))
    text = (good / "dataset.json").read_text()
    (good / "dataset.json").write_text(text.replace('"images": 9', '"images": 8'))
    code, text = run(inspect_command, good, "--verify", "--workers", 1, capsys=capsys)
    assert code == 1
    assert "images is 9, dataset.json says 8" in text


def test_verify_sees_a_changed_image_that_still_decodes(tmp_path, capsys):
    """In shards of any origin, once they were indexed, and whenever one looks."""
    write(tmp_path / "in", ({"__key__": f"{i}", "pgm": encoded(np.full((8, 8), i, np.uint8), "PPM")} for i in range(5)))
    content = bytearray((tmp_path / "in" / "00000.tar").read_bytes())
    *_, sample = samples(tmp_path / "in" / "00000.tar")
    content[sample.offset + sample.size - 1] ^= 1
    (tmp_path / "in" / "00000.tar").write_bytes(content)
    for table in (True, True, False):
        if not table:
            (tmp_path / "in" / "00000.tar.npy").unlink()
        code, text = run(inspect_command, tmp_path / "in", "--verify", "--workers", 1, capsys=capsys)
        assert code == 1
        told = r"member 4.pgm: its bytes are not" if table else r"00000\.tar: its images are not"
        assert re.search(f"1 problems:\n.*{told} those that were indexed\n.*remove their index.json", text), text


def double(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "b.png", "a.png", "c.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(flat(0))
            tar.addfile(member, io.BytesIO(flat(0)))


def test_inspect_reads_shards_of_any_origin(numbered_shards, tmp_path, capsys):
    code, text = run(inspect_command, numbered_shards, "--sheet", tmp_path / "x.png", "--workers", 1, capsys=capsys)
    assert code == 0, text
    assert re.search(r"unlabelled +3$", text, re.MULTILINE)
    assert re.search(r"^fingerprint of the samples  [0-9a-f]{32}$", text, re.MULTILINE), "runs name that of the shards"
    assert Image.open(tmp_path / "x.png").format == "PNG"
    assert not (numbered_shards / "contact_sheet.png").exists()
    shutil.copyfile(numbered_shards / "00000.tar", tmp_path / "00000.tar")
    double(tmp_path / "00001.tar")
    code, text = run(inspect_command, tmp_path, "--workers", 1, capsys=capsys)
    assert code == 1
    assert "2 problems" in text
    assert "c: it has no image" in text


@pytest.fixture
def numbered_shards(tmp_path) -> Path:
    samples = [{"__key__": f"{i}", "png": flat(i)} | ({"cls": str(i % 50)} if i > 2 else {}) for i in range(100)]
    write(tmp_path / "numbered", samples, per_shard=40)
    return tmp_path / "numbered"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere", "out"],
            "nowhere does not exist. Expected a folder of images, or a .tar, .tar.gz",
        ),
        (["empty", "out"], "empty holds no images .*but 1 .txt"),
        (["empty/a.txt", "out"], "file of no known kind"),
        (["a.png", "out"], "file of no known kind"),
        (["broken.zip", "out"], "broken.zip is no zip"),
        (["digits", "empty"], "empty exists already"),
        (["digits", "out", "--test_fraction", "1"], "--test_fraction is 1.0, expected a share"),
        (["digits", "out", "--size", "0"], "--size is 0, expected at least 1 pixel"),
        (["digits", "out", "--size", "[8, 9]"], r"--size is \[8, 9\], expected one number, the shorter"),
        (["--size", "8", "nowhere", "out"], "nowhere does not exist"),
        (["digits", "out", "--size", "-8"], r'--size: must be PIXELS or "\[HEIGHT, WIDTH\]"; got -8'),
        (["digits", "out", "--size", "8", "9"], "unrecognized arguments: 9"),
        (["digits", "out", "--format", "bmp"], "--format is bmp, expected keep, png, jpeg, webp"),
        (["digits", "out", "--format", "jpeg", "--alpha"], "--format is jpeg, expected png, webp or keep with --alpha"),
        (["digits", "out", "--quality", "0"], "--quality is 0, expected 1 to 100"),
        (["digits", "out", "--workers", "0"], "--workers is 0, expected at least 1"),
        (["digits", "out", "--max_rejected", "2"], "--max_rejected is 2.0, expected a share"),
        (["three", "out", "--test_fraction", "0.000001"], "no image of three fell to the test split"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("no image")
    (tmp_path / "a.png").write_bytes(flat(0))
    (tmp_path / "broken.zip").write_bytes(b"PK")
    folder_of_images(tmp_path / "three", classes=("a",), n=3)
    before = sorted(tmp_path.rglob("*"))
    code, text = run(
        prepare_command, *arguments, "--workers" if "--workers" not in arguments else "--root", 1, capsys=capsys
    )
    assert code == 2
    assert re.search(message, text), text
    assert "Traceback" not in text
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_inspect_names_mistakes(tmp_path, capsys):
    for folder, message in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "holds no shards")):
        code, text = run(inspect_command, folder, capsys=capsys)
        assert code == 2
        assert message in text
    (tmp_path / "dataset.json").write_text("{")
    assert "dataset.json is damaged" in run(inspect_command, tmp_path, capsys=capsys)[1]


SPLIT = {
    "images": 1,
    "image_bytes": 1,
    "unlabelled": 1,
    "labels": {},
    "shards": [],
    "width": {},
    "height": {},
    "modes": {},
}
SPLIT |= {"formats": {}, "mean": [0.5], "std": [0.1], "fingerprint": "0"}
DESCRIBED = {"splits": {"train": SPLIT}, "classes": [], "fingerprint": "0", "rejected": []}


@pytest.mark.parametrize(
    "content",
    [
        [],
        3,
        {"splits": {}},
        DESCRIBED | {"classes": {"a": 1}},
        DESCRIBED | {"classes": [1]},
        DESCRIBED | {"rejected": [["x"]]},
        DESCRIBED | {"splits": []},
        DESCRIBED | {"splits": {}},
        DESCRIBED | {"splits": {"train": SPLIT | {"width": {"min": 8, "max": 8}}}},
        DESCRIBED | {"splits": {"train": SPLIT | {"height": {"min": 8, "mean": 8, "max": 8}}}},
        DESCRIBED | {"splits": {"train": SPLIT | {"images": "many"}}},
        DESCRIBED | {"splits": {"train": SPLIT | {"labels": {"x": 1}}}},
        DESCRIBED | {"splits": {"train": SPLIT | {"shards": [{"name": "0.tar"}]}}},
        *(DESCRIBED | {"splits": {name: SPLIT}} for name in ("../train", "/etc", "a/b", "..", "")),
    ],
    ids=json.dumps,
)
def test_a_dataset_json_of_another_shape_is_refused(tmp_path, capsys, content):
    write(tmp_path / "train", [{"__key__": "0", "png": flat(0)}])
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for options in ([], ["--verify", "--workers", "1"]):
        code, text = run(inspect_command, tmp_path, *options, capsys=capsys)
        assert (code, text.count("\n")) == (2, 1), text
        assert "dataset.json is damaged (" in text
    if not isinstance(content, dict) or content.get("classes"):
        with pytest.raises(DataError, match=r"cannot read .*dataset\.json: Expected .* it names the classes"):
            prepare(str(tmp_path), tmp_path / "out")


def test_deep_json_and_fifos_are_refused(tmp_path, capsys):
    write(tmp_path / "train", [{"__key__": "0", "png": flat(0)}])
    (tmp_path / "dataset.json").write_text("[" * 10**5)
    assert "dataset.json is damaged (it is nested too deeply)" in run(inspect_command, tmp_path, capsys=capsys)[1]
    (tmp_path / "dataset.json").unlink()
    os.mkfifo(tmp_path / "dataset.json")
    code, text = run(inspect_command, tmp_path, capsys=capsys)
    assert (code, "it is a FIFO, and no regular file" in text) == (2, True)


def test_names_are_printed_without_what_a_terminal_obeys(tmp_path, capsys):
    escape, bell = "\x1b[2J\x1b]0;mine\x07", "\u202e\udce9\r"
    source = folder_of_images(tmp_path / "in", classes=(f"a{escape}", f"b{bell}"), n=3)
    (source / f"a{escape}" / f"bad{escape}.png").write_bytes(b"no")
    (source / f"x.e{escape}").write_bytes(b"")
    words = [source, tmp_path / "out", "--test_fraction", 0, "--workers", 1]
    code, stopped = run(prepare_command, *words, capsys=capsys)
    assert code == 2
    told = run(prepare_command, *words, "--max_rejected", 0.5, capsys=capsys)[1]
    seen = run(inspect_command, tmp_path / "out", capsys=capsys)[1]
    double(tmp_path / "out" / "train" / f"00001{escape}.tar")
    code, wrong = run(inspect_command, tmp_path / "out", "--verify", "--workers", 1, capsys=capsys)
    assert code == 1
    command = [str(path) for path in (tmp_path / "out" / "train").glob("*.tar")]
    indexed = run(index_command.main, *command, tmp_path / "x.json", capsys=capsys)[1]
    for text in (stopped, told, seen, wrong, indexed):
        assert all(c.isprintable() or c == "\n" for c in text), text
    assert r"1 .e\x1b[2j" in told
    for text in (stopped, seen, wrong):
        assert r"\x1b[2J\x1b]0;mine\x07" in text
    assert r"class b\u202e\udce9\r" in seen


def test_the_contact_sheet_is_written_through_no_link(tmp_path, capsys):
    write(tmp_path / "set", [{"__key__": "0", "png": flat(0)}])
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "set" / "contact_sheet.png").symlink_to(tmp_path / "precious")
    assert run(inspect_command, tmp_path / "set", "--workers", 1, capsys=capsys)[0] == 0
    assert (tmp_path / "precious").read_text() == "mine"
    assert Image.open(tmp_path / "set" / "contact_sheet.png").format == "PNG"


def test_a_contact_sheet_replaces_no_device_and_is_left_out_where_it_cannot_be_written(tmp_path, capsys):
    write(tmp_path / "set", [{"__key__": "0", "png": flat(0)}])
    os.mkfifo(tmp_path / "pipe")
    code, text = run(inspect_command, tmp_path / "set", "--workers", 1, "--sheet", tmp_path / "pipe", capsys=capsys)
    assert (code, (tmp_path / "pipe").is_fifo()) == (2, True)
    assert "pipe cannot be written: it is a FIFO, and no regular file. Name another file with --sheet" in text
    os.mkfifo(tmp_path / "set" / "contact_sheet.png")
    code, text = run(inspect_command, tmp_path / "set", "--verify", "--workers", 1, capsys=capsys)
    assert (code, "contact_sheet.png cannot be written" in text, "all samples are valid" in text) == (0, True, True)


def test_the_contact_sheet_has_lines_and_what_limits_allow(tmp_path, capsys):
    images = [np.zeros((1, 3000), np.uint8), np.full((60, 60), 255, np.uint8)]
    write(tmp_path / "set", ({"__key__": str(i), "png": encoded(image)} for i, image in enumerate(images)))
    assert run(inspect_command, tmp_path / "set", "--workers", 1, capsys=capsys)[0] == 0
    dataset, _ = inspect(tmp_path / "set")
    for pixels, damaged in ((3599, True), (3600, False)):
        page = sheet(tmp_path / "set", dataset, LIMITS._replace(pixels=pixels))
        assert ((255, 228, 225) in {colour for _, colour in page.getcolors(10**6)}) is damaged  # pink


def test_ctrl_c_ends_a_command_with_130_and_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    write(tmp_path / "set", [{"__key__": "0", "png": flat(0)}])
    for module in ("data.prepare.writer", "data.inspect.verify"):
        monkeypatch.setattr(f"{module}.run_in_parallel", interrupted)
    for main, words in (
        (prepare_command, ("digits", tmp_path / "out")),
        (inspect_command, (tmp_path / "set", "--verify")),
    ):
        code, text = run(main, *words, capsys=capsys)
        assert code == 130
        assert text.startswith("stopped")
        assert text.count("\n") == 1


def test_ctrl_c_ends_indexing_while_shards_are_on_their_way(tmp_path):
    command = [sys.executable, "-m", "data.index", f"pipe:touch {tmp_path}/begun; sleep 60", str(tmp_path / "x.json")]
    heeding = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    }  # a script's background job ignores it
    indexing = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **heeding)
    wait_until((tmp_path / "begun").exists)
    began = time.monotonic()
    # A signal to another thread interrupts no wait of the main thread, as one that comes just before that wait.
    other = next(
        int(task.name) for task in Path(f"/proc/{indexing.pid}/task").iterdir() if task.name != str(indexing.pid)
    )
    assert ctypes.CDLL(None).tgkill(indexing.pid, other, signal.SIGINT) == 0
    assert indexing.wait() == 130
    assert time.monotonic() - began < 60, "it did not wait for what was on its way"
    assert indexing.stderr.read().splitlines()[-1] == "stopped"
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_readers_travel_to_other_processes(tmp_path):
    source = sources.open_source(str(folder_of_images(tmp_path / "in", n=2)), tmp_path / "spool", tmp_path)
    read = pickle.loads(pickle.dumps(source.read))
    assert [read(item) for item in source.items] == [source.read(item) for item in source.items]


def test_one_class_of_nested_folders_is_named_with_what_to_prepare_instead(tmp_path, capsys):
    for kind in ("pants", "shoes"):
        (tmp_path / "set" / "clothes" / kind).mkdir(parents=True)
        Image.new("L", (16, 16), 100 + len(kind)).save(tmp_path / "set" / "clothes" / kind / "1.png")
    command = [tmp_path / "set", tmp_path / "out", "--size", 16, "--test_fraction", 0]
    code, text = run(prepare_command, *command, capsys=capsys)
    assert code == 0, text
    assert "1 class\nthe one class is clothes: if its sub-folders are the classes, prepare that folder instead" in text
    command[:2] = tmp_path / "set" / "clothes", tmp_path / "two"
    assert "2 classes\n" in run(prepare_command, *command, capsys=capsys)[1]
