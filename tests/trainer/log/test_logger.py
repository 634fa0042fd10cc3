"""The run's log: what a flush covers, and whose errors are printed."""

import os
import termios
import threading
from types import SimpleNamespace

import pytest

from data.errors import DataError
from data.tables import duration
from trainer.log.board import hide_tensorboard_tracebacks
from trainer.log.logger import RunLogger


def test_a_flush_from_the_savers_thread_ignores_half_a_line(tmp_path):
    """The checkpoint writer flushes the log while the run appends a line."""
    run_logger = RunLogger(tmp_path, 0, 9, is_main=True)
    run_logger.scalars(1, {"a/b": 1.0})
    with open(run_logger.metrics.path, "a") as file:
        file.write('{"step": 2, "a')
    run_logger.flush()
    assert run_logger.board.flushed_step == 1
    run_logger.close()


def test_the_logger_knows_the_step_of_its_last_line(tmp_path):
    for first, steps in ((0, (1, 3)), (3, (5,))):
        run_logger = RunLogger(tmp_path, first, 9, is_main=True)
        run_logger.flush()
        assert run_logger.board.flushed_step == first
        for step in steps:
            run_logger.scalars(step, {"a/b": 1.0})
            run_logger.flush()
            assert run_logger.board.flushed_step == step
        run_logger.close()


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The logger's clock, which stands at `now`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("trainer.log.logger.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_file_gets_a_line_in_ten_seconds_and_the_last(tmp_path, capsys, clock):
    run_logger = RunLogger(tmp_path, 0, 4, is_main=True)
    for step, clock.now in enumerate([11.0, 15.0, 22.0, 23.0], 1):
        run_logger.terms(step, {"a/kl": 1.0, "speed/images_per_second": 8.0, "speed/data_wait": 0.0})
    run_logger.close()
    printed = capsys.readouterr().err
    assert [line.partition("  ")[0] for line in printed.splitlines()] == ["step 1/4", "step 3/4", "step 4/4"]
    assert printed.splitlines()[1].endswith("a/kl 1  images/s 8  data wait 0%  eta 7 s")


def test_the_time_left_goes_by_the_steps_of_recent_lines(tmp_path, capsys, clock):
    run_logger = RunLogger(tmp_path, 0, 1000, is_main=True)
    seconds = [10.0] * 100 + [20.0] * 60
    for step, took in enumerate(seconds, 1):
        clock.now += took
        run_logger.terms(step, {"a/kl": 1.0, "speed/images_per_second": 8.0, "speed/data_wait": 0.0})
    run_logger.close()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"eta {duration(20.0 * 840)}")


def test_slow_steps_without_a_log_line_are_told_of_in_a_file(tmp_path, capsys, clock):
    run_logger = RunLogger(tmp_path, 10, 20, is_main=True)
    for step, clock.now in enumerate([16.0, 32.0, 48.0, 64.0, 80.0], 11):
        if step == 14:
            run_logger.terms(step, {"a/kl": 1.0, "speed/images_per_second": 8.0, "speed/data_wait": 0.0})
        run_logger.print_if_silent(step)
    run_logger.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 12/20  eta 2 min 8 s"
    assert [line.partition("  ")[0] for line in lines] == ["step 12/20", "step 14/20"]


def test_a_file_tells_that_an_evaluation_begins(tmp_path, capsys):
    run_logger = RunLogger(tmp_path, 0, 4, is_main=True)
    run_logger.evaluating(4, 10_000, 359)
    run_logger.evaluating(4, 0, 359)
    run_logger.bar.disable = False
    run_logger.evaluating(4, 0, 359)  # a terminal's bar is there
    run_logger.bar.disable = True
    run_logger.close()
    images = "10,000 samples and 359 held-out images", "359 held-out images"
    assert capsys.readouterr().err == "".join(f"step 4: evaluating {one} ...\n" for one in images)


@pytest.mark.parametrize(
    ("names", "printed"),
    [
        (
            ["fid2k/x", "is2k/x", "is_std2k/x", "kid2k/x", "rfid9/x", "psnr9", "seconds"],
            "fid2k 0  is2k 1  rfid9 4  psnr9 5",
        ),
        (["fid9/a2b/x", "cycle_psnr9/a2b", "sharpness9/a2b"], "fid9/a2b 0  cycle_psnr9/a2b 1"),
        (["mine3/x", "yours3"], "mine3 0  yours3 1"),
    ],
)
def test_the_main_scores_are_printed_or_all_where_there_is_none(tmp_path, capsys, names, printed):
    run_logger = RunLogger(tmp_path, 0, 9, is_main=True)
    run_logger.scores(4, {f"eval/{name}": i for i, name in enumerate(names)}, extractor="x")
    run_logger.close()
    assert capsys.readouterr().err == f"step 4  by x:  {printed}\n"


def test_a_damaged_image_costs_the_projector_and_not_the_run(tmp_path, capsys):
    def embed():
        raise DataError("7.jpg is damaged")

    run_logger = RunLogger(tmp_path, 0, 9, is_main=True)
    run_logger.conclude(dict, {}, embed)
    run_logger.close()
    assert capsys.readouterr().err == "warning: TensorBoard's projector lacks this run's codes: 7.jpg is damaged\n"


def test_only_disk_errors_of_tensorboards_thread_are_hidden(monkeypatch):
    printed = []
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # restored at the end
    monkeypatch.setattr(threading, "__excepthook__", printed.append)
    hide_tensorboard_tracebacks()
    tensorboards = type("Writer", (), {"__module__": "tensorboard.summary.writer"})()
    for error, thread in (
        (OSError("full"), tensorboards),
        (OSError("full"), threading.current_thread()),
        (KeyError("x"), tensorboards),
    ):
        threading.excepthook(SimpleNamespace(exc_value=error, thread=thread))
    assert [(type(thrown.exc_value), thrown.thread) for thrown in printed] == [
        (OSError, threading.current_thread()),
        (KeyError, tensorboards),
    ]


@pytest.mark.parametrize("width", [0, 80])
def test_a_terminal_without_a_width_gets_lines_in_place_of_a_bar(tmp_path, monkeypatch, width):
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, width))
    with open(writer, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        run_logger = RunLogger(tmp_path, 0, 4, is_main=True)
        run_logger.terms(1, {"a/kl": 1.0, "speed/images_per_second": 8.0, "speed/data_wait": 0.0})
        run_logger.close()
        terminal.flush()
        shown = os.read(reader, 10_000).decode()
    os.close(reader)
    assert ("step 1/4" in shown) == (width == 0)
    assert ("0/4 [" in shown) == (width == 80)
