"""TensorBoard's own server on a run: what its tabs ask for is there."""

import json
import re
import subprocess
import sys
from urllib.request import urlopen

import pytest
from conftest import BOARD, wait_until

RUN = ["--system", "VAEGAN", "--system.discriminator", "ternary", "--trainer.steps", "4", "--trainer.log_every", "2"]
RUN += ["--evaluate.every", "4", "--evaluate.num", "32", "--evaluate.extractor", "demo-random"]


@pytest.fixture
def board(here, tmp_path):
    """`board(path)`: the JSON that TensorBoard's page gets from a path of its server."""
    done = here(*RUN, *BOARD, "--trainer.run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    start = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0", "--load_fast", "false"]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True) as server:
        (url,) = next(found for line in server.stderr if (found := re.findall(r"http://localhost:\d+/", line)))
        assert b"<tb-webapp" in urlopen(url).read()
        yield lambda path: json.load(urlopen(f"{url}data/{path}"))
        server.terminate()


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
