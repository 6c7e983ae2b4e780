"""The end of a run: its best weights are judged, compared with what it began with, and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from meshuffle.comm.group import RankEnv
from meshuffle.data import ImageSource, open_data, relabel
from meshuffle.errors import DataError
from meshuffle.files import write_json
from meshuffle.tasks.card import Card
from meshuffle.train.initial_weights import START
from meshuffle.train.loop import Loop, median_step_ms
from meshuffle.train.step import sum_over_ranks
from meshuffle.weights import load_model, read_weights


def finish(run: Path, loop: Loop, env: RankEnv) -> dict[str, Any]:
    """Evaluate the best weights, write `result.json` and the report; every rank calls it.

    If the run began from other weights, those are evaluated too, on the same images; and both
    on what the other weights had learned from, where that is still there.

    Returns:
        The content of `result.json`.
    """
    state = loop.state
    best, card = load_model(run, model=state.config.model)
    own = {split: loop.data.splits[split] for split in ("val", "test") if split in loop.data.splits}
    asked = {(state.config.data, split): source for split, source in own.items()}
    before = {}
    if (run / START).is_file():
        asked |= _old_split(card, loop)
        state.judge(read_weights(run / START)[0])
        before = {key: loop.evaluate(source).metrics for key, source in asked.items()}
    state.judge(best.state_dict())
    after = {key: loop.evaluate(source) for key, source in asked.items()}
    evaluations = {split: after[state.config.data, split] for split in own}
    result = {
        "task": card.task,
        "splits": {split: e.metrics for split, e in evaluations.items()},
        "num_samples": {split: e.num_samples for split, e in evaluations.items()},
        "compared": [
            {"data": data, "split": split, "before": metrics, "after": after[data, split].metrics}
            for (data, split), metrics in before.items()
        ],
        "best_epoch": state.progress.best_epoch,
        "skipped_inputs": len(state.progress.skipped),
        "skipped": state.progress.skipped,
        "measured_step_ms": median_step_ms(state),
        "seconds": round(state.progress.seconds, 3),
    }
    if env.is_main:
        write_json(run / "result.json", result)
        from meshuffle.report.report import write_report  # matplotlib takes a second or two

        split = list(evaluations)[-1]
        write_report(run, evaluations[split], own[split], card, split=split)
    dist.barrier(loop.control)
    return result


def _old_split(card: Card, loop: Loop) -> dict[tuple[str, str], ImageSource]:
    """Return the split that the weights of `--from` were judged on, where all ranks have it."""
    config = loop.state.config
    if not card.learned or card.learned == config.data:
        return {}
    found: dict[tuple[str, str], ImageSource] = {}
    why = ""
    try:
        old = open_data(card.learned, task=card.task, need=("train", "val"))
        split = "test" if "test" in old.splits else "val"
        found = {(card.learned, split): relabel(old, card.classes).splits[split]}
    except DataError as error:
        why = str(error)
    if sum_over_ranks([float(not found)], loop.exchange)[0]:
        loop.watch.event(f"no comparison on the training data of --from: {why or 'not found'}")
        return {}
    return found
