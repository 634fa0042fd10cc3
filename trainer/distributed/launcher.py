"""What the launcher's environment says about this process."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher is gone, so that none of its ranks outlives it.

    Until the run has begun, this process ends then; later it saves and leaves.
    """
    if "LOCAL_RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return  # started from a shell, which it may outlive
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def is_local_main() -> bool:
    """Whether this process is the launcher's local rank 0, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_single_machine() -> bool:
    """Whether all processes of this one's world are here."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "1")
