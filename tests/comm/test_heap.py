"""Small blocks do not land in the middle of a big one that is free; big ones are given back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
import torch
from meshuffle.comm.heap import keep_freed_pages, set_room_apart

assert keep_freed_pages()
if sys.argv[1] == "apart":
    assert set_room_apart()
big = torch.empty(64 << 20, dtype=torch.uint8)
first = big.data_ptr()
del big
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
small = [libc.malloc(100 << 10) for _ in range(100)]
print(sum(first <= block < first + (64 << 20) for block in small))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("how", ["apart", "as it is"])
def test_small_blocks_stay_out_of_big_ones(how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) == 0) == (how == "apart")


FREES = """
import sys
import torch
from meshuffle.comm.heap import return_freed_blocks

if sys.argv[1] == "given back":
    assert return_freed_blocks(4 << 20)
sizes = [8 << 20, 16 << 20, 24 << 20]
torch.empty(31 << 20, dtype=torch.uint8)  # freed: from now on glibc keeps smaller ones
blocks = [torch.ones(sizes[i % 3], dtype=torch.uint8) for i in range(12)]
kept = torch.ones(8 << 20, dtype=torch.uint8)  # above them
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
before = anonymous()
blocks.clear()
print(before - anonymous())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("how", ["given back", "as it is"])
def test_big_blocks_are_given_back(how: str) -> None:
    command = [sys.executable, "-c", FREES, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 150_000) == (how == "given back")
