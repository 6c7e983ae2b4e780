"""When a rank dies or hangs: how long the others wait, and what they leave behind.

torch's flight recorder remembers the collectives of every group. A rank that loses the others
writes them to FOLDER/rank-N.json, with the step and the operation that it waited in; the launcher
reads those files to say who did not answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d

from meshuffle.errors import MeshuffleError, RankFailed, in_words

_SIGNS = ("onnection", "imed out", "imeout", "eer ")  # in what gloo and NCCL say of a lost rank


@dataclass(frozen=True)
class Waiting:
    """What a rank was doing when it lost the others."""

    rank: int
    world: int
    op: str
    step: int
    reason: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} of {self.world} lost the others at step {self.step}, waiting for "
            f"{self.op}: {self.reason}"
        )

    @property
    def is_late(self) -> bool:
        """True where the other rank was silent, not gone."""
        return any(sign in self.reason for sign in ("imed out", "imeout", "did not answer"))


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or silent."""
    if isinstance(error, MeshuffleError):
        return isinstance(error, RankFailed)
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def record_lost_ranks(folder: Path, rank: int, world: int, step: Any) -> Iterator[None]:
    """Write down, in a `with` block, what this rank did when it lost the others.

    Args:
        folder: for the files of all ranks; what an earlier start left there goes.
        step: returns the number of the step.

    Raises:
        RankFailed: in place of what torch says of it.
    """
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except Exception as error:
        if not is_lost(error):
            raise
        op = getattr(error, "op", "") or last_op()
        waiting = Waiting(rank, world, op, step(), in_words(error))
        with contextlib.suppress(OSError):
            _write(folder, waiting)
        raise RankFailed(str(waiting)) from error


def last_op() -> str:
    """Return the collective that this rank has asked for last, as torch calls it."""
    entries = _recorded().get("entries") or [{}]
    name = str(entries[-1].get("profiling_name", "a collective"))
    return name.rpartition(":")[2]


def _recorded() -> dict[str, Any]:
    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)  # torch 2.12 on, for gloo
    try:
        return json.loads(dump()) if dump is not None else {}
    except (RuntimeError, ValueError):
        return {}


def _write(folder: Path, waiting: Waiting) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{waiting.rank}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({**vars(waiting), "flight_recorder": _recorded()}))
    temporary.replace(path)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Return ranks as a message names them.

    >>> ranks_in_words([0, 2])
    'ranks 0, 2'
    """
    listed = ", ".join(map(str, ranks[:8])) + (f" … ({len(ranks)})" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def read_waiting(folder: Path) -> list[Waiting]:
    """Return what the ranks wrote, in their order."""
    records = []
    for path in sorted(folder.glob("rank-*.json")):
        with contextlib.suppress(ValueError, KeyError, OSError):
            values = json.loads(path.read_text())
            records.append(Waiting(**{name: values[name] for name in Waiting.__annotations__}))
    return sorted(records, key=lambda waiting: waiting.rank)
