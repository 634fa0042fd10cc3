"""The page about runs shows all names as text, leaves out what is not there, and holds all that it shows."""

import json
import re
import shutil
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from playwright.sync_api import sync_playwright

from trainer.compare import page as comparison
from trainer.config.settings import DataConfig
from trainer.measures import MEASURES
from trainer.report.command import main
from trainer.report.curves import draw_curves
from trainer.report.results import Entry, Run

HOSTILE = "<script>alert(1)</script>"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TERMS = {"speed/images_per_second": 100.0, "speed/data_wait": 0.5, "binary/accuracy/real": 0.9}
SCORES = {"extractor": HOSTILE, "extractor_sha256": "0", "held_out": "1", "held_out_images": 359, "num": 2000}


# Pixels between the heading of the second group of charts and what is above it.
GAP = """
(() => {
  const heading = document.querySelectorAll("h3.question")[1];
  return heading.getBoundingClientRect().top - heading.previousElementSibling.getBoundingClientRect().bottom;
})()
"""


class Parsed(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += " ".join(data.split()) + " "

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def run(folder: Path, fid: float, steps: int = 9, **settings) -> Path:
    """Write what a run of `steps` steps leaves: a log, scores, settings and sample grids."""
    (folder / "samples").mkdir(parents=True)
    lines = [{"step": step, **TERMS} for step in range(1, steps + 1)]
    lines += [
        {
            "step": step,
            f"eval/fid2k/{HOSTILE}": fid * steps / step,
            "eval/density359": 0.5,
            "eval/coverage359": 1,
            **SCORES,
        }
        for step in {max(1, steps - 1), steps}
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    system = {"class_path": HOSTILE, "init_args": settings}
    (folder / "config.yaml").write_text(yaml.safe_dump({"system": system, "trainer": {"steps": steps, "seed": 3}}))
    (folder / "state").write_text("finished\n")
    for step in (1, steps):
        Image.new("RGB", (64, 64)).save(folder / "samples" / f"step_{step:08d}.png")
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """A page about three runs, whose names, settings and files are a stranger's."""
    at = tmp_path_factory.mktemp("report")
    runs = [run(at / "a", 3, kl_weight=1, note=HOSTILE), run(at / "<b>$\\frac{", 2, steps=12, kl_weight=7, note="n")]
    (runs[0] / "samples" / "step_00000005.png").write_text(HOSTILE)
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(runs[0] / "samples" / "step_00000001.png")  # more than a megabyte
    content, end = (runs[0] / "samples" / "step_00000001.png").read_bytes(), 12  # bytes of a chunk without data
    damaged = content[:-end] + b"\0\0\0\0gAMA" + zlib.crc32(b"gAMA").to_bytes(4, "big") + content[-end:]
    (runs[0] / "samples" / "step_00000002.png").write_bytes(damaged)
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, f"ternary/accuracy/{HOSTILE}$\\frac{{": 1.0}) + "\nno JSON\n")
    main([*map(str, [*runs, run(at / "c" / "a", 4)]), "--out", str(at / "report.html")])
    return at / "report.html"


def test_the_page_holds_all_that_it_shows_and_no_text_becomes_markup(reported):
    page = Parsed(reported)
    assert len(page.all("script")) == 1
    assert "alert(1)" in page.text
    kinds = [source["src"].partition(";base64,")[0] for source in page.all("img")]
    assert {*kinds} == {"data:image/png", "data:image/jpeg"}
    assert kinds.count("data:image/jpeg") == 1
    assert not page.all("link")
    assert "url(" not in reported.read_text()
    assert "default-src 'none'" in next(tag["content"] for tag in page.all("meta") if "http-equiv" in tag)


def test_runs_stand_side_by_side(reported):
    page = Parsed(reported)
    for words in (
        "3 runs",
        "step 9 of 9, finished",
        f"2,000 samples 359 held out {HOSTILE}",
        "FID ↓",
        "density ↑",
        "coverage ↑",
        "Starved by data : the device idles until images are read. Steps wait for data 50% of the time.",
        "raise --data.workers",
        "How good is it?",
        "images per second 100 100 100",
        "system.kl_weight 1 7",
        "system.note",
        "All settings",
    ):
        assert words in page.text, words
    assert "kind ↓ called" not in page.text  # no ternary discriminator
    (slider,) = page.all("input")
    assert slider["data-steps"] == "1 9 12"
    assert re.findall('class="at soft">([^<]*)', reported.read_text()) == ["step 9", "step 12", "step 9"]
    frames = [image for image in page.all("img") if "data-step" in image]
    assert [image["data-step"] for image in frames if "hidden" not in image] == ["9", "12", "9"]
    assert len(frames) == 6  # what is no PNG is left out
    assert "c/a, step 9" in {image["alt"] for image in frames}  # two runs have one name


def test_a_score_of_two_directions_is_their_mean(tmp_path):
    folder = run(tmp_path / "run", 3)
    line = {"step": 9, "eval/fid20/a2b/demo": 10.0, "eval/fid20/b2a/demo": 99.0, **SCORES, "extractor": "demo"}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert Run(folder).scores == {"fid": 54.5}
    one_way = {key: value for key, value in line.items() if "b2a" not in key}
    before = Run(folder).measured(MEASURES["fid"])
    (folder / "metrics.jsonl").write_text(json.dumps(one_way) + "\n")
    assert Run(folder).measured(MEASURES["fid"]) != before


def test_what_was_measured_differently_is_not_compared(tmp_path):
    """Scores by two extractors, and of two numbers of samples: charts of their own, a warning, and no best."""
    by = {"a": ("fid2k/inception", "i", 2000), "bb": ("fid2k/dino", "d", 2000), "ccc": ("fid1k/dino", "d", 1000)}
    for name, (tag, digest, num) in by.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(
            yaml.safe_dump({"data": {"size": 32}, "trainer": {"seed": len(name)}})
        )
        facts = SCORES | {"extractor": tag.partition("/")[2], "extractor_sha256": digest, "num": num}
        fid = len(name)
        lines = [{"step": step, f"eval/{tag}": fid, "eval/psnr359": 20 + fid, **facts} for step in (1, 2)]
        lines.append({"step": 2, **TERMS, "speed/images_per_second": 100 * fid})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def made(*names: str) -> tuple[list[str], list[str], bool]:
        """The charts, what is bold, and whether there is a warning."""
        main([*(str(tmp_path / name) for name in names), "--out", str(tmp_path / "page.html")])
        page, html = Parsed(tmp_path / "page.html"), (tmp_path / "page.html").read_text()
        warned = "different extractor weights, held-out images or numbers of samples" in page.text
        return [image["alt"] for image in page.all("img")], re.findall('class="best">([^<\n]*)', html), warned

    # PSNR and the speed depend on neither extractor nor samples.
    psnr = "PSNR of reconstructions (dB)"
    fids = {name: f"FID and rFID: {tag}" for name, (tag, *_) in by.items()}
    assert made("a", "bb") == ([fids["a"], fids["bb"], psnr], ["22.0", "200"], True)
    assert made("bb", "ccc") == ([fids["bb"], fids["ccc"], psnr], ["23.0", "300"], True)
    shutil.copytree(tmp_path / "bb", tmp_path / "copy")
    log = tmp_path / "copy" / "metrics.jsonl"
    log.write_text(log.read_text().replace('dino": 2', 'dino": 3'))
    assert made("bb", "copy") == (["FID and rFID", psnr], ["2.00"], False)
    log.write_text(log.read_text().replace('"extractor":', '"image_size": 16, "extractor":'))
    assert made("bb", "copy")[1:] == ([], True), "the same files, read as smaller images"
    config = tmp_path / "bb" / "config.yaml"
    for other in ({"data": {"size": 64}}, {"data": {"size": 32}, "system": {"init_args": {"networks": {"width": 8}}}}):
        config.write_text(yaml.safe_dump(other))
        assert made("a", "bb")[1] == ["22.0"], "other images or networks have another speed"


def test_scores_by_few_images_are_warned_of(tmp_path):
    warning = "only 99 images are held out, and scores by fewer than 100 say little"
    few, enough = run(tmp_path / "few", 3), run(tmp_path / "enough", 3)
    log = few / "metrics.jsonl"
    log.write_text(log.read_text().replace('held_out_images": 359', 'held_out_images": 99'))
    main([str(few), str(enough), "--out", str(tmp_path / "page.html")])
    assert f"few : {warning}" in Parsed(tmp_path / "page.html").text
    main([str(few)])
    assert warning.capitalize() in Parsed(few / "report.html").text
    assert not {"density", "coverage"} & Run(few).scores.keys()
    assert {"density", "coverage"} < Run(enough).scores.keys()
    tags = ("eval/recall2k/x", "eval/fid2k/x")
    assert [[Run(one).hides(tag) for tag in tags] for one in (few, enough)] == [[True, False], [False, False]]
    main([str(enough)])
    assert "are held out" not in Parsed(enough / "report.html").text


def logged(lines: list[dict], hidden=()) -> SimpleNamespace:
    return SimpleNamespace(lines=lines, evaluations=[], tags=lines[0].keys() - {*hidden})


@pytest.mark.parametrize("values", [(2.1e-4, 2.15e-4), (1e-7, 3e4), (0.9999995, 0.9999999), (1.2345e8, 1.3e8)])
def test_labels_of_an_axis_are_whole(values):
    run = logged([{"step": i, "vae/lr": value} for i, value in enumerate(values)])
    for question in draw_curves([Entry("a", "VAE", {}, [run])]).values():
        for curves in question:
            renderer = FigureCanvasAgg(curves.figure).get_renderer()
            curves.figure.draw(renderer)
            axis = curves.figure.gca().yaxis
            labels = [one.get_window_extent(renderer) for one in axis.get_ticklabels() if one.get_text()]
            assert len(labels) > 1
            assert min(label.x0 for label in labels) >= 0
            assert not axis.get_offset_text().get_text()


def test_a_curve_below_an_equal_one_is_dashed_and_a_hidden_one_is_not_drawn():
    rates = {"ternary/lr": 1.0, "autoencoder/lr": 1.0, "binary/lr": 2.0}
    run = logged([{"step": i, **rates, "eval/recall9": i} for i in range(3)], hidden=["eval/recall9"])
    ((curves,),) = draw_curves([Entry("a", "VAE", {}, [run])]).values()
    styles = {line.get_ydata()[0]: [] for line in curves.figure.gca().lines}
    for line in curves.figure.gca().lines:
        styles[line.get_ydata()[0]].append(line.get_linestyle())
    assert styles == {1.0: ["-", "--"], 2.0: ["-"]}


def test_a_curve_that_one_run_hides_is_that_of_the_others_alone():
    lines = [{"step": i, "eval/recall9": i} for i in range(3)]
    runs = logged(lines, hidden=["eval/recall9"]), logged([line | {"eval/recall9": 5} for line in lines])
    ((curves,),) = draw_curves([Entry(name, "VAE", {}, [run]) for name, run in zip("ab", runs, strict=True)]).values()
    (line,) = curves.figure.gca().lines
    assert line.get_ydata().tolist() == [5, 5, 5]


@pytest.mark.parametrize("value", [64, 0, -3.5])
def test_an_axis_of_one_value_shows_zero_and_it(value):
    run = logged([{"step": i, "eval/active_units9": value} for i in range(3)])
    ((curves,),) = draw_curves([Entry("a", "VAE", {}, [run])]).values()
    low, high = curves.figure.gca().get_ylim()
    assert min(value, 0) >= low
    assert max(value, 0) <= high
    assert max(high, -low) <= 1.2 * abs(value) or (low, high) == (0, 1)


@pytest.mark.parametrize("values", [(77, 205, 61), (1e-7, 3e4), (3, 4000), (5, 50)])
def test_a_logarithmic_axis_goes_from_a_tick_to_a_tick(values):
    run = logged([{"step": i, "eval/prior_gap9": value} for i, value in enumerate(values)])
    ((curves,),) = draw_curves([Entry("a", "VAE", {}, [run])]).values()
    assert curves.title == "prior gap, on a logarithmic axis"
    axis = curves.figure.gca()
    low, high = axis.get_ylim()
    assert low <= min(values)
    assert high >= max(values)
    ticks = axis.get_yticks()
    assert ticks[0] == low
    assert ticks[-1] == high
    assert 3 <= len(ticks) <= 14


def test_a_page_about_one_run_is_in_its_folder_and_of_several_here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    one, two = run(tmp_path / "one", 3), run(tmp_path / "two", 2)
    main([str(one)])
    assert "one" in Parsed(one / "report.html").text
    assert not [*Path().iterdir()]
    main([str(one), str(two)])
    assert [path.name for path in Path().iterdir()] == ["report.html"]
    assert not (two / "report.html").exists()


def test_a_run_that_was_stopped_between_two_log_lines_is_at_its_checkpoints_step(tmp_path):
    stopped = run(tmp_path / "run", 3)
    (stopped / "checkpoints" / "step_00000011").mkdir(parents=True)
    (stopped / "state").write_text("stopped\n")
    main([str(stopped), "--out", str(tmp_path / "page.html")])
    assert "step 11 of 9, stopped." in Parsed(tmp_path / "page.html").text


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 50, **TERMS}) + "\n")
    main([str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    page = Parsed(tmp_path / "page.html")
    assert "step 50." in page.text
    assert not page.all("img") + page.all("script")
    assert not any(title in page.text for title in ("Scores", "Images", "Training"))


def test_mistakes_are_named(tmp_path, capsys):
    made, page = run(tmp_path / "run", 3), str(tmp_path / "page.html")
    damaged = run(tmp_path / "damaged", 3)
    (damaged / "config.yaml").write_text("- 1")
    linked = run(tmp_path / "linked", 3)
    (tmp_path / "empty").mkdir()
    several = run(tmp_path / "runs" / "a", 3)
    (linked / "samples" / "step_00000003.png").symlink_to("/etc/hostname")
    for arguments, words in (
        ([tmp_path / "empty", "--out", page], "holds neither config.yaml nor metrics.jsonl"),
        ([several.parent, "--out", page], f"It holds runs: name them, such as {several}, or all by {several.parent}/*"),
        ([tmp_path / "none", "--out", page], "is not a folder: expected"),
        ([made, made, "--out", page], "the same folder twice"),
        ([made, "--out", tmp_path], "is a folder"),
        ([made, "--out", tmp_path / "no" / "page.html"], "does not exist"),
        ([damaged, "--out", page], "is not the configuration of a run"),
        ([linked, "--out", page], "is a link"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    assert not Path(page).exists()


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_the_slider_moves_all_runs_to_a_step(reported):
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.on("console", lambda message: errors.append(message.text))
        page.goto(f"file://{reported}")
        page.locator("#step").fill("1")
        shown = [image.get_attribute("data-step") for image in page.locator("figure.grids img:visible").all()]
        assert shown == ["9", "1", "9"]
        assert page.locator(".at").all_text_contents() == ["step 9", "step 1", "step 9"]
        assert page.locator("#shown").text_content() == "9"
        assert errors == []
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(GAP) >= 16
            assert page.locator(".settings th").last.evaluate("one => getComputedStyle(one).textAlign") == "left"
            scores = page.locator(".scores").first
            assert scores.locator("td:first-child small").first.is_visible() == (width > 600)
            assert (
                scores.locator("th").nth(2 if width > 600 else 1).evaluate("one => one.getBoundingClientRect().right")
                <= width
            )
            for box in page.locator(".scroll").all():  # a shadow is where it goes on
                assert "gradient" in box.evaluate("one => getComputedStyle(one).backgroundImage")
            assert page.locator("table").count() == page.locator(".scroll table").count()


# ---- of a comparison

SETTINGS = {
    "trainer": {"steps": 1000, "batch_size": 8},
    "evaluate": {"num": 64},
    "compare": {"seeds": [0], "systems": {"<i>": {"class_path": "VAE"}}},
}


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Write a comparison's page of entries with made-up scores and images; returns it parsed."""
    image = torch.zeros(24, 1, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(comparison, "draw_panels", lambda entry, data: {"real": image, "generated": image})

    def write(entries: list[Entry], failed: dict[str, str]) -> Parsed:
        comparison.write_page(entries, failed, DataConfig("digits/train", "digits/test"), SETTINGS, tmp_path)
        return Parsed(tmp_path / "index.html")

    return write


def test_no_text_of_a_comparison_becomes_markup(compared, tmp_path):
    page = compared(
        [Entry(HOSTILE, "VAE", runs=[Run(run(tmp_path / "run", 3))])], {"<img src=x>, seed 0": "</div><script>"}
    )
    assert not page.all("script") + page.all("i")
    assert all("base64" in image["src"] for image in page.all("img"))
    assert page.text.count(HOSTILE) >= 2  # beside its scores and above its images
    assert "1 run failed" in page.text
    assert "1 systems" not in page.text


def test_a_comparison_of_one_evaluation_makes_no_claims(compared, tmp_path):
    page = compared([Entry("VAE", "VAE", runs=[Run(run(tmp_path / "run", 3, steps=1))]), Entry("GAN", "GAN")], {})
    assert "2 systems on digits" in page.text
    assert "1,000 steps of 8 images of 32 by 32 pixels, from 1 seed." in page.text
    assert "failed. The" not in page.text
    assert not any(title in page.text for title in ("What the scores show", "ternary discriminators"))
