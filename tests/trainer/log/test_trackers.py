"""Trackers get what the run logs, once each, go on in the same run, and never stop the trainer's."""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from conftest import wait_until

from trainer.log import trackers
from trainer.log.logger import RunLogger

CONFIGURATION = "trainer: {batch_size: 8, precision: null}\ndata: {train: [a, b]}\n"


@pytest.fixture
def memory(monkeypatch):
    """A tracker that accelerate knows as "memory"; `faults` are raised by the methods that they name."""

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker = "memory", False, None
        started, settings, metrics, pictures, faults = [], [], [], [], {}

        def __init__(self, project, **arguments):
            super().__init__()
            self.arguments = arguments

        def start(self):
            self.fault("start")
            self.started.append(self.arguments)

        def store_init_configuration(self, values):
            self.settings.append(values)

        def log(self, values, step=None):
            self.fault("log")
            self.metrics.append((step, values))

        def log_images(self, values, step=None):
            self.pictures += [(step, name, [one.size for one in ones]) for name, ones in values.items()]

        def finish(self):
            self.fault("finish")

        def fault(self, method):
            fault = self.faults.get(method)
            if callable(fault):
                fault()
            elif fault:
                raise fault.pop(0)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "memory", Memory)
    monkeypatch.setitem(trackers.KINDS, "memory", trackers.Kind(lambda folder, run, resumed: {"id": run}))
    return Memory


def logged(folder: Path, first: int, last: int, close=True) -> RunLogger:
    """What a run logs that starts behind step `first`: a line a step, and at even ones a picture and scores."""
    logger = RunLogger(folder, first, 9, True, trackers=["memory"])
    logger.start(CONFIGURATION, "Starting at step 0")
    facts = dict(extractor="demo", extractor_sha256="", held_out="", held_out_images=1)
    for step in range(first + 1, last + 1):
        logger.scalars(step, {"a/b": step / 2}, sample_checksum=7)
        if step % 2 == 0:
            logger.pictures(step, {"real": torch.zeros(3, 1, 8, 8, dtype=torch.uint8)})
            logger.scalars(step, {"eval/fid": 2.0 * step}, **facts)
    if close:
        logger.close()
    return logger


def everything(last: int):
    return [
        line
        for step in range(1, last + 1)
        for line in [(step, {"a/b": step / 2}), *([(step, {"eval/fid": 2.0 * step})] * (step % 2 == 0))]
    ]


def test_a_tracker_gets_metrics_pictures_and_settings(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--data.train=https://me:secret@host/x"])
    logger = logged(tmp_path, 0, 4)
    assert logger.board is None
    assert not list(tmp_path.glob("events.*"))
    assert memory.metrics == everything(4)
    assert [(step, name) for step, name, _ in memory.pictures] == [(2, "samples"), (4, "samples")]
    assert memory.settings == [{"trainer.batch_size": 8, "trainer.precision": None, "data.train": "['a', 'b']"}]
    assert sys.argv == ["main.py", "--data.train=https://***@host/x"]


@pytest.mark.parametrize("resumed", [2, 3, 4, 5])
def test_a_resumed_run_goes_on_in_the_same_tracker_run_and_doubles_nothing(memory, tmp_path, resumed):
    """After a kill, a run logs again what it logged behind its last checkpoint."""
    logged(tmp_path, 0, 5)
    logged(tmp_path, resumed, 8)
    assert memory.metrics == everything(8)
    assert [step for step, *_ in memory.pictures] == [2, 4, 6, 8]
    assert len({start["id"] for start in memory.started}) == 1


def test_a_run_that_starts_anew_is_a_new_run_of_the_tracker(memory, tmp_path):
    for _ in range(2):
        logged(tmp_path, 0, 3)
    assert memory.metrics == everything(3) * 2
    assert len({start["id"] for start in memory.started}) == 2


def test_a_tracker_that_is_added_to_a_run_gets_what_was_before(memory, tmp_path):
    first = RunLogger(tmp_path, 0, 9, True)
    for step in (1, 3):
        first.scalars(step, {"a/b": step / 2})
    first.close()
    logged(tmp_path, 3, 4)
    assert [step for step, _ in memory.metrics] == [1, 3, 4, 4]


def test_what_fails_once_is_sent_again(memory, tmp_path, capsys):
    memory.faults["log"] = [OSError("no route to host")]
    logged(tmp_path, 0, 4)
    assert memory.metrics == everything(4)
    assert capsys.readouterr().err.count("trainer.trackers: memory failed: no route to host. The run continues") == 1


def test_what_a_tracker_does_not_take_is_left_out(memory, tmp_path, capsys):
    memory.faults["log"] = [ValueError("no such name")] * 2
    logged(tmp_path, 0, 4)
    assert memory.metrics == everything(4)[1:]
    assert capsys.readouterr().err.count("memory failed") == 1


def test_a_run_that_ends_before_its_first_line_is_no_failure(memory, tmp_path, capsys):
    logged(tmp_path, 0, 0)
    assert len(memory.started) == 1
    assert capsys.readouterr().err == ""


def test_a_picture_does_not_overtake_its_line(memory, tmp_path, monkeypatch):
    """The tracker's thread looks for news while the run writes a line, and then a picture."""
    read, looked, written = trackers.Tracker._lines, threading.Event(), threading.Event()

    def slow(self):
        found = read(self)
        looked.set()
        written.wait()
        return found

    monkeypatch.setattr(trackers.Tracker, "_lines", slow)
    logger = logged(tmp_path, 0, 0, close=False)
    logger.trackers.notify()
    looked.wait()
    logger.scalars(2, {"a/b": 1.0})
    logger.pictures(2, {"real": torch.zeros(3, 1, 8, 8, dtype=torch.uint8)})
    written.set()
    logger.close()
    assert memory.metrics == [(2, {"a/b": 1.0})]
    assert len(memory.pictures) == 1


def test_a_full_disk_ends_no_tracker(memory, tmp_path, capsys, monkeypatch):
    logger = logged(tmp_path, 0, 0, close=False)
    wait_until((tmp_path / "tracker.memory.json").exists)
    full = [OSError("No space left on device")]
    written = trackers.write_atomically
    monkeypatch.setattr(trackers, "write_atomically", lambda *to: written(*to) if not full else raise_(full.pop()))
    for step in (1, 2):
        logger.scalars(step, {"a/b": step / 2})
        wait_until(lambda step=step: len(memory.metrics) == step)
    wait_until(lambda: not full)
    logger.close()
    assert [step for step, _ in memory.metrics] == [1, 2]
    assert capsys.readouterr().err.count("memory failed: No space left on device") == 1
    assert json.loads((tmp_path / "tracker.memory.json").read_text())["place"] == [2, 0]


def raise_(error):
    raise error


@pytest.mark.parametrize("method", ["start", "finish"])
def test_a_tracker_that_does_not_start_or_end_stops_nothing(memory, tmp_path, capsys, method):
    memory.faults[method] = [SystemExit(1)]
    logged(tmp_path, 0, 2)
    assert capsys.readouterr().err.count("memory failed") == 1
    memory.faults.clear()
    logged(tmp_path, 2, 3)
    assert memory.metrics == everything(3)


def test_a_tracker_that_hangs_holds_nobody_up(memory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSING", 0.2)
    hanging = threading.Event()
    memory.faults["log"] = hanging.wait
    logged(tmp_path, 0, 4)  # it would wait for ever
    assert "trainer.trackers: memory did not end in 0.2 s" in capsys.readouterr().err
    hanging.set()


def rows(folder: Path) -> list[dict]:
    """The rows of an offline run of Weights & Biases, with values of our names."""
    (path,) = folder.glob("*.wandb")
    from wandb.proto.wandb_internal_pb2 import Record  # they take a second to import, in each worker of pytest
    from wandb.sdk.internal.datastore import DataStore

    store, found = DataStore(), []
    store.open_for_scan(str(path))
    while content := store.scan_data():
        record = Record()
        record.ParseFromString(content)
        assert b"secret" not in content
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            found.append({name: json.loads(value) for name, value in items.items() if name[0] != "_"})
    return found


@pytest.mark.slow  # its service and the killed ranks start for seconds
def test_weights_and_biases_offline_has_the_whole_run_after_a_kill(here, ranks, tmp_path, monkeypatch):
    """Its offline mode resumes nothing, and whoever uploads a second folder of a run replaces the first: so the last
    folder has all. A tracker that is not installed is said to be once, and changes nothing."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    folder = tmp_path / "run"
    run = ["--system", "AE", "--trainer.run_dir", folder, "--trainer.save_every", "4", "--trainer.log_every", "1"]
    run += ["--trainer.trackers", "[wandb, mlflow]"]
    kill = f"""
import os, pathlib, time
from trainer.step import TrainStep
step = TrainStep.__call__
def killed(self, batches, number):
    while number == 6:
        sent = pathlib.Path("{folder}/tracker.wandb.json")
        if sent.exists() and '"place":[6,' in sent.read_text():
            os.kill(os.getpid(), 9)
        time.sleep(0.01)
    step(self, batches, number)
TrainStep.__call__ = killed
"""
    killed = ranks(*run, faults={0: kill}, env={"WANDB_MODE": "offline"}).wait()
    assert killed.returncode == -9, killed.stderr
    time.sleep(1)  # wandb names its folders by the second
    monkeypatch.setattr(trackers, "CLOSING", 300)  # beside a busy neighbour
    identity = json.loads((folder / "tracker.wandb.json").read_text())["run"]
    done = here(*run, "--trainer.steps", "8")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("mlflow failed: import of mlflow halted") == 1
    assert "pip install mlflow" in done.stderr

    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert [path.name.rpartition("-")[2] for path in folders] == [identity] * 2
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def written() -> bool:  # by a process of its own, which may still write when the run has ended
        with suppress(AssertionError):
            return len(rows(folders[-1])) >= len(lines)
        return False

    wait_until(written)
    found = rows(folders[-1])
    metrics = [{name: value for name, value in line.items() if name == "step" or "/" in name} for line in lines]
    assert [row for row in found if "samples" not in row and len(row) > 1] == metrics
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [row["step"] for row in found if "samples" in row] == [4, 8]
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
