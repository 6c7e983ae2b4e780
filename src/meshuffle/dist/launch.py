"""Start ranks by torchrun's elastic launcher on this host, and say plainly how they ended."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from meshuffle.errors import Interrupted, MeshuffleError, RankFailed

_SAVE_TIMEOUT_S = 600


def be_a_good_neighbour() -> None:
    """Let OpenMP threads sleep while they wait; call it before torch is imported.

    By default they spin, which on cores that others use too slows a step several times
    (measured: 12 against 109 images/s beside a busy process, no loss on an idle machine that
    the noise would show).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.update(environment or {})
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_TIMEOUT_S))
    # Its log repeats, with a traceback, what the error below says in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except SignalException as stopped:
        raise Interrupted("stopped; the run was saved", int(stopped.sigval)) from None
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        raise _as_error(rank, num_ranks, failure) from None


def _as_error(rank: int, num_ranks: int, failure: object) -> MeshuffleError:
    """Turn torchrun's record of a rank's failure into the error that the caller shows."""
    exit_code: int = getattr(failure, "exitcode", 1)
    data = getattr(failure, "error_file_data", None) or {}
    message = data.get("message", "") if isinstance(data, dict) else ""
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    if exit_code < 0 or not text:
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with {exit_code}"
        text = f"rank {rank} of {num_ranks} {how}; its last lines stand above"
    error = RankFailed(text)
    error.exit_code = exit_code if exit_code > 0 else 1
    return error


def record_failure(error: BaseException) -> None:
    """Leave `error` where the launcher of this rank will find it; does nothing without one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    import json
    import time

    expected = isinstance(error, MeshuffleError)
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    record = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
    Path(path).write_text(json.dumps({"message": record}))
