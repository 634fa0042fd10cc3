"""The launcher that this process may have: imported first, and light, so that no moment is without it."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher is gone, so that none of its ranks outlives it.

    Until the run listens to that, this process ends; then it saves and leaves.
    """
    if "LOCAL_RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return  # started from a shell, which it may outlive
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
