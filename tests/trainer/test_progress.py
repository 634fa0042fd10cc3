"""How far a command is, in a terminal and in a log."""

import sys

from trainer import progress as module
from trainer.progress import progress


def test_a_log_gets_a_line_each_half_minute_and_a_terminal_a_bar(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 10))  # the clock is read once before each item, and again after a line
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(seconds))}))
    assert [*progress(range(10))] == [*range(10)]
    assert capsys.readouterr().err.splitlines() == ["20% done", "50% done", "80% done"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert [*progress([1, 2])] == [1, 2]
    assert "2/2" in capsys.readouterr().err
