"""`torchrun` for tests: ranks are forked from a process that has loaded `tests/forked.py`.

A rank that Python starts anew takes five seconds for its imports, and five for its first capture.
`tests/comm/test_launch.py` and tests with the fixture `real_torchrun` use the real one.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import meshuffle.infer.rank
import meshuffle.train.candidates
import meshuffle.train.launch
import meshuffle.verify.api
from meshuffle.comm import launch
from meshuffle.report import report
from tests.ranks import free_port

LAUNCHERS = (
    meshuffle.infer.rank,
    meshuffle.train.candidates,
    meshuffle.train.launch,
    meshuffle.verify.api,
)
"""The modules that start ranks."""
WRITE_REPORT = report.write_report
_GRACE_S = 10


def no_report(*_: Any, **__: Any) -> None:
    """Takes the place of `write_report`, also in the ranks."""


def forked_torchrun(
    module: str,
    arguments: Sequence[str],
    num_ranks: int,
    *,
    threads: int,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Do what `meshuffle.comm.launch.torchrun` does, with the same errors."""
    common = {
        **os.environ,
        **(environment or {}),
        "OMP_NUM_THREADS": str(threads),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{rank}.json") for rank in range(num_ranks)]
        processes = [
            context.Process(
                target=_rank,
                args=(
                    module,
                    list(arguments),
                    threads,
                    str(Path.cwd()),
                    report.write_report is no_report,
                    common
                    | {"RANK": str(r), "LOCAL_RANK": str(r), "TORCHELASTIC_ERROR_FILE": files[r]},
                ),
            )
            for r in range(num_ranks)
        ]
        for process in processes:
            process.start()
        failed: list[int] = []
        while not failed and any(p.exitcode is None for p in processes):
            time.sleep(0.005)
            failed = [rank for rank, p in enumerate(processes) if p.exitcode]
        _end(processes)
        failures = {
            rank: ProcessFailure(rank, processes[rank].pid, processes[rank].exitcode, files[rank])
            for rank in failed or [r for r, p in enumerate(processes) if p.exitcode]
        }
        if failures:
            raise launch._as_error(failures, num_ranks)


def _end(processes: Sequence[mp.Process]) -> None:
    """Stop the ranks that are left, as torchrun does where one has failed."""
    if any(p.exitcode for p in processes):
        for process in processes:
            process.terminate()
    until = time.monotonic() + _GRACE_S
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
        if process.exitcode is None:
            process.kill()
        process.join()


def _rank(
    module: str,
    arguments: list[str],
    threads: int,
    folder: str,
    without_report: bool,
    environment: dict[str, str],
) -> None:
    if without_report:
        report.write_report = no_report
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(threads)
    sys.argv = [module, *arguments]
    sys.path[:0] = [p for p in os.environ.get("PYTHONPATH", "").split(":") if p not in sys.path]
    name = f"{module}.__main__" if hasattr(import_module(module), "__path__") else module
    sys.exit(import_module(name).main())
