"""What processes hold: the proportional share (PSS) of memory, without the pages of files.

The share of a file's pages grows when another process, which has loaded the same libraries, ends.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_EVERY_S = 0.02


def memory_of(pid: int) -> int:
    """Return bytes; 0 of a process that has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (OSError, ProcessLookupError):
        return 0
    sizes = dict(line.split(":") for line in rollup.splitlines()[1:])
    return 1024 * sum(int(sizes[kind].split()[0]) for kind in ("Pss_Anon", "Pss_Shmem"))


def descendants(pid: int) -> list[int]:
    """Return a process' children, and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def empty_mb() -> float:
    """Return the MB of a process that has imported what `predict` does: Python, PyTorch and us."""
    program = "import meshuffle.infer.predict, time; time.sleep(1)"
    return watched([sys.executable, "-c", program])[2]


def watched(command: Sequence[str]) -> tuple[str, float, float]:
    """Run a command; return what it prints, its seconds, and the MB of its largest process."""
    began, done, peak = time.perf_counter(), threading.Event(), [0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        while not done.wait(_EVERY_S):
            peak[0] = max(peak[0], *map(memory_of, (process.pid, *descendants(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, errors = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(errors)
    return said, round(time.perf_counter() - began, 1), round(peak[0] / 1e6)
