"""The process that others are forked from: it has loaded what they need, and started no thread.

Nothing here imports torch, so that the server's imports and ours can go on side by side.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext


def fork_server(module: str) -> ForkServerContext:
    """Start it, where there is none yet, and return the context that forks from it.

    Ctrl-C is blocked in it, and so in those that it forks, from birth: who started it decides.

    Args:
        module: what it loads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    resource_tracker.ensure_running()  # its own start would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
