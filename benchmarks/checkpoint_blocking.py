"""How long training stands still for a checkpoint: written in the loop, and beside it.

    python benchmarks/checkpoint_blocking.py [--model shufflenet_v2_x2_0] [--rounds 9]

One process, AdamW, float32. In turn: a save that the loop waits for, as it was before, and one that
a thread writes; and steps alone and beside a write. Also what the checksums take: to make them (in
the thread), and to verify them when a run is continued. Prints medians and appends to
results/checkpoint_blocking.csv.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meshuffle.comm.group import RankEnv, process_group
from meshuffle.comm.heap import keep_freed_pages
from meshuffle.config import TrainConfig
from meshuffle.data import AugmentConfig, Batch, Preprocess
from meshuffle.planner.plan import Plan
from meshuffle.tasks.card import Card
from meshuffle.train.checkpoint.checksums import write_checksums
from meshuffle.train.checkpoint.intact import find_checkpoint
from meshuffle.train.checkpoint.saver import Saver
from meshuffle.train.defaults import resolve
from meshuffle.train.state import TrainState, augment_values, build_state
from rows import append
from train_throughput import cpu_features

CLASSES, SIZE = 1000, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="shufflenet_v2_x2_0")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_pages()  # as training does
    with process_group(RankEnv(), torch.device("cpu")) as group, Saver() as saver:
        state = make_state(options.model, options.batch, group)
        with tempfile.TemporaryDirectory() as run:
            row = {"date": datetime.date.today().isoformat(), "model": options.model}
            row |= measure(state, saver, Path(run), options)
    row |= {
        "threads": options.threads,
        "torch": torch.__version__,
        "machine": cpu_features(),
        "load": round(os.getloadavg()[0], 2),
    }
    for key, value in row.items():
        print(f"{key:<20}{value}")
    append("checkpoint_blocking", [row])


def make_state(model: str, batch: int, group: Any) -> TrainState:
    config = TrainConfig(data="-", model=model, batch=batch, optimizer="adamw")
    config = resolve(config, 1_281_167, SIZE, augment_values(AugmentConfig()))
    card = Card(model, tuple(map(str, range(CLASSES))), Preprocess.imagenet(SIZE))
    return build_state(config, Plan(), card, RankEnv(), torch.device("cpu"), group)


def measure(
    state: TrainState, saver: Saver, run: Path, options: argparse.Namespace
) -> dict[str, Any]:
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        times.setdefault(name, []).append(1000 * (time.perf_counter() - began))

    def save() -> None:
        state.progress.step += 1
        state.save(run, saver, write=True)

    def step() -> None:
        train_step(state, options.batch)

    step()  # the optimiser's moments exist from here on
    for _ in range(options.rounds):
        timed("in_the_loop_ms", lambda: (save(), saver.wait()))
        timed("beside_it_ms", save)
        saver.wait()
        timed("step_ms", step)
        save()
        timed("step_beside_ms", step)
        saver.wait()
        folder = find_checkpoint(run / "state").folder
        assert folder is not None
        timed("make_checksums_ms", lambda folder=folder: write_checksums(folder))
        timed("verify_ms", lambda: find_checkpoint(run / "state"))
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    tensors = state.tensors()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    facts = {"num_tensors": len(tensors), "state_mb": round(num_bytes / 1e6, 1)}
    ratio = medians["in_the_loop_ms"] / medians["beside_it_ms"]
    return facts | medians | {"times_shorter": round(ratio, 1), "rounds": options.rounds}


def train_step(state: TrainState, batch: int) -> None:
    state.model.train()
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)
    labels, none = torch.randint(0, CLASSES, (batch,)), torch.zeros(batch, dtype=torch.int64)
    own = Batch(images, labels, none, none, torch.arange(batch), skipped=[])
    state.step.run([own], [batch], 1e-3)


if __name__ == "__main__":
    main()
