"""When a process should stop."""

import os
import signal
import threading
import time

import pytest

from trainer.distributed.stop import StopSignal, parse_time_limit


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        *(("90", 5400), ("1:30", 90), ("23:30:00", 84600)),
        *(("1-12", 129600), ("1-12:30", 131400), ("2-00:00:01", 172801)),
    ],
)
def test_time_limits_are_written_as_slurms(limit, seconds):
    assert parse_time_limit(limit) == seconds


@pytest.mark.parametrize("limit", ["", "soon", "1:2:3:4", "1-", "1-1:2:3:4"])
def test_other_time_limits_are_refused(limit):
    with pytest.raises(ValueError, match=r"trainer\.time_limit must be"):
        parse_time_limit(limit)


@pytest.mark.parametrize(("now", "stops"), [(70.0, False), (72.9, False), (73.1, True)])
def test_a_time_limit_leaves_time_for_two_steps_and_saves(monkeypatch, now, stops):
    """100 s, less two of the longest step (10 s) with a save (3 s), and one second."""
    stop, clock = StopSignal(), iter([20.0, 30.0, 35.0, now])
    monkeypatch.setattr("trainer.distributed.stop.time.monotonic", lambda: next(clock))
    stop._process_start, stop.limit = 0.0, 100.0
    for _ in range(3):
        assert not stop.should_stop(3)
    stop._last_call = now  # the last step takes no time
    assert stop.should_stop(3) is stops
    assert stop.reason == ("trainer.time_limit" if stops else None)


@pytest.mark.parametrize("launched", [False, True])
def test_only_a_process_whose_launcher_is_gone_has_little_time_to_save(monkeypatch, launched):
    """The parent of a run in the background is gone, too, after a logout."""
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    timers = []
    stop = StopSignal()
    stop.run_began, stop._launcher = True, -1
    monkeypatch.setattr(
        "trainer.distributed.stop.threading.Timer", lambda *of: (timers.append(of), threading.Thread())[1]
    )
    stop._note(signal.SIGTERM)
    assert [limit for limit, *_ in timers] == [60] * launched


@pytest.mark.parametrize(("sent", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGUSR1, "SIGUSR1")])
def test_the_reason_is_what_was_pressed_or_sent(sent, name):
    stop = StopSignal()
    stop.listen()
    try:
        os.kill(os.getpid(), sent)
        deadline = time.monotonic() + 30
        while stop.reason is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.reason == name
        assert stop.should_stop(0)
    finally:
        stop.close()
