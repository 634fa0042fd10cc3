"""The run's log: what a flush covers, and whose errors are printed."""

import threading
from types import SimpleNamespace

from trainer.log.board import hide_tensorboard_tracebacks
from trainer.log.logger import RunLogger


def test_a_flush_from_the_savers_thread_ignores_half_a_line(tmp_path):
    """The checkpoint writer flushes the log while the run appends a line."""
    run_logger = RunLogger(tmp_path, 0, 9, is_main=True)
    run_logger.scalars(1, {"a/b": 1.0})
    with open(run_logger.metrics, "a") as file:
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
