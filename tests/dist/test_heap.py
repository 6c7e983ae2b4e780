"""Small blocks do not land in the middle of a big one that is free."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
import torch
from meshuffle.dist.device import keep_freed_pages, set_room_apart

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
