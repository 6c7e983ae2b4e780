"""Start ranks by torchrun on this host, and say plainly how they ended.

This file imports no torch: the process that launches stays small and starts fast.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from meshuffle.errors import Interrupted, RankFailed

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def torchrun(
    module: str,
    arguments: Sequence[str],
    num_ranks: int,
    *,
    threads: int,
    quiet_ranks: bool = True,
) -> None:
    """Run `python -m module arguments` as `num_ranks` ranks on this host and wait for them.

    SIGINT and SIGTERM are passed on; the ranks save and stop, and so does this.

    Args:
        threads: CPU threads of each rank (OMP_NUM_THREADS).
        quiet_ranks: show torchrun's own log only where it is an error.

    Raises:
        Interrupted: a signal stopped the ranks after they had saved.
        RankFailed: a rank ended otherwise than by success; its own message is above.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command += [f"--nproc-per-node={num_ranks}", sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if quiet_ranks:
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        environment.setdefault("LOGLEVEL", "CRITICAL")
    # A session of its own: Ctrl-C reaches the ranks once, from here, and not from the terminal too.
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    with _forward_signals(child) as received:
        code = child.wait()
    if received:
        raise Interrupted("stopped; the run was saved", received[0])
    if code:
        raise RankFailed(f"{num_ranks} ranks of {module}: a rank failed; its message stands above")


@contextmanager
def _forward_signals(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in _STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
