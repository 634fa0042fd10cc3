"""The precision in which networks compute."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import parse_flag_from_env


def check_precision(precision: str, device: str, asked: str | None) -> None:
    """Refuse fp16 on a CPU; `asked` is trainer.precision.

    Raises:
        ValueError: names the setting.
    """
    if precision == "fp16" and device == "cpu":
        source = "trainer.precision" if asked else "the launcher's --mixed_precision"
        raise ValueError(f"{source} is fp16, which a CPU would silently train in fp32: use bf16 or no")


def choose_precision(asked: str | None) -> str:
    """Return trainer.precision, or the launcher's unless that is "no", its default, or bf16 on a GPU that has it."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked or launched != "no":
        return asked or launched
    return "bf16" if has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def has_gpu() -> bool:
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def cpu_has_bf16() -> bool:
    """Return whether oneDNN, by which torch convolves on CPUs, has bf16 on this one; of x86, AVX-512 has it."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def strict_fp32(device: torch.device) -> Iterator[None]:
    """A context for strict float32: autocast and TF32 off, deterministic cuDNN."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
