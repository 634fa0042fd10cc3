"""Real files of every kind that a stranger may send, mutated: each is read, or refused in words, within bounds of time
and memory, and nothing else happens: no code runs, no connection is made, nothing is written elsewhere."""

import io
import json
import mmap
import os
import random
import re
import shutil
import sys
import tarfile
import time
import zipfile
from contextlib import contextmanager, suppress
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tifffile
import torch
from conftest import NETWORKS, SMALL, reseal
from PIL import Image

import models
from data.deep import decode_to, encode
from data.errors import DataError
from data.images import decode
from data.inspect.__main__ import main as inspect_command
from data.latents import FORMATS, pack, unpack
from data.prepare import prepare
from data.shards.reader import Shards
from trainer.checkpoint import files as checkpoint_files
from trainer.config.parser import configure
from trainer.config.settings import DataConfig, Location
from trainer.evaluate import reference
from trainer.evaluate.extractors import demo_cnn
from trainer.log.metrics_file import read_metrics

SECONDS = 20.0  # of the processor, for one file: hundreds of times what the largest honest one here takes
MEMORY = 2**31  # bytes by which the process may grow: an image of max_pixels, in colour, and its conversions
TRIES = [12, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
HARMFUL = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pickle.find_class"}
HARMFUL |= {"socket.connect", "ctypes.dlopen", "os.kill"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGING = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}

# ---- what happens meanwhile


class Watch:
    """Notes what the process does beyond reading, by Python's audit events; such a hook stays, and is turned off."""

    def __init__(self):
        self.home: Path | None = None
        self.found: list[str] = []
        self.known = sys.stdlib_module_names | packages_distributions().keys() | {"data", "models", "trainer"}
        Image.init()  # imports all that Pillow has, and tries others
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.home is None:
            return
        if event in HARMFUL or (event == "import" and arguments[0].partition(".")[0] not in self.known):
            self.found.append(f"{event} {arguments[:1]}")
        elif event in CHANGING or (event == "open" and (arguments[2] or 0) & WRITING):
            path, folder = arguments[0], arguments[-1] if event in CHANGING else -1  # a descriptor, or -1
            if isinstance(path, int):
                return
            base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
            path = os.path.normpath(os.path.join(base, os.fsdecode(path)))
            if not Path(path).is_relative_to(self.home) and path != os.devnull and "__pycache__" not in path:
                self.found.append(f"{event} {path}")

    @contextmanager
    def over(self, home: Path):
        """Nothing but reading, and writing within `home`, may happen in this context."""
        self.found.clear()
        self.home = home
        try:
            yield
        finally:
            self.home = None
        assert not self.found


@pytest.fixture(scope="module")
def watch():
    return Watch()


# ---- mutations

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**64 - 1]
WORDS = [b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"\\u0000"', b"\x1b[2J", b"../../etc/passwd", b"[" * 10**5]
WORDS += [b"os.system", b"pipe:touch ran", b"file:///etc/passwd", b"18446744073709551616", b"*a", b"&a [*a, *a]"]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One to four changes: bits, bytes, numbers of the usual lengths, words, pieces moved, doubled or cut off."""
    made = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(made) + 1)
        end = min(len(made), at + chance.choice([1, 2, 4, 16, 64, 512]))
        kind = chance.randrange(7)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            made[at:end] = chance.randbytes(end - at)
        elif kind == 2:
            size = chance.choice([1, 2, 4, 8])
            made[at : at + size] = (chance.choice(NUMBERS) % 256**size).to_bytes(size, chance.choice(["big", "little"]))
        elif kind == 3:
            made[at:end] = chance.choice(WORDS)
        elif kind == 4:
            other = chance.randrange(len(made) + 1)
            made[other:other] = made[at:end]
        elif kind == 5:
            del made[at:end]
        elif chance.random() < 0.3:
            del made[at:]
    return bytes(made)


def memory(name: str) -> int:
    """Bytes that this process has (VmRSS), or had at most since clear_refs (VmHWM)."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.fixture
def fuzz(watch, tmp_path, capsys):
    """Read mutations of a content: `fuzz(content, read, tries)`; `read(bytes)` may raise what says that a file is bad.

    The same mutations are tried each time. A command's exit must be one block of text with code 2.
    """

    def run(content: bytes, read, tries: int, refused=(DataError, ValueError, OSError)) -> None:
        chance = random.Random(len(content))
        read(content)  # as it is, it is read
        for number in range(tries):
            spoilt = mutated(content, chance)
            (tmp_path / "last").write_bytes(spoilt)  # for whoever looks for the cause
            capsys.readouterr()
            Path("/proc/self/clear_refs").write_text("5")  # the most memory used is from now on
            before = memory("VmRSS")
            began, code, error = time.process_time(), None, None
            with watch.over(tmp_path):
                try:
                    read(spoilt)
                except SystemExit as stopped:
                    code = stopped.code
                except refused as refusal:
                    error = refusal
            said = capsys.readouterr().err
            assert time.process_time() - began < SECONDS, f"mutation {number}"
            assert memory("VmHWM") - before < MEMORY, f"mutation {number}"
            assert code in (None, 2), f"mutation {number}: {said}"
            assert error is None or str(error), f"mutation {number}: a refusal without words"
            assert "Traceback" not in said
            assert "\x1b" not in said

    return run


# ---- images


def picture(mode: str, form: str, **options) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).resize((120, 100)).convert(mode)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


IMAGES = {
    "grey PNG": ("L", "PNG", {}),
    "colour PNG": ("RGB", "PNG", {}),
    "PNG with alpha": ("RGBA", "PNG", {}),
    "PNG with a palette": ("P", "PNG", {"transparency": 3}),
    "PNG of bits": ("1", "PNG", {}),
    "PNG of 16 bits": ("I;16", "PNG", {}),
    "JPEG": ("RGB", "JPEG", {}),
    "grey JPEG": ("L", "JPEG", {}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True}),
    "CMYK JPEG": ("CMYK", "JPEG", {}),
    "turned JPEG": ("RGB", "JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
    "WebP": ("RGB", "WEBP", {}),
    "lossless WebP": ("RGBA", "WEBP", {"lossless": True}),
    "BMP": ("RGB", "BMP", {}),
    "PPM": ("RGB", "PPM", {}),
    "TIFF": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "GIF": ("P", "GIF", {}),
}


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("kind", IMAGES)
def test_images(fuzz, kind, tries):
    mode, form, options = IMAGES[kind]

    def read(content: bytes) -> None:
        assert decode(content, 32, 3).shape == (32, 32, 3)

    fuzz(picture(mode, form, **options), read, 4 * tries, refused=ValueError)


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("kind", ["npy", "PNG", "PPM", "TIFF"])
def test_images_of_sixteen_bits_and_of_five_channels(fuzz, kind, tries):
    pixels = np.random.default_rng(0).integers(0, 2**16, (40, 48, 5 if kind in ("npy", "TIFF") else 3), np.uint16)
    content = encode(pixels)[1] if kind != "PPM" else b"P6 48 40 65535\n" + pixels.astype(">u2").tobytes()
    if kind == "TIFF":
        options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "lzw", "rowsperstrip": 8}
        tifffile.imwrite(file := io.BytesIO(), pixels, **options)
        content = file.getvalue()
    form = (32, pixels.shape[2], 16)
    fuzz(content, lambda content: decode_to(content, *form), 4 * tries, refused=ValueError)


# ---- data sets


def members() -> list[tuple[str, bytes]]:
    return [(f"{kind}/{i}.png", picture("L", "PNG")) for kind in ("cat", "dog") for i in range(3)]


def packed(form: str) -> bytes:
    file = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode="w" if form == "tar" else "w:gz") as archive:
            for name, content in members():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("form", ["tar", "tar.gz", "zip"])
def test_archives_that_are_prepared(fuzz, tmp_path, form, tries):
    archive, out = tmp_path / f"images.{form}", tmp_path / "out"

    def read(content: bytes) -> None:
        for old in tmp_path.glob("*out*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        archive.write_bytes(content)
        prepare(str(archive), out, max_rejected=1.0)

    fuzz(packed(form), read, tries)


@pytest.fixture
def small(tmp_path) -> Path:
    """A prepared data set of six images."""
    archive = tmp_path / "images.tar"
    archive.write_bytes(packed("tar"))
    prepare(str(archive), tmp_path / "set", test_fraction=0.0)
    return tmp_path / "set"


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("name", ["train/00000.tar", "train/00000.tar.names.json", "train/index.json", "dataset.json"])
def test_data_sets(fuzz, small, name, tries):
    def read(content: bytes) -> None:
        (small / name).write_bytes(content)
        if name != "dataset.json":
            shards = Shards(small / "train")
            for position in range(len(shards)):
                shards.image(position)
                shards.name(position)
        inspect_command([str(small)])

    fuzz((small / name).read_bytes(), read, 2 * tries)


@pytest.mark.parametrize("tries", TRIES)
def test_tables_of_offsets(fuzz, small, tries):
    (table,) = (path for path in (small / "train").rglob("*.npy"))

    def read(content: bytes) -> None:
        table.write_bytes(content)
        shards = Shards(small / "train")
        for position in range(len(shards)):
            shards.image(position)

    fuzz(table.read_bytes(), read, 2 * tries)


# ---- runs and recipes


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits) -> Path:
    """The folder of a run of one step."""
    from trainer.train import train

    run = tmp_path_factory.mktemp("trained") / "run"
    data = ["--data.train", str(digits / "train"), "--data.test", str(digits / "test"), *SMALL, *NETWORKS]
    with suppress(SystemExit):
        train(configure([*data, "--system", "VAE", "--trainer.run_dir", str(run), "--trainer.steps", "1"]))
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", ["manifest.json", "ema.decoder.safetensors", "optimizer.autoencoder.safetensors"])
def test_checkpoints(fuzz, run, name, sealed, tries):
    """With checksums that tell, and with checksums made right again, as whoever means harm would make them."""
    path = checkpoint_files.list_checkpoints(run / "checkpoints")[0]
    manifest = (path / "manifest.json").read_bytes()

    def read(content: bytes) -> None:
        (path / "manifest.json").write_bytes(manifest)
        (path / name).write_bytes(content)
        if sealed:
            with suppress(ValueError, AttributeError, TypeError, RecursionError, OSError):  # too spoilt to be sealed
                reseal(path)
        if name != "optimizer.autoencoder.safetensors":
            models.load(path).sample(torch.zeros(1, 4))
        checkpoint_files.load(path)

    fuzz((path / name).read_bytes(), read, 2 * tries)


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("name", ["metrics.jsonl", "scores.json"])
def test_what_a_run_has_written_down(fuzz, run, name, tries):
    path = checkpoint_files.list_checkpoints(run / "checkpoints")[0]
    scores = {"scores": {"eval/fid64/demo-cnn-v1": 3.5}, "evaluation": {"extractor": "demo-cnn-v1"}}
    content = json.dumps(scores).encode() if name == "scores.json" else (run / name).read_bytes()

    def read(content: bytes) -> None:
        (path / name if name == "scores.json" else run / name).write_bytes(content)
        checkpoint_files.read_scores(path)
        read_metrics(run)

    fuzz(content, read, 4 * tries)


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_statistics(fuzz, tmp_path, save, tries):
    """A run keeps them, and others' tools write them."""
    file, path, meta = io.BytesIO(), tmp_path / "real.npz", np.array(json.dumps({"count": 2}))
    save(file, mu=np.zeros(2), sigma=np.eye(2), n=2, meta=meta, sharpness=1.0, features=np.zeros((2, 2), np.float32))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        reference.load(path, None)

    fuzz(file.getvalue(), read, 8 * tries, refused=ValueError)


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("form", FORMATS)
def test_latents(fuzz, form, tries):
    latents = {name: torch.zeros(1, 4, 2, 2) for name in ("mean", "log_variance")}
    fuzz(pack(latents, form)[0], unpack, 8 * tries, refused=ValueError)


@pytest.mark.parametrize("tries", TRIES)
def test_a_runs_extractor(fuzz, tmp_path, tries):
    path, meta = tmp_path / "demo-cnn-v1.safetensors", {"demo-cnn": json.dumps({"accuracy": 1.0, "data": ["a", 32, 1]})}

    def read(content: bytes) -> None:
        path.write_bytes(content)
        demo_cnn.is_fit(path, [], [], DataConfig(Location("")))
        demo_cnn.load_demo_cnn(path, 1)

    fuzz(safetensors.torch.save(demo_cnn.DemoCNN(1, 2).state_dict(), meta), read, 8 * tries, refused=ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head.weight", torch.tensor(1.0)),
        ("body.0.weight", torch.zeros(16)),
        ("head.bias", torch.zeros(3)),
        ("scale", torch.ones((), dtype=torch.float64)),
    ],
)
def test_an_extractor_of_other_tensors_is_refused(tmp_path, name, value):
    path = tmp_path / "demo-cnn-v1.safetensors"
    tensors = {**demo_cnn.DemoCNN(1, 2).state_dict(), name: value}
    path.write_bytes(safetensors.torch.save(tensors, {"demo-cnn": "[1]"}))
    assert not demo_cnn.is_fit(path, [], [], DataConfig(Location("")))
    with pytest.raises(ValueError, match=r"the weights .* are not a demo-cnn"):
        demo_cnn.load_demo_cnn(path, 1)


@pytest.mark.parametrize("tries", TRIES)
def test_recipes(fuzz, run, tries):
    """A run's config.yaml is one, too."""
    recipe = run / "config.yaml"

    def read(content: bytes) -> None:
        recipe.write_bytes(content)
        configure(["--config", str(recipe)])

    fuzz(recipe.read_bytes(), read, 2 * tries)


def test_memory_that_a_file_takes_is_seen_after_an_earlier_peak(fuzz, monkeypatch):
    def take(size: int) -> None:  # not by malloc, which may keep what is freed
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()

    monkeypatch.setitem(globals(), "MEMORY", 2**26)
    take(2**28)
    with pytest.raises(AssertionError, match="mutation 0"):
        fuzz(b"text", lambda _: take(2**27), 1)


def test_the_watch_sees_what_it_is_for(watch, tmp_path):
    """Each way out that it guards, tried."""
    acts = {
        "os.system": lambda: os.system(":"),
        "import": lambda: __import__("no_such_module_of_a_stranger"),
        "open": lambda: open(tmp_path.parent / "elsewhere", "w").close(),
        "os.mkdir": lambda: os.mkdir(tmp_path.parent / "folder"),
        "pickle.find_class": lambda: torch.load(io.BytesIO(PICKLE), weights_only=False),
    }
    for event, act in acts.items():
        with pytest.raises(AssertionError, match=event), watch.over(tmp_path), suppress(Exception):
            act()


PICKLE = b"cos\nsystem\n(S':'\ntR."
