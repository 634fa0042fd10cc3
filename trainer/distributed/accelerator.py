"""accelerate's Accelerator, with the run's precision, timeouts and memory settings."""

import ctypes
import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DynamoBackend

from trainer.distributed.rendezvous import INIT_METHOD
from trainer.precision import check_precision, choose_precision, has_gpu

# All processes compute the same buffers (spectral norm's), so that none is sent.
DDP_SETTINGS = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def make_accelerator(precision: str | None, timeout: int, deterministic: bool, run_dir: Path) -> Accelerator:
    """Return an accelerator of the launcher's processes and device.

    Args:
        precision: trainer.precision
        timeout: trainer.timeout in seconds
        deterministic: trainer.deterministic
        run_dir: where NCCL writes what hung

    Raises:
        ValueError: a CPU would have fp16, the launcher compiles, or accelerate does not see all of its processes.
    """
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # accelerate does not pass on its successor, forward_sync_buffers, yet.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
    # The stride of a dimension of size 1 means nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    _set_cuda_environment(deterministic, run_dir)
    if not has_gpu():
        keep_freed_memory()
    # NCCL's watchdog aborts a process: let the timeout of ranks.py, which names the missing process, come first.
    patience = 2 if has_gpu() else 1
    waiting = InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timedelta(seconds=patience * timeout))
    accelerator = Accelerator(mixed_precision=choose_precision(precision), kwargs_handlers=[DDP_SETTINGS, waiting])
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "the launcher's --dynamo_backend would also compile the passes of gradient penalties, which cannot be: "
            "use --dynamo_backend no and --trainer.compile true"
        )
    _check_sees_all(accelerator)
    check_precision(accelerator.mixed_precision, accelerator.device.type, precision)
    return accelerator


def command_accelerator(timeout: timedelta) -> Accelerator:
    """Return an accelerator of a command's processes, which use a trained system in float32.

    Args:
        timeout: how long a process waits for another

    Raises:
        ValueError: accelerate does not see all of the launcher's processes.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timeout)])
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    _check_sees_all(accelerator)
    return accelerator


def _check_sees_all(accelerator: Accelerator) -> None:
    """Raise ValueError if accelerate does not see all processes of the launcher."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes, but each would work alone: for CPU processes set "
            "ACCELERATE_USE_CPU=true before `accelerate launch --multi_gpu`"
        )


def _set_cuda_environment(deterministic: bool, run_dir: Path) -> None:
    if deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{run_dir}/nccl_rank_")


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees: to get it back from the kernel takes up to a fifth of a step.

    malloc's thresholds in the environment win (MALLOC_MMAP_THRESHOLD_=65536 saves memory).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    set_before = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if mallopt and not set_before and "malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older versions accept
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
