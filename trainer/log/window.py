"""What a run collects between two log lines."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.profiler import record_function

from data.loader import Images
from data.order import sample_checksum
from trainer.profiler import DATA
from trainer.step import TermMeans


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that this process has held so far in gigabytes: on the host, and of tensors on its GPU."""
    peak = {"speed/host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    return peak | ({"speed/gpu_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {})


class WindowSummary(NamedTuple):
    """A window over all processes."""

    terms: dict[str, float]  # means of the losses' terms, and the speed
    sample_checksum: int  # checksum of the samples in [0, 2^32), the same for any number of processes
    replaced: list[str]  # a message for each damaged image that another image replaced


class LogWindow:
    """Collects this process's terms, samples and times between two log lines.

    A run that stops within a window saves its `state`, so that the resumed run logs what an uninterrupted one does.

    `batch_size` is the number of images per step of all processes.
    """

    def __init__(self, accelerator: Accelerator, meter: TermMeans, batch_size: int):
        self.accelerator, self.meter, self.batch_size = accelerator, meter, batch_size
        self.sample_checksum = 0
        self.replaced: list[str] = []
        self.start(0)

    def start(self, step: int) -> None:
        """Measure the time from now on, at `step`."""
        self.first_step, self.began, self.data_wait = step, time.monotonic(), 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time in this context as waiting for data."""
        began = time.monotonic()
        with record_function(DATA):
            yield
        self.data_wait += time.monotonic() - began

    def add_samples(self, step: int, rows: slice, sets: list[Images]) -> None:
        """Note this process's samples of a step, one entry of `sets` for each dataset."""
        for which, images in enumerate(sets):
            self.sample_checksum += sample_checksum(step, which, rows, images.position.numpy())
            self.replaced += [f"step {step + 1}: {message}" for message in images.skipped]

    def read(self, step: int) -> WindowSummary:
        """Return the window's summary at `step`, and forget its terms and samples. Waits for the device."""
        terms = self.meter.read(self.accelerator)
        seconds = time.monotonic() - self.began  # after the terms, which wait for the device
        wait = round(self.data_wait / seconds * 1e6)
        own = torch.tensor([self.sample_checksum % 2**32, len(self.replaced), wait], device=self.accelerator.device)
        checksum, replaced, wait = self.accelerator.reduce(own, "sum").tolist()
        messages = gather_object(self.replaced) if replaced else []
        self.sample_checksum, self.replaced = 0, []
        terms["speed/images_per_second"] = (step - self.first_step) * self.batch_size / seconds
        terms["speed/data_wait"] = wait / 1e6 / self.accelerator.num_processes
        return WindowSummary(terms, checksum % 2**32, messages)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to log."""
        return not self.meter.state()

    def state(self) -> dict[str, Any]:
        """Return what this process has not logged yet, as plain data. Waits for the device."""
        return {"terms": self.meter.state(), "sample_checksum": self.sample_checksum, "replaced": self.replaced}

    def load(self, states: list[dict[str, Any]]) -> None:
        """Continue the windows of all processes. If their number has changed, the main one takes on all samples."""
        same_number = len(states) == self.accelerator.num_processes
        if same_number:
            states = [states[self.accelerator.process_index]]
        if same_number or self.accelerator.is_main_process:
            self.sample_checksum = sum(state["sample_checksum"] for state in states)
            self.replaced = [message for state in states for message in state["replaced"]]
        self.meter.load([state["terms"] for state in states], self.accelerator.device)
