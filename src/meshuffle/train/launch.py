"""From a run folder to ranks that train: in this process, or started by torchrun."""

from __future__ import annotations

import time
from pathlib import Path

from meshuffle.comm.launch import torchrun
from meshuffle.comm.lost_ranks import ranks_in_words, read_waiting
from meshuffle.errors import Interrupted, RankFailed
from meshuffle.parallel.place import threads_per_rank
from meshuffle.train.checkpoint.checkpoint import recovery_hint
from meshuffle.train.rank import train_rank
from meshuffle.train.run import Prepared


def launch(prepared: Prepared, module: str = "meshuffle.train.rank") -> None:
    """Train: in this process where the plan has one rank, else in ranks started by torchrun."""
    if prepared.plan.num_ranks == 1:
        train_rank(prepared.run)
    else:
        threads, begin = threads_per_rank(prepared.plan), time.time()
        try:
            torchrun(module, [str(prepared.run)], prepared.plan.num_ranks, threads=threads)
        except Interrupted as stopped:
            log = prepared.run / "log.jsonl"
            is_new = log.is_file() and log.stat().st_mtime > begin
            stopped.is_printed = is_new and '"stopped in' in log.read_text()[-999:]
            raise
        except RankFailed as failed:
            raise explained(failed, prepared.run) from None


def explained(failed: RankFailed, run: Path) -> RankFailed:
    """Add to a lost rank's message what the others waited for, and how to go on."""
    waiting = read_waiting(run / "lost")
    if not waiting:
        return failed
    world, step = waiting[0].world, max(each.step for each in waiting)
    silent = sorted(set(range(world)) - {each.rank for each in waiting})
    text = str(failed)
    if silent and all(each.is_late for each in waiting):
        text = f"{ranks_in_words(silent)} of {world} did not answer"
    ops = " and ".join(sorted({each.op for each in waiting}))
    late = ranks_in_words([each.rank for each in waiting])
    longer = RankFailed(
        f"{text}; {late} waited for {ops} at step {step} (see {run / 'lost'}); {recovery_hint(run)}"
    )
    longer.exit_code = failed.exit_code
    return longer
