"""The one file that names devices.

Everything else asks here: which device a rank computes on, which backend carries its
collectives, and what a device's out-of-memory error looks like.
"""

from __future__ import annotations

import contextlib
import os
import platform
from contextlib import AbstractContextManager
from typing import Literal

import torch

from meshuffle.errors import ConfigError

Precision = Literal["float32", "bf16"]


def num_accelerators() -> int:
    """Return how many accelerators of one kind this host has; 0 means CPU only."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return 1 if torch.backends.mps.is_available() else 0


def num_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(choice: str, num_local_ranks: int = 1) -> str:
    """Return the kind of device, `cpu`, `cuda` or `mps`, that `choice` means on this host.

    Args:
        choice: `auto` (a GPU where there is one), `cpu`, `cuda` or `mps`.
        num_local_ranks: ranks of this host, each of which needs a GPU of its own.

    Raises:
        ConfigError: `choice` names a device that this host does not have, or not so often.
    """
    kind = choice
    if choice == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(kind, True):
        raise ConfigError(f"device '{choice}' is not available on this host; use --device cpu")
    if kind == "cuda" and num_local_ranks > torch.cuda.device_count():
        raise ConfigError(
            f"{num_local_ranks} ranks on this host, which has {torch.cuda.device_count()} GPUs; "
            "use a plan with fewer ranks per host, or --device cpu"
        )
    return kind


def pick_device(choice: str = "auto", local_rank: int = 0) -> torch.device:
    """Return the device of the rank with number `local_rank` on this host.

    Args:
        choice: see `check_device`.
        local_rank: 0 … ranks on this host − 1.

    Raises:
        ConfigError: see `check_device`.
    """
    kind = check_device(choice, local_rank + 1)
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(kind)


def backend_for(device: torch.device) -> str:
    """Return the process-group backend for tensors on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Return the context in which the forward pass runs: bf16 autocast, or nothing."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def inductor_reduces_slowly(device: torch.device) -> bool:
    """Tell whether torch.compile's own reductions lose against ATen's on `device`."""
    return device.type == "cpu"


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on `device` is done (no-op on the CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` is an allocator's way of saying that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text
    )


def release_memory(device: torch.device) -> None:
    """Give cached blocks of `device` back, after an out-of-memory error."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank in bytes: allocator on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def describe(device: torch.device) -> str:
    """Return the name of `device` for people: the GPU's, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()} × {num_cores()}"
    return device.type
