"""The process that replicas are forked from. It has loaded what they need, once for all.

Nothing here imports torch, so that the server's imports and ours go on side by side.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker


def start_fork_server() -> None:
    """Start it, where there is none yet; a Ctrl-C that is meant for us does not end it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["meshuffle.deploy.serve.replica"])
    resource_tracker.ensure_running()  # its own start would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
