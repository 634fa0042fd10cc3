"""The command that scores a checkpoint or images: torch-fidelity's numbers, the run's own, refusals."""

import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from evaluators import in_blocks, random_inception
from PIL import Image, ImageOps

from data.loader import read
from data.shards.reader import Shards, write
from trainer.evaluate.command import main
from trainer.export.command import main as export
from trainer.log.metrics_file import read_metrics
from trainer.log.pictures import COLUMNS, below_originals, grid

RECONSTRUCTION_SCORES = {"eval/rfid359/demo-random-v1", "eval/psnr359", "eval/ssim359", "eval/prior_gap359"}
SAMPLE_SCORES = ("eval/fid", "eval/kid", "eval/recall", "eval/sharpness359", "eval/z_recovered")


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory):
    """240 training and 200 held-out digits as PNG."""
    out = tmp_path_factory.mktemp("folders")
    for name, source, count in (("fake", data.train, 240), ("real", data.test, 200)):
        (out / name).mkdir()
        images = read(Shards(source), np.arange(count), 32, 1).image
        for i, image in enumerate(images):
            Image.fromarray(image[0].numpy()).save(out / name / f"{i:04d}.png")
    return out


@pytest.fixture
def score(capsys):
    """Run the command; what it printed, and its JSON line."""

    def run(*arguments):
        capsys.readouterr()
        main([*map(str, arguments), "--json"])
        told = capsys.readouterr().out
        (line,) = [json.loads(text) for text in told.splitlines() if text.startswith("{")]
        return told, line

    return run


def audited(told) -> set[str]:
    """The scores in which torch-fidelity was found to agree, to a hundred-thousandth."""
    pairs = re.findall(r"audit: eval/(\w+)/\S+ (\S+), torch-fidelity (\S+): agrees", told)
    for name, ours, theirs in pairs:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5), name
    return {name for name, *_ in pairs}


def test_images_are_scored_and_torch_fidelity_agrees(score, folders, demo_cnn):
    arguments = (folders / "fake", "--against", folders / "real", "--extractor", "demo-cnn", "--weights", demo_cnn)
    told, line = score(*arguments, "--audit")
    assert "audit: torch-fidelity agrees in 7 scores" in told
    assert audited(told) == {"fid240", "is240", "is_std240", "kid240", "kid_std240", "precision240", "recall240"}
    assert "for comparison: the FID between two halves of the real images, 100 against 100" in told
    assert 0 < line["eval/fid240/demo-cnn-v1"] < 10
    assert 5 < line["eval/is240/demo-cnn-v1"] < 10
    assert (line["image_size"], line["channels"], line["world_size"]) == (32, 1, 1)
    again, few = score(*arguments, "--num", "100", "--metrics", "fid,prdc")
    assert few["eval/fid100/demo-cnn-v1"] != line["eval/fid240/demo-cnn-v1"]
    assert "eval/recall100/demo-cnn-v1" in few
    assert not any(name.startswith(("eval/kid", "eval/is")) for name in few)
    assert "audit" not in again


def test_an_audit_that_disagrees_fails_loudly(score, folders, demo_cnn, monkeypatch, capsys):
    import trainer.evaluate.audit

    def meddled(**settings):
        told = trainer_metrics(**settings)
        return told | {"recall": told["recall"] * (1 + 2e-4)}

    trainer_metrics = trainer.evaluate.audit.calculate_metrics
    monkeypatch.setattr(trainer.evaluate.audit, "calculate_metrics", meddled)
    with pytest.raises(SystemExit) as stopped:
        score(
            *(folders / "fake", "--against", folders / "real", "--extractor", "demo-cnn", "--weights", demo_cnn),
            *("--metrics", "fid,prdc", "--audit"),
        )
    assert stopped.value.code == 1
    told = capsys.readouterr()
    assert "error: the audit disagrees: audit: eval/recall240/demo-cnn-v1" in told.err
    assert "eval/precision240/demo-cnn-v1" not in told.err


def test_a_checkpoint_scores_as_its_run_did(score, here, data, demo_cnn, tmp_path, capsys):
    run = tmp_path / "run"
    evaluate = ("--evaluate.every", "2", "--evaluate.num", "70", "--evaluate.extractor", "demo-cnn")
    done = here(
        *("--system", "VAE", "--trainer.steps", "2", "--trainer.run_dir", run, *evaluate),
        *("--evaluate.weights", demo_cnn, "--system.networks.blocks", "1", "--system.networks.width", "8"),
        small=[],  # residual networks, whose grouped convolutions compute in another memory format
    )
    assert done.returncode == 0, done.stderr
    kept = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()][-1]
    _, line = score(run, "--num", "70", "--out", tmp_path / "made", "--extractor", "demo-cnn", "--weights", demo_cnn)
    scores = {name for name in kept if name.startswith("eval/") and "seconds" not in name}
    assert {"eval/fid70/demo-cnn-v1", "eval/kid70/demo-cnn-v1", "eval/recall70/demo-cnn-v1"} < scores
    assert {name: line[name] for name in scores} == {name: kept[name] for name in scores}
    assert (line["step"], line["num"], line["extractor_sha256"]) == (2, 70, kept["extractor_sha256"])
    assert len([*(tmp_path / "made").glob("*.png")]) == 70
    _, again = score(
        *(tmp_path / "made", "--against", data.test, "--extractor", "demo-cnn", "--weights", demo_cnn),
        *("--size", "32", "--channels", "1"),
    )
    for name in ("fid70", "is70", "kid70", "recall70", "coverage70"):
        assert again[f"eval/{name}/demo-cnn-v1"] == pytest.approx(kept[f"eval/{name}/demo-cnn-v1"], rel=1e-9)
    with pytest.raises(SystemExit):
        score(
            *(run, "--statistics", tmp_path / "other", "--max_pixels", "9"),
            *("--extractor", "demo-cnn", "--weights", demo_cnn),
        )
    assert "more than 9 (data.max_pixels, or --max_pixels" in capsys.readouterr().err


def test_a_tokenizer_is_scored_and_shown_by_its_reconstructions_alone(score, here, tmp_path):
    run = tmp_path / "run"
    evaluate = ("--evaluate.every", "2", "--evaluate.extractor", "demo-random", "--evaluate.metrics", "[fid]")
    done = here(
        *("--system", "VAEGAN", "--system.samples", "false", "--trainer.steps", "2", "--trainer.run_dir", run),
        *("--system.networks.latent_stride", "4", *evaluate),
    )
    assert done.returncode == 0, done.stderr
    assert "evaluate.metrics has no effect, as evaluate.num is 0" in done.stderr
    scores = {name: value for name, value in read_metrics(run)[-1].items() if name in RECONSTRUCTION_SCORES}
    assert scores.keys() == RECONSTRUCTION_SCORES
    assert not [name for name in read_metrics(run)[-1] if name.startswith(SAMPLE_SCORES)]
    shown = torch.zeros(48, 1, 32, 32, dtype=torch.uint8)
    two_panels = grid(below_originals({"real": shown, "reconstructed": shown}, COLUMNS), COLUMNS)
    assert Image.open(run / "samples" / "step_00000002.png").size == two_panels.size
    told, line = score(run)
    assert "no samples are scored, as the run's evaluate.num is 0: --num N" in told
    assert {name: line[name] for name in scores} == scores
    assert not [name for name in line if name.startswith(SAMPLE_SCORES)]
    told, line = score(run, "--num", "20")
    assert "no samples are scored" not in told
    assert "eval/fid20/demo-random-v1" in line
    export([str(run), str(tmp_path / "model")])
    assert "\n![real, reconstructed](pictures.png)\n" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inception_is_torch_fidelitys_on_folders(score, folders, tmp_path):
    """Random weights through the path that real ones take; torch-fidelity reads the same PNGs by itself."""
    from torch_fidelity import calculate_metrics

    weights = tmp_path / "weights.pth"
    random_inception(weights)
    for name in ("fake", "real"):
        (tmp_path / name).mkdir()
        for i, path in enumerate(sorted((folders / name).iterdir())[:16]):
            image = Image.open(path)  # half of the fake ones inverted
            (ImageOps.invert(image) if name == "fake" and i % 2 else image).save(tmp_path / name / path.name)
    told, line = score(tmp_path / "fake", "--against", tmp_path / "real", "--weights", weights, "--audit")
    assert {"fid16", "is16", "kid16", "precision16", "recall16"} <= audited(told)
    expected = calculate_metrics(
        input1=str(tmp_path / "fake"),
        input2=str(tmp_path / "real"),
        cuda=False,
        verbose=False,
        cache=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=16,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        save_cpu_ram=True,
    )
    suffix = line["extractor"]
    assert suffix.startswith("inception-v3-weights-")
    names = {
        "fid16": "frechet_inception_distance",
        "is16": "inception_score_mean",
        "kid16": "kernel_inception_distance_mean",
        "precision16": "precision",
        "recall16": "recall",
    }
    for ours, theirs in names.items():
        # By itself torch-fidelity computes KID in float32, which errs by 2e-7 here; the audit had it in float64.
        limit = {"abs": 1e-6} if ours == "kid16" else {"rel": 1e-5}
        assert line[f"eval/{ours}/{suffix}"] == pytest.approx(expected[theirs], **limit), ours


def test_archives_shards_and_folders_of_the_same_images_score_alike(score, folders, data, demo_cnn, tmp_path):
    """Compressed ones, which are unpacked, each for itself; and shards, of which the folders hold a part."""
    for name in ("fake", "real"):
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            for path in sorted((folders / name).iterdir()):
                archive.add(path, f"images/{path.name}")
    extractor = ("--extractor", "demo-cnn", "--weights", demo_cnn)
    _, expected = score(folders / "fake", "--against", folders / "real", *extractor)
    _, found = score(tmp_path / "fake.tar.gz", "--against", tmp_path / "real.tar.gz", *extractor)
    scores = {name for name in expected if name.startswith("eval/") and "seconds" not in name}
    assert {name: found[name] for name in scores} == {name: expected[name] for name in scores}
    assert found["against"] == str(tmp_path / "real.tar.gz")
    _, shards = score(data.test, "--against", data.train, *extractor)
    assert 0.1 < shards["eval/fid359/demo-cnn-v1"] < expected["eval/fid240/demo-cnn-v1"] < 10


def test_all_of_a_folder_counts_whatever_its_folders_are_called(score, folders, demo_cnn, tmp_path):
    for i, path in enumerate(sorted((folders / "real").iterdir())):
        part = tmp_path / ("train", "val", "extra")[i % 3]
        part.mkdir(exist_ok=True)
        shutil.copy(path, part)
    extractor = ("--extractor", "demo-cnn", "--weights", demo_cnn)
    _, line = score(tmp_path, "--against", folders / "real", *extractor)
    # In other blocks features are off by 1e-7 of themselves; 64 eigenvalues of some units, by twice that, and so is the
    # distance at most.
    assert (line["num"], line["eval/fid200/demo-cnn-v1"]) == (200, pytest.approx(0, abs=64 * 2e-7 * 10))


def test_the_table_says_which_way_is_better_and_json_is_asked_for(capsys, folders):
    main([str(folders / "fake"), "--against", str(folders / "real"), "--extractor", "demo-random", "--metrics", "fid"])
    head, fid, *notes = capsys.readouterr().out.splitlines()
    assert head.split() == ["score", "value", "better"]
    assert re.fullmatch(r"fid240/demo-random-v1-[0-9a-f]{8} +\d\S* +lower", fid)
    assert notes
    assert not [line for line in notes if line.startswith("{")]


def test_two_processes_score_as_one(score, forked, folders, demo_cnn, tmp_path):
    arguments = [folders / "fake", "--against", folders / "real", "--extractor", "demo-cnn", "--weights", demo_cnn]
    _, expected = score(*arguments)
    command = [*map(str, [*arguments, "--json", "--audit", "--out", tmp_path / "out"])]
    done = forked(f"from trainer.evaluate.command import main\nmain({command!r})", processes=2).wait()
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(text) for text in done.stderr.splitlines() if text.startswith("{")]
    scores = [name for name in expected if name.startswith("eval/") and "seconds" not in name]
    assert {name: line[name] for name in scores} == pytest.approx({name: expected[name] for name in scores}, rel=1e-12)
    assert line["world_size"] == 2
    assert "audit: torch-fidelity agrees in 7 scores" in done.stderr
    assert len([*(tmp_path / "out").glob("*.png")]) == 240


def test_a_cyclegan_is_scored_in_both_directions_and_a_copied_checkpoint_leaves_its_neighbours_alone(
    score, here, digits, demo_cnn, tmp_path, capsys
):
    run = tmp_path / "run"
    both = [
        f"--data.{kind}=[{digits / kind},{digits / other}]" for kind, other in (("train", "test"), ("test", "train"))
    ]
    system = ("--system", "CycleGAN", "--system.blocks", "1", "--system.width", "8")
    done = here(*system, *both, "--trainer.steps", "1", "--trainer.run_dir", run, small=[])
    assert done.returncode == 0, done.stderr
    (tmp_path / "a" / "b").mkdir(parents=True)
    copied = shutil.copytree(run / "checkpoints" / "step_00000001", tmp_path / "a" / "b" / "best")
    extractor = ("--extractor", "demo-cnn", "--weights", demo_cnn)
    _, line = score(copied, *extractor)
    assert {"eval/fid359/a2b/demo-cnn-v1", "eval/fid1438/b2a/demo-cnn-v1", "eval/cycle_psnr359/a2b"} <= line.keys()
    assert [path.name for path in (tmp_path / "a").rglob("*") if path.is_dir()] == ["b", "best"]
    with pytest.raises(SystemExit):
        score(copied, *extractor, "--audit", "--metrics", "kid", "--lpips", demo_cnn)
    assert capsys.readouterr().err.startswith(
        "error: --metrics, --audit have no effect: CycleGAN draws no samples. --lpips has no effect: CycleGAN makes no "
        "reconstructions. Leave out what has no effect\n"
    )


def test_samplers_are_scored_under_their_names(score, tiny_run, capsys, tmp_path):
    from trainer.generate.command import main as generate

    arguments = [tiny_run("AE"), "--extractor", "demo-random", "--num", "66", "--metrics", "fid,kid"]
    _, prior = score(*arguments)
    sampler = ["--sampler", "mixture", "--components", "2", "--truncation", "0.5", "--seed", "3", "--train_num", "200"]
    told, mixture = score(*arguments, *sampler, "--out", tmp_path / "scored", "--audit")
    assert audited(told) == {"fid66", "kid66", "kid_std66"}
    names = ("eval/fid66{}/demo-random-v1", "eval/kid66{}/demo-random-v1", "eval/sharpness66{}")
    for name in names:
        plain, named = name.format(""), name.format("/mixture-0.5")
        assert (plain in prior, named in prior, plain in mixture, named in mixture) == (True, False, False, True)
    assert mixture["eval/psnr359"] == prior["eval/psnr359"]
    assert "eval/z_recovered66" in prior
    assert not [name for name in mixture if "z_recovered" in name], "whose R² takes z's mean for 0"
    facts = {"kind": "mixture", "truncation": 0.5, "components": 2, "images": 200}
    assert facts.items() <= mixture["sampler"].items()
    generate(["sample", *map(str, [tiny_run("AE"), "--num", "66", "--out", tmp_path / "made", *sampler])])
    made = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "scored").iterdir()}
    with pytest.raises(SystemExit):
        score(*arguments, "--components", "2")
    assert "--components has no effect on --sampler prior" in capsys.readouterr().err


def test_statistics_of_another_tool_are_taken_if_said_so(score, folders, demo_cnn, tmp_path, capsys):
    from trainer.evaluate.extractors.demo_cnn import load_demo_cnn

    images = torch.stack([torch.tensor(np.asarray(Image.open(p)))[None] for p in sorted((folders / "real").iterdir())])
    features = in_blocks(load_demo_cnn(demo_cnn, 1).eval(), images)[0].detach().double().numpy()
    # With the members of ADM's files: spatial features' statistics and images, which are not read, in any type.
    adm = {"mu_s": np.zeros(9), "sigma_s": np.eye(9), "arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(2)}
    statistics = {"mu": features.mean(0).astype("f8"), "sigma": np.cov(features, rowvar=False)}
    np.savez(tmp_path / "other.npz", **statistics, **adm)
    arguments = (folders / "fake", "--extractor", "demo-cnn", "--weights", demo_cnn, "--metrics", "fid")
    _, expected = score(*arguments, "--against", folders / "real")
    _, found = score(*arguments, "--against", tmp_path / "other.npz", "--unverified")
    assert found["eval/fid240/demo-cnn-v1"] == pytest.approx(expected["eval/fid240/demo-cnn-v1"], rel=1e-6)
    with pytest.raises(SystemExit):
        score(*arguments, "--against", tmp_path / "other.npz")
    assert "does not say which images it describes" in capsys.readouterr().err


def test_the_bounds_of_an_image_are_the_command_lines(score, folders, demo_cnn, capsys):
    """An image at a bound is taken, and one beyond it refused."""
    arguments = ["--against", folders / "real", "--num", "64", "--metrics", "fid", "--size", "32"]
    arguments = [folders / "fake", *arguments, "--extractor", "demo-cnn", "--weights", demo_cnn]
    score(*arguments, "--max_pixels", "1024")
    with pytest.raises(SystemExit):
        score(*arguments, "--max_pixels", "1023")
    assert "it has 32 x 32 pixels, more than 1,023 (data.max_pixels, or --max_pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "is not a run or a checkpoint. Name one, or for images also name real ones by --against"),
        (("--against", "REAL", "--num", "1"), "argument --num: must be at least 2; got 1"),
        (("--against", "REAL", "--sampler", "mixture"), "--sampler has no effect: images are scored"),
        (("--against", "REAL", "--seed", "0"), "--seed has no effect: images are scored, not a system. Leave out"),
        (("--against", "REAL", "--num", "5000"), "--num is 5,000, but"),
        (("--against", "REAL", "--size", "1000000"), "argument --size: must be between 8 and 4096 pixels; got 1000000"),
        (("--against", "REAL", "--out", "REAL"), "exists and is not empty"),
        (("--against", "NUMBERS", "--extractor", "demo-random", "--metrics", "fid"), "but --against names statistics"),
        (("--against", "NUMBERS", "--audit"), "--audit needs real images"),
        (("--against", "LIST", "--metrics", "fid"), "holds no statistics of images"),
        (
            ("--against", "REAL", "--extractor", "demo-random", "--metrics", "is"),
            "needs classes, and demo-random-v1 has none",
        ),
        (("--against", "COLOUR", "--extractor", "demo-random"), "fake is grey: set --channels to 3 or 1"),
        (("--against", "nowhere"), "error: nowhere does not exist"),
        (
            ("--against", "REAL", "--extractor", "file"),
            "the extractor file needs --weights: name a file of TorchScript or torch.export",
        ),
        (("--against", "REAL", "--weights", "none.pth"), "error: --weights names none.pth, which does not exist"),
        (("--against", "REAL", "--metrics", "fid,lpips"), "must be some of fid,is,kid,prdc; got lpips"),
        (("--against", "REAL", "--extractor", "demo-cnn"), "name its file with --weights"),
        (("--against", "REAL", "--extractor", "resnet"), "expected inception, demo-cnn"),
        (("--against", "REAL", "--weights", "WEIGHTS"), "does not hold the weights of the FID's InceptionV3"),
        (("--against", "ODD", "--extractor", "demo-random"), "it has 16x16 pixels, and the first image of "),
        (("--against", "SHARDS", "--extractor", "demo-random"), "it has 16x16 pixels, and the first image of "),
    ],
)
def test_what_cannot_be_scored_is_refused_in_words(arguments, words, folders, demo_cnn, tmp_path, capsys):
    (tmp_path / "odd").mkdir()
    for i, size in enumerate((32, 16)):
        Image.new("L", (size, size)).save(tmp_path / "odd" / f"{i}.png")
    (tmp_path / "colour").mkdir()
    for i, mode in enumerate(("L", "RGB")):
        Image.new(mode, (32, 32)).save(tmp_path / "colour" / f"{i}.png")
    np.savez(tmp_path / "numbers.npz", mu=np.zeros(64), sigma=np.eye(64))
    with open(tmp_path / "list.npz", "wb") as file:
        np.save(file, np.zeros(64))
    known = {"REAL": folders / "real", "WEIGHTS": demo_cnn, "ODD": tmp_path / "odd", "COLOUR": tmp_path / "colour"}
    write(tmp_path / "shards", [{"__key__": "0", "png": (tmp_path / "odd" / "1.png").read_bytes()}])
    known |= {"SHARDS": tmp_path / "shards"}
    known |= {"NUMBERS": tmp_path / "numbers.npz", "LIST": tmp_path / "list.npz"}
    with pytest.raises(SystemExit) as stopped:
        main([str(folders / "fake"), *(str(known.get(one, one)) for one in arguments)])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


SCORE = """
import os, sys, traceback
from pathlib import Path
import trainer.evaluate.command
{patch}
try:
    trainer.evaluate.command.main({arguments!r})
except SystemExit as stopped:
    os._exit(stopped.code)
except BaseException:
    traceback.print_exc()
    os._exit(3)
sys.stdout.flush()
os._exit(0)
"""


def test_processes_score_the_checkpoint_that_the_main_one_finds(score, here, ranks, tmp_path):
    """Between the looks of two processes a run saves another one. The main one fits the sampler, too."""
    done = here("--system", "VAE", "--trainer.steps", "2", "--trainer.save_every", "1", "--trainer.run_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    first = tmp_path / "checkpoints" / "step_00000001"
    # Three blocks of samples, of two processes.
    arguments = [str(tmp_path), "--json", "--extractor", "demo-random", "--num", "130"]
    arguments += ["--sampler", "resample", "--train_num", "70"]
    _, expected = score(first, *arguments[1:])
    looks = {0: f"trainer.evaluate.target.checkpoint_of = lambda path: Path({str(first)!r})", 1: ""}
    faults = {rank: SCORE.format(patch=patch, arguments=arguments) for rank, patch in looks.items()}
    both = ranks(processes=2, faults=faults).wait()
    assert both.codes == [0, 0], both.stderr
    (line,) = [json.loads(text) for text in both.stderr.splitlines() if text.startswith("{")]
    assert (line["step"], line["world_size"]) == (1, 2)
    fid = "eval/fid130/resample/demo-random-v1"
    assert line[fid] == pytest.approx(expected[fid], rel=1e-9)


@pytest.mark.parametrize(("rank", "named"), [({0: "real", 1: "fake"}, "images"), ({0: "real", 1: "real"}, "code")])
def test_processes_that_score_other_images_or_by_other_code_are_refused(ranks, folders, tmp_path, rank, named):
    (tmp_path / "images").symlink_to(folders / "real")
    faults = {}
    for number, name in rank.items():
        arguments = [str(folders / "fake"), "--against", str(tmp_path / "images"), "--extractor", "demo-random"]
        there = (
            "import trainer.evaluate.target as target\nopened = target.open_images\n"
            f"target.open_images = lambda name, *other: opened({str(folders / name)!r} "
            "if name.endswith('images') else name, *other)"
        )
        if named == "code" and number:
            there = "trainer.evaluate.target.code_checksum = lambda: 'other'"
        faults[number] = SCORE.format(patch=there, arguments=arguments)
    done = ranks(processes=2, faults=faults).wait()
    assert done.codes == [2, 2], done.stderr
    assert f"differ in {named}: " in done.stderr
    assert done.stderr.count("error: ") == 1
