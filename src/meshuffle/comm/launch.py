"""Start ranks by torchrun's elastic launcher on this host, and say plainly how they ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshuffle.comm.heap import free_memory_bytes
from meshuffle.errors import Interrupted, MeshuffleError, PlanError, RankFailed, in_words

_SAVE_TIMEOUT_S = 600
_RANK_BYTES = 400_000_000  # of a process that has loaded torch, before it has a model
FORCE = "MESHUFFLE_FORCE"
"""Variable that lets ranks start although they may not fit in memory; `--force` sets it."""


def let_threads_sleep() -> None:
    """Let OpenMP threads sleep while they wait; call it before torch is imported.

    By default they spin, which on cores that others use too slows a step several times
    (measured: 12 against 109 images/s beside a busy process, no loss on an idle machine that
    the noise would show).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def require_memory(num_ranks: int) -> None:
    """Refuse to start more processes than fit in the memory that is free on this host.

    Raises:
        PlanError: says what they need, and what is free. Not under `--force`.
    """
    free = free_memory_bytes()
    if os.environ.get(FORCE) == "1" or free is None or num_ranks * _RANK_BYTES <= free:
        return
    needed_gb, each_gb, free_gb = (n / 1e9 for n in (num_ranks * _RANK_BYTES, _RANK_BYTES, free))
    raise PlanError(
        f"{num_ranks} ranks need {needed_gb:.1f} GB of memory before they have a model "
        f"({each_gb:.1f} GB each), and {free_gb:.1f} GB are free on this host; use at most "
        f"{int(free // _RANK_BYTES)} ranks, or --force"
    )


def torchrun(
    module: str,
    arguments: Sequence[str],
    num_ranks: int,
    *,
    threads: int,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `python -m module arguments` as `num_ranks` ranks on this host and wait for them.

    SIGINT and SIGTERM reach the ranks once each; they save and stop, and so does this.

    Args:
        threads: CPU threads of each rank (OMP_NUM_THREADS).
        environment: further variables for the ranks.

    Raises:
        Interrupted: a signal stopped the ranks after they had saved.
        RankFailed: a rank failed; carries the first failure's message and exit code.
    """
    require_memory(num_ranks)
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.update(environment or {})
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_TIMEOUT_S))
    # Its logs repeat, with a traceback, what the error below says in one line.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        with _own_signals():
            elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except SignalException as stopped:
        raise Interrupted("stopped", int(stopped.sigval)) from None
    except ChildFailedError as failed:
        raise _as_error(failed.failures, num_ranks) from None


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Put back the handlers of signals: torchrun leaves its own, which raise an Exception.

    What catches the errors of one case would then take a Ctrl-C behind a launch for one.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def _as_error(failures: Mapping[int, Any], num_ranks: int) -> MeshuffleError:
    """Turn torchrun's record of the ranks' failures into the one error that the caller shows."""
    rank = min(failures, key=lambda r: (_is_consequence(failures[r]), failures[r].timestamp))
    exit_code = failures[rank].exitcode
    if exit_code - 128 in (signal.SIGINT, signal.SIGTERM):  # sent to a rank, which told the others
        return Interrupted("stopped", exit_code - 128)
    text = _record(failures[rank]).get("message", "")
    if exit_code < 0 or not text:
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with {exit_code}"
        text = f"rank {rank} of {num_ranks} {how}"
    error = RankFailed(text)
    error.exit_code = exit_code if exit_code > 0 else 1
    return error


def _is_consequence(failure: Any) -> bool:
    """Whether a rank ended because another had: it said so, or was asked to by torchrun."""
    return failure.exitcode == -signal.SIGTERM or not _record(failure).get("cause", True)


def _record(failure: Any) -> dict[str, Any]:
    """Return what `report_failure` left; empty where the rank could not."""
    data = failure.error_file_data
    message = data.get("message") if isinstance(data, dict) else None
    return message if isinstance(message, dict) else {}


def report_failure(error: Exception) -> int:
    """Leave `error` where the launcher of this rank will find it; returns the exit code."""
    if os.environ.get("MESHUFFLE_DEBUG") == "1":
        traceback.print_exception(error)
    known = isinstance(error, MeshuffleError)
    # What torch says where a rank has gone is no error of a kind of its own.
    lost = isinstance(error, RankFailed) or (not known and "onnection" in str(error))
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now = {"timestamp": str(int(time.time()))}
        record = {"message": in_words(error), "extraInfo": now, "cause": not lost}
        temporary = Path(f"{path}.tmp")  # the launcher may end this rank at any instant
        temporary.write_text(json.dumps({"message": record}))
        temporary.replace(path)
    return error.exit_code if isinstance(error, MeshuffleError) else 1


def end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its launcher dies, even by kill -9."""
    if platform.system() == "Linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
