"""Small vectors between ranks, many times a step: what batch norm and the control flow need.

Over a process group each exchange wakes threads in every rank; on a CPU host that costs 0.4 to
4 ms (gloo, measured), times a hundred a step. Ranks of one host therefore write to shared memory
and look until the others have written: a few microseconds. Everywhere else the group is used.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from abc import ABC, abstractmethod
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.comm.group import patience
from meshuffle.errors import RankFailed

_SLOT_BYTES = 1 << 18
_SPINS, _YIELD_S = 300, 0.05


class Exchange(ABC):
    """Gathers a small vector of every rank; all ranks call it in the same order.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        """Return itself: groups and shared memory are not copied."""
        return self

    @abstractmethod
    def all_gather(self, vector: Tensor) -> Tensor:
        """Return (world, n): every rank's `vector` (n,), the same dtype and n on all ranks."""

    def all_sum(self, vector: Tensor) -> Tensor:
        """Return the sum over ranks, added in their order: bit-equal on all of them."""
        return vector if self.world == 1 else self.all_gather(vector).sum(0)


class GroupExchange(Exchange):
    """Over the process group, on its devices."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._group = group

    def all_gather(self, vector: Tensor) -> Tensor:
        """Return (world, n); see `Exchange`."""
        gathered = vector.new_empty(self.world * vector.numel())
        # torch 2.14 warns of the older name
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, vector.contiguous(), group=self._group)
        return gathered.view(self.world, -1)


class SharedExchange(Exchange):
    """Through a memory-mapped file that the ranks of one host share.

    The file holds a counter per rank and two slots per rank. A rank writes exchange number k to
    its slot k mod 2, sets its counter to k, waits for all counters to reach k, and reads. It can
    only write number k + 2 after all counters have reached k + 1, which the others set after they
    had read number k; so nothing is overwritten before it is read. Needs stores that other cores
    see in order (x86). The file has no name any more once all ranks hold it. Beside its counter
    a rank leaves its process id, so that nobody waits for one that has died.

    Args:
        group: ranks of one host; it says how long to wait for the slowest.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.group, self._number = group, 0
        header = 64 * self.world  # one cache line per counter
        size = header + 2 * self.world * _SLOT_BYTES
        path = [_new_file(size) if self.rank == 0 else None]
        dist.broadcast_object_list(path, group_src=0, group=group)
        with Path(path[0] or "").open("r+b") as file:
            self._memory = mmap(file.fileno(), size)
        self._counters = memoryview(self._memory)[:header].cast("q")
        self._counters[8 * self.rank + 1] = os.getpid()
        dist.barrier(group)
        if self.rank == 0:
            Path(path[0] or "").unlink()
        whole = np.frombuffer(self._memory, dtype=np.uint8)
        self._slots = whole[header:].reshape(2, self.world, _SLOT_BYTES)

    def all_gather(self, vector: Tensor) -> Tensor:
        """Return (world, n); see `Exchange`. At most 256 KiB a rank."""
        own = vector.detach().contiguous().numpy().view(np.uint8)
        if own.nbytes > _SLOT_BYTES:
            raise ValueError(f"{own.nbytes} bytes do not fit a slot of {_SLOT_BYTES}")
        self._number += 1
        slot = self._slots[self._number % 2]
        slot[self.rank, : own.nbytes] = own
        self._counters[8 * self.rank] = self._number
        self._wait()
        return torch.from_numpy(slot[:, : own.nbytes].copy()).view(vector.dtype)

    def _wait(self) -> None:
        counters, number = self._counters, self._number
        for other in range(self.world):
            place, spins, began = 8 * other, 0, 0.0
            while counters[place] < number:
                spins += 1
                if spins < _SPINS:
                    continue
                began = began or time.monotonic()
                waited = time.monotonic() - began
                if waited < _YIELD_S:
                    os.sched_yield()
                elif not _alive(counters[place + 1]) and counters[place] < number:
                    raise RankFailed(f"rank {other} of {self.world} has died", "an exchange")
                elif waited < (limit := patience(self.group).total_seconds()):
                    time.sleep(0.0002)
                else:
                    raise RankFailed(
                        f"rank {other} of {self.world} did not answer rank {self.rank} for "
                        f"{limit:.0f} s (exchange {number})",
                        "an exchange",
                    )


def _alive(process: int) -> bool:
    """Whether a process of this host runs; one that has ended may still wait for its parent."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no Linux: there is no telling
        return True
    return state not in "ZX"


def _new_file(size: int) -> str:
    """Make a file of `size` zero bytes in memory where the host has /dev/shm; return its path."""
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    descriptor, path = tempfile.mkstemp(prefix="meshuffle-", dir=folder)
    with os.fdopen(descriptor, "wb") as file:
        file.truncate(size)
    return path


def make_exchange(group: dist.ProcessGroup, device: torch.device, one_host: bool) -> Exchange:
    """Return the fastest exchange for tensors on `device`; `one_host`: all ranks are on it."""
    in_order = platform.machine().lower() in ("x86_64", "amd64")
    if device.type == "cpu" and one_host and in_order and dist.get_world_size(group) > 1:
        return SharedExchange(group)
    return GroupExchange(group)
