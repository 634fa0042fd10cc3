"""Which precision a run takes."""

import pytest

from trainer.precision import choose_precision


@pytest.mark.parametrize(
    ("asked", "launched", "gpu", "has_bf16", "taken"),
    [
        (None, "no", True, True, "bf16"),
        (None, "no", True, False, "no"),
        (None, "no", False, True, "no"),
        (None, "fp16", True, True, "fp16"),
        ("no", "bf16", True, True, "no"),
    ],
)
def test_precision_is_the_one_asked_for_the_launchers_or_what_the_gpu_has(
    monkeypatch, asked, launched, gpu, has_bf16, taken
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_precision(asked) == taken
