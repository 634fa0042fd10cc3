"""The profile's table counts each moment once; ranges that cannot be profiled are refused."""

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from trainer.config.settings import TrainerConfig
from trainer.profiler import DATA, LOG, parse_profile, spent


def event(name: str, start: float, end: float, device=DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)


def test_each_moment_counts_for_one_row():
    """Two steps of 10 ms each; an all-reduce runs beside computation for 1 ms, and alone for 2."""
    events = [
        event(DATA, 0, 2000),
        event("aten::conv2d", 2000, 6000),
        event("aten::mkldnn_convolution", 2500, 5000),
        event("some_kernel", 5000, 7000, DeviceType.CUDA),
        event("gloo:all_reduce", 6000, 9000),
        event("Optimizer.step#AdamW.step", 9000, 11000),
        event("aten::_fused_adamw_", 9500, 10500),
        event(LOG, 11000, 15000),
        event("aten::_local_scalar_dense", 12000, 13000),
        event("cudaStreamSynchronize", 15000, 16000),
        event("autograd::engine::evaluate_function: AddBackward0", 16000, 19000),
    ]
    rows = {what: numbers for what, *numbers in spent(events, 2, 0.02)}
    assert rows == {
        "what": ["ms a step", "share", "calls a step"],
        DATA: ["1.00", "10.0%", "0.5"],
        LOG: ["2.00", "20.0%", "0.5"],
        "optimizer": ["1.00", "10.0%", "0.5"],
        "host waits for the device": ["0.50", "5.0%", "1"],
        "compute": ["2.50", "25.0%", "2.5"],
        "all-reduce, beside no computation": ["1.00", "10.0%", "0.5"],
        "Python and launches, between these": ["2.00", "20.0%", ""],
    }


def test_a_range_of_steps():
    assert parse_profile("20:30", 30) == range(20, 30)
    assert parse_profile(None, 30) == range(0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("20", "is no two step numbers"),
        ("a:b", "is no two step numbers"),
        ("-1:5", "is no two step numbers"),
        ("30:20", "contains no step"),
        ("90:101", r"ends after the run's last step \(trainer.steps 100\)"),
    ],
)
def test_ranges_without_a_step_are_refused(given, words):
    with pytest.raises(
        ValueError, match=f"^trainer.profile is '{given}', which {words}.*: expected START:STOP, such as"
    ):
        TrainerConfig(steps=100, profile=given)


def test_long_ranges_are_refused():
    with pytest.raises(ValueError, match="has 101 steps, more than a trace can hold"):
        TrainerConfig(profile="0:101")
