"""The main path of one rank: from a run folder to its report.

`python -m meshuffle.train.rank RUN` is what torchrun starts.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshuffle.comm.device import pick_device
from meshuffle.comm.exchange import make_exchange
from meshuffle.comm.group import RankEnv, new_group, process_group, rank_env, set_patience
from meshuffle.comm.heap import keep_freed_pages, set_room_apart
from meshuffle.comm.launch import end_with_parent, report_failure
from meshuffle.comm.lost_ranks import record_lost_ranks
from meshuffle.config import TrainConfig, read_config
from meshuffle.data import Data, auto_workers, open_data, prepare_workers, relabel
from meshuffle.errors import Interrupted
from meshuffle.parallel.place import threads_per_rank
from meshuffle.planner.plan import read_plan
from meshuffle.report.record import read_record
from meshuffle.tasks.card import Card
from meshuffle.train.checkpoint.checkpoint import locked
from meshuffle.train.checkpoint.data_record import data_changes, refuse_other_classes
from meshuffle.train.checkpoint.intact import agree_on_checkpoint
from meshuffle.train.finish import finish
from meshuffle.train.initial_weights import START, open_initial_weights
from meshuffle.train.loop import Loop
from meshuffle.train.signals import stop_requests
from meshuffle.train.split import describe_split
from meshuffle.train.state import TrainState, build_model, build_state, make_card
from meshuffle.train.timeline import traced
from meshuffle.train.watch import SilentWatch, Watch, watch_run
from meshuffle.weights import read_weights


def train_rank(run: Path) -> dict[str, Any]:
    """Train as one rank of the plan of `run`, from its newest whole checkpoint if there is one.

    Returns the content of `result.json`, which the main rank also writes.
    """
    keep_freed_pages()
    config, plan = TrainConfig(**read_config(run / "config.toml")), read_plan(run / "plan.json")
    env = rank_env() or RankEnv()
    device = pick_device(config.device, env.local_rank)
    if device.type == "cpu":
        torch.set_num_threads(threads_per_rank(plan, env.local_world))
    with contextlib.ExitStack() as stack:
        stack.enter_context(deterministic_algorithms(config.deterministic))
        unlocked = stack.enter_context(locked(run)) if env.is_main else []
        stop = stack.enter_context(stop_requests())
        group = stack.enter_context(process_group(env, device))
        control = new_group(backend="gloo")
        one_host = env.local_world >= env.world
        found = agree_on_checkpoint(run / "state", env, control)
        exchange = make_exchange(control, torch.device("cpu"), one_host)
        data = open_data(config.data, task=config.task, need=("train", "val"))
        changes: list[str] = []
        if found.folder is not None:
            refuse_other_classes(run, data)
            changes = data_changes(run, data) if env.is_main else []
        workers = config.workers
        if workers is None:
            threads = threads_per_rank(plan, env.local_world) if device.type == "cpu" else 1
            workers = auto_workers(data.splits["train"], env.local_world, threads)
        if workers:
            prepare_workers()
        tensors, card, lines = _start(run, config, data)
        data = relabel(data, card.classes)
        state = build_state(config, plan, card, env, device, group, tensors)
        del tensors
        lines += _ignored(data)
        if found.folder is not None:
            state.restore(found.folder)
            where = f"epoch {state.progress.epoch + 1}, step {state.progress.step}"
            done = "all epochs are done; evaluating again and writing the report"
            resumed = done if state.progress.finished else f"resumed at {where}"
            lines = [*found.lines, resumed, *changes]
        lines += unlocked
        watch = stack.enter_context(_watch(run, state, env))
        lines = [*describe_split(state.model, config, plan), *lines]
        for line in lines:
            watch.event(line)
        loop = Loop(run, state, data, env, control, exchange, watch, stop, workers)
        set_patience(config.timeout)
        set_room_apart()
        with record_lost_ranks(run / "lost", env.rank, env.world, lambda: state.progress.step + 1):
            with traced(loop):
                loop.fit()
            return finish(run, loop, env)


def _ignored(data: Data) -> list[str]:
    """Return what the data's reader decided, and a line about files that are not used or cut."""
    notices = [f"data: {notice}" for notice in data.notices]
    if not data.ignored:
        return notices
    more = f" and {len(data.ignored) - 1} more" if len(data.ignored) > 1 else ""
    return [*notices, f"data: ignored {data.ignored[0]}{more}; `meshuffle data check` lists them"]


def _start(
    run: Path, config: TrainConfig, data: Data
) -> tuple[dict[str, Tensor] | None, Card, list[str]]:
    """Return the weights that a run began from, its card, and lines about what fitted."""
    if not config.from_:
        return None, make_card(config, data), []
    if (run / START).is_file():
        tensors, card = read_weights(run / START)
        assert card is not None, f"{run / START} has no card"
        return tensors, card, list(read_record(run).env.get("from", ()))
    start = open_initial_weights(config, config.model)  # the run's own copy is gone
    card = make_card(config, data, start)
    model, _, lines = build_model(config, card, start)
    return model.state_dict(), card, lines


def _watch(run: Path, state: TrainState, env: RankEnv) -> contextlib.AbstractContextManager[Watch]:
    if not env.is_main:
        return contextlib.nullcontext(SilentWatch())
    progress = state.progress
    quiet = os.environ.get("MESHUFFLE_QUIET_STDOUT") == "1"
    first = {"first_step": progress.step, "first_epoch": progress.epoch + 1}
    return watch_run(run, state.step.task, **first, quiet=quiet)


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool):  # type: ignore[no-untyped-def]
    """Make torch refuse operations that do not repeat, for the length of a `with` block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def main() -> int:
    """Run as one of torchrun's ranks; the exit code says how it ended."""
    end_with_parent()
    try:
        train_rank(Path(sys.argv[1]))
    except Interrupted as stopped:
        return stopped.exit_code
    except Exception as error:  # noqa: BLE001  # the launcher says it, in one line
        return report_failure(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
