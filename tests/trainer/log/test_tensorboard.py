"""TensorBoard's own server on a run: what its tabs ask for is there."""

import json
import re
import shutil
import subprocess
import sys
from urllib.request import urlopen

import pytest
from conftest import BOARD, wait_until
from playwright.sync_api import Page, sync_playwright
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.summary.writer import event_file_writer

from trainer.log.board import Board
from trainer.log.charts import QUESTIONS

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RUN = ["--system", "VAEGAN", "--system.discriminator", "ternary", "--trainer.steps", "4", "--trainer.log_every", "2"]
RUN += ["--evaluate.every", "4", "--evaluate.num", "32", "--evaluate.extractor", "demo-random"]


TABS = {
    "timeseries": ["starts", "generator_loss/ternary"],
    "scalars": ["autoencoder/kl", "eval/fid32/demo-random-v1"],
    "custom_scalars": ["How good is it?", "Is the machine busy?"],
    "images": ["confusion of the ternary discriminator", "traversals of codes, from -3 to 3 deviations"],
    "histograms": ["codes/means"],
    "distributions": ["codes/means"],
    "text": ["configuration/text_summary", "Starting at step 0 of 4"],
    "hparams": ["system.discriminator", "eval/fid32/demo-random-v1"],
    "projector": ["Points: 359"],
}


@pytest.fixture
def url(here, tmp_path):
    """The address of TensorBoard's server on a run."""
    done = here(*RUN, *BOARD, "--trainer.run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    start = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0", "--load_fast", "false"]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True) as server:
        (url,) = next(found for line in server.stderr if (found := re.findall(r"http://localhost:\d+/", line)))
        assert b"<tb-webapp" in urlopen(url).read()
        try:
            yield url
        finally:
            server.terminate()


@pytest.fixture
def board(url):
    """`board(path)`: the JSON that TensorBoard's page gets from a path of its server."""
    return lambda path: json.load(urlopen(f"{url}data/{path}"))


def test_a_curve_steps_up_where_the_run_started(tmp_path, monkeypatch):
    # The names of files end with their number in the process, which TensorBoard sorts as text: 10 is before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for step in (0, 200, 200, 300):
        board = Board(tmp_path, step)
        board.start("trainer: {}", "Starting")
        board.plot(step + 50, {"vae/kl": 1.0})
        board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(point.step, point.value) for point in found.Scalars("run/starts")] == [
        (0, 1),
        (200, 2),
        (200, 3),
        (300, 4),
    ]
    assert [point.step for point in found.Scalars("vae/kl")] == [50, 250, 350], "the third start goes on before 250"


def test_questions_keep_their_order_beside_a_run_without_evaluations(tmp_path):
    for name, tag in (("a", "speed/images_per_second"), ("b", "eval/psnr359"), ("c", "vae/kl")):
        board = Board(tmp_path / name, 0)
        board.plot(1, {tag: 1.0})
        board.close()
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    plugin = CustomScalarsPlugin(TBContext(data_provider=MultiplexerDataProvider(runs, str(tmp_path))))
    categories = json.loads(plugin.layout_impl(RequestContext(), ""))["category"]
    assert [category["title"] for category in categories] == [*QUESTIONS]
    charts = {category["title"]: [chart["title"] for chart in category.get("chart", [])] for category in categories}
    assert charts["How good is it?"] == ["PSNR of reconstructions (dB)"]
    assert charts["Are the codes healthy?"] == ["KL of posterior and prior (nats per image)"]


@pytest.mark.slow
def test_each_tab_has_its_content(board):
    wanted = {"scalars", "custom_scalars", "images", "histograms", "distributions", "text", "hparams", "projector"}
    # Some look for their files in a thread of their own.
    wait_until(lambda: wanted <= {name for name, tab in board("plugins_listing").items() if tab["enabled"]})
    questions = [category["title"] for category in board("plugin/custom_scalars/layout")["category"]]
    assert len(questions) == 5, questions
    scalars = board("plugin/scalars/tags")["run"]
    assert {"ternary/discriminator_loss", "autoencoder/kl", "speed/host_gb"} <= scalars.keys()
    for tag in ("confusion of the ternary discriminator", "traversals of codes, from -3 to 3 deviations"):
        assert board("plugin/images/tags")["run"].keys() >= {tag}
    (projected,) = board("plugin/projector/runs")
    assert board(f"plugin/projector/info?run={projected}")["embeddings"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_a_browser_shows_what_is_in_each_tab(url):
    def shows(page: Page, text: str) -> bool:
        return any(frame.get_by_text(text).count() for frame in page.frames)  # the projector has a frame of its own

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for tab, texts in TABS.items():
            page = browser.new_page(viewport={"width": 1600, "height": 1200})
            page.goto(f"{url}#{tab}")
            for text in texts:
                wait_until(lambda page=page, text=text: shows(page, text))
            page.close()
