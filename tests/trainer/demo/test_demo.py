"""The page to play with a model: what it computes, how it is served, and how it looks in a browser."""

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from conftest import wait_until
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import sync_playwright

import models
from trainer.batch import normalize, to_uint8
from trainer.demo.command import main
from trainer.demo.model import Axes, Model, enlarged, error_map
from trainer.generate.command import main as generate
from trainer.log.pictures import picture

ROOT = Path(__file__).resolve().parents[3]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def opened():
    return {}


@pytest.fixture
def model(tiny_run, opened):
    def open_model(system: str) -> Model:
        if system not in opened:
            opened[system] = Model(tiny_run(system), num=70, label=3 if system == "GAN" else None)
        return opened[system]

    return open_model


def build_page(model: Model, folder: Path):
    from trainer.demo import page  # gradio takes seconds to import in each process of the tests

    return page.build_page(model, folder)


# ---- what it computes


@pytest.mark.parametrize("system", ["VAE", "AE", "GAN"])
def test_codes_move_along_orthonormal_axes_and_back(model, system):
    axes = model(system).axes
    assert torch.allclose(axes.axes @ axes.axes.T, torch.eye(len(axes.axes)).double(), atol=1e-9)
    code = model(system).draw(3)
    there = torch.linspace(-1, 1, len(axes.scale)).double()
    moved = axes.move(code, there)
    assert torch.allclose(axes.coordinates(moved), there, atol=1e-5)  # codes are float32
    assert torch.allclose(axes.move(moved, axes.coordinates(code)), code, atol=1e-5)


def test_the_axes_of_an_encoder_are_the_principal_components_of_its_codes(model):
    made = model("VAE")
    codes = made.generator.encoder(made.images[0])[0].flatten(1).double()
    within = (codes - made.axes.centre) @ made.axes.axes.T / made.axes.scale
    assert torch.allclose(within.T.cov(), torch.eye(len(made.axes.scale)).double(), atol=1e-6)
    assert (made.axes.scale.diff() <= 0).all()


def test_the_axes_of_a_generator_change_its_images_most(model, monkeypatch):
    """Of a linear generator they are known."""
    made = model("GAN")
    gains = torch.tensor([1.0, 9.0, 3.0, 27.0])[: made.system.latent_shape[0]]
    monkeypatch.setattr(Model, "decode", lambda self, z: (z * gains)[:, :, None, None])
    order = made._axes(4000).axes.abs().argmax(1)
    assert order.tolist() == gains.argsort(descending=True).tolist()


def test_a_mean_code_and_flat_axes_keep_a_code():
    axes = Axes(torch.zeros(4).double(), torch.eye(4)[:2].double(), torch.tensor([2.0, 1.0]).double())
    moved = axes.move(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([3.0, 0.0]).double())
    assert torch.equal(moved, torch.tensor([[6.0, 0.0], [3.0, 4.0]]))


def test_reconstructions_are_those_of_the_system(model, tiny_run):
    made, system = model("VAE"), models.load(tiny_run("VAE"))
    image = made.images[0][5]
    expected = to_uint8(system.reconstruct(normalize(image[None])))[0]
    assert (made.reconstruct(image).int() - expected.int()).abs().max() <= 1  # of a block of another size


def test_the_error_map_is_brightest_where_the_error_is_largest():
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    other = image.clone()
    other[0, 2, 3] = 51
    picture, text = error_map(image, other)
    bright = np.asarray(picture.convert("L")) > 128
    assert picture.size == (320, 320)
    assert [where.min() // 40 for where in bright.nonzero()] == [2, 3]
    assert bright.sum() == 40 * 40
    assert "51 of 255" in text
    assert "32.0 dB" in text  # 10 log10(255^2 / (51^2 / 64))
    assert "infinite" in error_map(image, image)[1]


def test_samples_are_those_of_trainer_generate(model, tiny_run, tmp_path, capsys):
    generate(
        [
            "sample",
            str(tiny_run("GAN")),
            "--classes",
            "3",
            "--out",
            str(tmp_path),
            "--num",
            "4",
            "--grid",
            "--seed",
            "3",
            "--truncation",
            "0.5",
        ]
    )
    assert Image.open(tmp_path / "sample.png").tobytes() == model("GAN").samples(3, 4, 0.5).tobytes()


# ---- how it is served


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve a model's page, one for all tests of this module; returns its address."""
    pages = {}

    def serve_once(model: Model) -> str:
        if not pages:
            from trainer.demo.page import serve

            page = build_page(model, tmp_path_factory.mktemp("page"))
            pages[page] = serve(page, "127.0.0.1", None)
        return next(iter(pages.values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_SHARE", "True")  # it heeds the arguments alone
        patch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield serve_once
    for page in pages:
        page.close(verbose=False)


def test_the_program_serves_until_ctrl_c(forked, tiny_run):
    arguments = [str(tiny_run("GAN")), "--num", "70", "--classes", "3"]
    program = forked(
        "from data.processes import run_command\nfrom trainer.demo.command import main\n"
        f"run_command(lambda: main({arguments!r}))"
    )
    wait_until(lambda: program.output.exists() and "Ctrl-C" in program.output.read_text())
    url = re.search(
        r"(http://127\.0\.0\.1:\d+/) shows GAN of GAN, step 3\. Ctrl-C ends it", program.output.read_text()
    )[1]
    assert "gradio" in httpx.get(url).text
    program(signal.SIGINT)
    assert program.wait().returncode == 130
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_what_the_page_answers_is_what_the_model_makes(served, tmp_path, model):
    url = served(model("VAE"))
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
    client = Client(url, verbose=False)
    names = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
    assert set(names) == {"/reconstruct", "/directions", "/move", "/interpolate", "/samples", "/between_samples"}

    image = model("VAE").images[0][1]
    picture(image).save(tmp_path / "image.png")
    seen, made, errors, text = client.predict(handle_file(tmp_path / "image.png"), api_name="/reconstruct")
    assert "PSNR" in text
    assert np.array_equal(np.asarray(Image.open(seen).convert("L")), np.asarray(enlarged(image)))
    expected = enlarged(model("VAE").reconstruct(image))
    assert np.array_equal(np.asarray(Image.open(made).convert("L")), np.asarray(expected))
    assert Image.open(errors).size == (320, 320)

    strip = client.predict(*[handle_file(tmp_path / "image.png")] * 2, 5, api_name="/interpolate")
    assert Image.open(strip).size == (5 * 98 - 2, 116)
    *values, first, sweep, _ = [*client.predict(handle_file(tmp_path / "image.png"), api_name="/directions"), None]
    again = client.predict(*values, api_name="/move")
    assert np.abs(np.asarray(Image.open(first), float) - np.asarray(Image.open(again), float)).max() <= 2  # rounding
    rows = len(model("VAE").axes.scale)
    assert Image.open(sweep).size == (7 * 66 - 2, 20 + rows * (66 + 20) - 2)
    heads = np.asarray(Image.open(sweep).convert("L"))[:18]  # one above each column: -3, -2, ... 3
    assert (np.stack([heads[:, column * 66 :][:, :64].min() for column in range(7)]) < 128).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"GIF89a", "image"), (b"\xff\xd8\xff\xe0 none", "cannot read this image"), (None, "pixels")],
)
def test_what_is_no_image_or_too_large_is_refused(served, model, tmp_path, content, message):
    path = tmp_path / "image.png"
    if content:
        path.write_bytes(content)
    else:
        Image.new("1", (10_000, 10_000)).save(path)  # 12 kB, and 100 million pixels
    client = Client(served(model("VAE")), verbose=False)
    with pytest.raises(AppError, match=message) as refused:
        client.predict(handle_file(path), api_name="/reconstruct")
    assert str(tmp_path) not in str(refused.value)


def test_after_an_error_nothing_is_shown_of_what_was_given_before(model, tmp_path):
    for system, names in (("VAE", {"reconstruct", "directions", "interpolate"}), ("CycleGAN", {"translate_a2b"})):
        (made := tmp_path / system).mkdir()
        parts = build_page(model(system), made).get_config_file()["dependencies"]
        asked = {part["id"]: part for part in parts}
        after = {asked[part["trigger_after"]]["api_name"]: part for part in parts if part["trigger_only_on_failure"]}
        assert after.keys() >= names
        for name in names - {"directions"}:  # whose sliders stay
            (found,) = (part for part in parts if part["api_name"] == name)
            assert after[name]["outputs"] == found["outputs"]


FROM_THE_START = {
    "VAE": ({"reconstruct", "directions", "interpolate", "samples", "between_samples"}, ["An image", "From", "To"]),
    "CycleGAN": ({"translate_a2b", "translate_b2a"}, ["An image of domain a", "An image of domain b"]),
}


@pytest.mark.parametrize("system", [*FROM_THE_START])
def test_a_tab_shows_something_from_the_start(model, tmp_path, system):
    events, places = FROM_THE_START[system]
    page = build_page(model(system), tmp_path).get_config_file()
    assert {one["api_name"] for one in page["dependencies"] if "load" in dict(one["targets"]).values()} == events
    labels = {one["props"]["label"]: one["props"] for one in page["components"] if one["type"] == "image"}
    assert all(labels[name].get("value") for name in places)


def test_an_empty_number_is_named(served, model):
    client = Client(served(model("VAE")), verbose=False)
    with pytest.raises(AppError, match="number field is empty"):
        client.predict(None, 4, 1, api_name="/samples")


def test_files_of_this_machine_are_not_read(served, model):
    """A visitor may name a path instead of an upload."""
    url, path = served(model("VAE")), str(ROOT / "docs" / "digits.png")
    named = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
    event = httpx.post(f"{url}gradio_api/call/reconstruct", json={"data": named}).json()["event_id"]
    answer = httpx.get(f"{url}gradio_api/call/reconstruct/{event}").text
    assert "event: error" in answer
    assert "not uploaded" in answer
    assert httpx.get(f"{url}gradio_api/file={path}").status_code == 403


def test_mistakes_are_named(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the program changes it
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for arguments, words in (
        ([tmp_path], "neither a checkpoint nor a run's folder"),
        ([tiny_run("VAE"), "--images", tmp_path / "none"], "is not a folder"),
        ([tiny_run("VAE"), "--port", "0"], "--port"),
        ([tiny_run("VAE"), "--num", "9", "--port", port], f"--port {port} cannot be opened there; name another"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


# ---- how it looks


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium or chrome is installed")
    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


def test_an_image_goes_in_and_a_reconstruction_comes_out_on_any_screen(served, browser, tmp_path, model):
    url = served(model("VAE"))
    page = browser.new_page(viewport={"width": 390, "height": 844})
    places, errors = set(), []
    page.on("request", lambda request: places.add(re.match(r"\w+:/*[^/]*", request.url)[0]))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(url)
    page.get_by_role("tab", name="Reconstruct").wait_for()

    picture(model("VAE").images[0][2]).save(tmp_path / "image.png")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "image.png")
    page.get_by_text("PSNR").wait_for()
    assert page.locator("img:visible").count() >= 4  # the image, what the model sees, what it makes, the errors

    page.get_by_role("tab", name="Directions").click()
    page.get_by_text("Direction 1", exact=True).wait_for()
    before = page.locator("img:visible").evaluate_all("images => images.map(image => image.src)")
    slider = page.locator("input[type=range]:visible").first
    slider.fill("2.5")
    page.wait_for_function(
        "old => [...document.images].some(one => one.offsetParent && !old.includes(one.src))", arg=before
    )
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function(
            "width => innerWidth === width && document.documentElement.scrollWidth <= width", arg=width
        )
    assert errors == []
    assert {place for place in places if not place.startswith(("data:", "blob:"))} == {url.rstrip("/")}
    page.close()


@pytest.mark.parametrize("system", ["GAN", "CycleGAN", "AE"])
def test_a_page_has_only_what_its_system_can_do(model, system, tmp_path):
    page = json.dumps(build_page(model(system), tmp_path).get_config_file(), default=str)
    has = {tab for tab in ("Reconstruct", "Directions", "Interpolate", "Samples", "Translate a to b") if tab in page}
    samples = {"Directions", "Samples"}
    expected = {"GAN": samples, "CycleGAN": {"Translate a to b"}, "AE": {"Reconstruct", "Interpolate"} | samples}
    assert has == expected[system]
