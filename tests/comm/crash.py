"""What `test_launch.py` starts as ranks: `python -m tests.comm.crash HOW`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from meshuffle.comm.exchange import SharedExchange
from meshuffle.comm.group import RankEnv, process_group, rank_env
from meshuffle.comm.launch import end_with_parent, report_failure
from meshuffle.errors import DataError


def fail(how: str, env: RankEnv) -> None:
    if how == "wait":
        Path(sys.argv[2], f"{env.rank}.pid").write_text(str(os.getpid()))
        time.sleep(120)
    if env.rank != 1:
        return
    if how == "input":
        raise DataError("photos: no such\nfolder")
    if how == "fault":
        raise ZeroDivisionError("by zero\nin two lines")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit(7)
    if how == "term":
        sys.exit(143)


def main() -> int:
    end_with_parent()
    how, env = sys.argv[1], rank_env()
    assert env is not None
    try:
        with process_group(env, torch.device("cpu")) as group:
            exchange = SharedExchange(group)
            fail(how, env)
            if how == "threads":
                Path(sys.argv[2], str(env.rank)).write_text(os.environ["OMP_NUM_THREADS"])
            exchange.all_gather(torch.zeros(1))  # rank 1 does not come
            dist.barrier(group)
    except Exception as error:  # noqa: BLE001
        return report_failure(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
