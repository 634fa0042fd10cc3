"""What the launcher's environment says about this process."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher ends, so that no process outlives it: see `StopSignal`."""
    if has_launcher():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def has_launcher() -> bool:
    """Return whether a launcher started this process, and no shell."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def import_accelerate() -> None:
    """Import accelerate without boto3, which it uses for SageMaker, and which takes a tenth of a program's start."""
    missing = "boto3" not in sys.modules
    if missing:
        sys.modules["boto3"] = None  # type: ignore[assignment]
    import accelerate  # noqa: F401

    if missing:
        del sys.modules["boto3"]


def is_local_main() -> bool:
    """Return whether this process is local rank 0, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_single_machine() -> bool:
    """Return whether all processes of the run are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "1")
