"""What the time of some steps is spent on: a trace for TensorBoard or Perfetto, and a table (`--trainer.profile`)."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import profile, supported_activities, tensorboard_trace_handler

from data.tables import table

MOST_STEPS = 100  # a step takes megabytes of a trace, and up to a second to sort out
DATA, LOG = "waiting for data", "logging, checks and saving"
SYNCHRONIZING = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def parse_profile(given: str | None, steps: int) -> range:
    """Return the steps START to STOP - 1, counted from 0, of a text START:STOP, or none.

    Raises:
        ValueError: names the setting, what is wrong with it, and what is expected.
    """
    if given is None:
        return range(0)
    start, colon, stop = given.partition(":")
    trouble = ""
    if not (colon and start.isdecimal() and stop.isdecimal()):
        trouble = "is no two step numbers"
    elif int(start) >= int(stop):
        trouble = "contains no step, as START is not below STOP"
    elif int(stop) > steps:
        trouble = f"ends after the run's last step (trainer.steps {steps})"
    elif int(stop) - int(start) > MOST_STEPS:
        trouble = f"has {int(stop) - int(start)} steps, more than a trace can hold ({MOST_STEPS})"
    if trouble:
        raise ValueError(
            f"trainer.profile is {given!r}, which {trouble}: expected START:STOP, such as 20:30 for the ten steps "
            "after step 20"
        )
    return range(int(start), int(stop))


class StepProfiler:
    """Profiles the main process in the steps that trainer.profile names; it changes nothing else.

    Args:
        steps: the steps to profile, counted from 0; none on other processes
        folder: where the trace goes
        tell: prints the table
    """

    def __init__(self, steps: range, folder: Path, tell: Callable[[str], None]):
        self.steps, self.folder, self.tell = steps, folder, tell
        self.profile: profile | None = None
        self.recorded = False

    def before(self, step: int) -> None:
        """Begin or end where it is time, before `step`, or after the last one."""
        if self.profile is None and step in self.steps:
            self.first, self.profile = step, profile(activities=supported_activities())
            self.profile.start()
            self.began = time.perf_counter()
        elif self.profile is not None and step not in self.steps:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Write what was profiled up to `step`, if a profile is being taken."""
        if self.profile is None:
            if self.steps and not self.recorded:
                self.tell(
                    f"trainer.profile: steps {self.steps.start + 1} to {self.steps.stop} were not taken this time"
                )
            return
        self.recorded = True
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds, count = time.perf_counter() - self.began, step - self.first
        ended, self.profile, where = self.profile, None, f"the trace is in {self.folder}"
        ended.stop()
        try:
            self.folder.mkdir(exist_ok=True)
            tensorboard_trace_handler(str(self.folder), f"steps_{self.first + 1}_to_{step}", use_gzip=True)(ended)
        except OSError as error:
            where = f"the trace cannot be written: {error}"
        rows = table(spent(ended.events(), count, seconds))
        title = f"steps {self.first + 1} to {step} took {1e3 * seconds / count:.1f} ms each while recorded; {where}"
        self.tell("\n  ".join([title, *rows]))


def spent(events: Iterable[Any], steps: int, seconds: float) -> Iterator[tuple[str, ...]]:
    """Yield rows of what a step's time is spent on; each moment counts for the first row that it fits.

    Args:
        events: the profiler's, with names and times in microseconds
        steps: the steps that were profiled
        seconds: the time that they took
    """
    events, seen, before = list(events), list[tuple[float, float]](), 0.0
    yield "what", "ms a step", "share", "calls a step"
    for what, fits in [*KINDS.items(), ("Python and launches, between these", None)]:
        found = [event for event in events if fits and fits(event)]
        seen += [(event.time_range.start, event.time_range.end) for event in found]
        covered = _covered(seen) / 1e6 if fits else max(seconds, before)
        own, before = covered - before, covered
        yield what, f"{1e3 * own / steps:.2f}", f"{own / seconds:.1%}", f"{len(found) / steps:g}" if fits else ""


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of some spans."""
    length, end = 0.0, -float("inf")
    for start, stop in sorted(spans):
        length, end = length + max(0.0, stop - max(start, end)), max(end, stop)
    return length


def _reduces(event: Any) -> bool:
    return event.name.startswith(("gloo:", "nccl:", "c10d::", "ncclDevKernel"))


KINDS: dict[str, Callable[[Any], bool]] = {
    DATA: lambda event: event.name == DATA,
    LOG: lambda event: event.name == LOG,
    "optimizer": lambda event: event.name.startswith("Optimizer."),
    "host waits for the device": lambda event: event.name in SYNCHRONIZING,
    "compute": lambda event: (
        not _reduces(event) and (event.name.startswith("aten::") or event.device_type == DeviceType.CUDA)
    ),
    "all-reduce, beside no computation": _reduces,
}
