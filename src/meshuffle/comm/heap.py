"""How glibc serves and returns the memory of tensors; without effect on other C libraries."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

# The numbers of mallopt(3)'s parameters, from <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_ROOM = {2 << 10: 512, 16 << 10: 256, 120 << 10: 128}  # bytes of a block: how many, 20 MB in all
_BETWEEN = 1100  # above 1032 bytes a freed block joins its neighbours at once


def keep_freed_pages() -> bool:
    """Make glibc keep the big blocks that a training step frees; True where it worked.

    By default glibc serves every activation by `mmap` and gives it back at once, so that each
    step faults all its pages in again (measured: a quarter of a step of ShuffleNet V2 on CPU).
    Call it before the first tensor. Without effect on other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    never_trim, pad_bytes = -1, 64 << 20
    return bool(
        libc.mallopt(_M_MMAP_MAX, 0)
        and libc.mallopt(_M_TRIM_THRESHOLD, never_trim)
        and libc.mallopt(_M_TOP_PAD, pad_bytes)
    )


def return_freed_blocks(least_bytes: int) -> bool:
    """Make glibc return each block of `least_bytes` and more as soon as it is freed.

    By default, once glibc has seen a block freed, it serves blocks of up to 32 MB from the heap and
    keeps them there. Large images leave them unused in pieces (measured at 4096×4096: a fourth of a
    rank's memory, for a sixth of its time), and small blocks that live longer break them up
    (measured: 5 MB for each batch of a loader's worker).

    Returns:
        True where it worked.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, least_bytes))


def set_room_apart() -> bool:
    """Give glibc's heap room of its own for small blocks; True where it worked.

    Where pages stay (`keep_freed_pages`), a small block that outlives a step may lie in the middle
    of a big one that the step has freed. The next step cannot use the big one, and the heap grows.
    glibc takes the smallest free block that is large enough: so some blocks of each size are freed
    here. A block that stays lies between any two of them, or they would become one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    room = []
    for size, count in _ROOM.items():
        for _ in range(count):
            room.append(libc.malloc(size))
            libc.malloc(_BETWEEN)
    for block in room:
        libc.free(block)
    return True


def free_memory_bytes() -> int | None:
    """Return the memory that new processes can have on this host; None where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
