"""Judge images as the ranks of a plan: replicas see different ones, and all get the whole answer.

Question ──▶ this process, or ranks started by torchrun ──▶ Evaluation

`python -m meshuffle.infer.rank FOLDER` is what torchrun starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meshuffle.comm.device import check_device, pick_device
from meshuffle.comm.group import RankEnv, new_group, process_group, rank_env
from meshuffle.comm.launch import end_with_parent, report_failure, require_memory, torchrun
from meshuffle.data import EvalTransform, ImageSource, auto_workers, eval_loader
from meshuffle.data.annotated import unlabelled
from meshuffle.errors import ConfigError, PlanError
from meshuffle.files import write_json
from meshuffle.infer.evaluation import Evaluation, evaluate_batches
from meshuffle.infer.images import open_split
from meshuffle.infer.replica_batches import broadcast_batches, replica_group
from meshuffle.infer.split import Normalised, own_part
from meshuffle.models.heads import Pooled
from meshuffle.parallel.place import place_of, threads_per_rank
from meshuffle.planner.plan import Plan, read_plan
from meshuffle.planner.schedules import make_schedule
from meshuffle.tasks import make_task
from meshuffle.tasks.base import Task
from meshuffle.tasks.card import Card
from meshuffle.tasks.features import FeatureRows
from meshuffle.weights import load_model


@dataclass(frozen=True)
class Question:
    """What to judge: a split of a data set, or `files`."""

    target: str
    model: str | None
    batch: int
    data: str | None = None
    split: str | None = None
    files: list[str] = field(default_factory=list)
    features: bool = False
    """Compute the features in front of the head, instead of the answer."""


def answer(question: Question, plan: Plan = Plan()) -> tuple[Evaluation, str]:  # noqa: B008
    """Judge in this process, or with the ranks of the plan."""
    env = rank_env()
    _check_plan(plan, question, env)
    if env is not None or plan.num_ranks == 1:
        return judge_rank(question, plan, env or RankEnv())
    with tempfile.TemporaryDirectory(prefix="meshuffle-judge-") as name:
        folder = Path(name)
        write_json(folder / "question.json", dataclasses.asdict(question))
        write_json(folder / "plan.json", plan.to_dict())
        threads = threads_per_rank(plan)
        torchrun("meshuffle.infer.rank", [name], plan.num_ranks, threads=threads)
        found = torch.load(folder / "answer.pt", weights_only=True)
    return Evaluation(**_map_leaves(_to_array, found["evaluation"])), found["what"]


def _map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_leaves(change, inner) for key, inner in value.items()}
    return change(value)


def _to_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _to_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _check_plan(plan: Plan, question: Question, env: RankEnv | None) -> None:
    world = env.world if env else plan.num_ranks
    if plan.num_ranks != world:
        raise PlanError(f"plan {plan} has {plan.num_ranks} ranks, but the launcher started {world}")
    if plan.dp_kind is not None:
        raise PlanError(f"plan {plan}: dp=N:{plan.dp_kind} is for training; use dp={plan.dp}")
    if world > 1 and platform.system() != "Linux":
        raise PlanError(f"plan {plan}: {platform.system()} runs a single rank; use dp=1")
    if question.batch < plan.dp:
        raise PlanError(
            f"plan {plan}: {plan.dp} replicas share a batch of {question.batch}; "
            f"use --batch {plan.dp} or more, or a smaller dp"
        )
    if env is None:
        require_memory(plan.num_ranks)
    make_schedule(plan.pp_kind, plan.pp, plan.num_micro_batches)
    check_device("auto", env.local_world if env else plan.num_ranks)


def judge_rank(question: Question, plan: Plan, env: RankEnv) -> tuple[Evaluation, str]:
    """Judge as one rank of `plan`; every rank returns the whole answer."""
    device = pick_device(local_rank=env.local_rank)
    is_split = plan.is_split
    network, card = load_model(Path(question.target), question.model, mapped=is_split)
    source, what, card = _source(question, card)
    task = make_task(card)
    if question.features:
        network, task = _without_head(network, task)
    if question.files:
        network = task.answering(network)
    else:
        task.require()
    task.check_plan(plan)
    with contextlib.ExitStack() as stack:
        control = None
        if env.world > 1:
            stack.enter_context(process_group(env, device))
            control = new_group(backend="gloo")
        place = place_of(plan, env)
        threads = threads_per_rank(plan, env.local_world) if device.type == "cpu" else 1
        read = partial(
            eval_loader,
            source,
            card.preprocess,
            batch_size=question.batch,
            rank=place.dp_rank,
            world=place.dp,
            num_workers=auto_workers(source, env.local_world, threads),
            dense=task.dense and not question.files,
        )
        batches = broadcast_batches(read, replica_group(place))
        num = max(2, -(-question.batch // plan.dp))  # a captured batch of 1 would stay 1
        example = torch.empty(num, *_input_size(card), device="meta")
        if is_split:
            network, example = Normalised(network, card.preprocess), example.to(torch.uint8)
        judged = own_part(network, example, plan, env, device)
        found = evaluate_batches(
            judged,
            (batch for batch in batches if batch is not None),
            task,
            None if is_split else card.preprocess,
            device,
            labelled=not question.files,
            group=control,
            is_output_rank=place.is_output_rank,
            channels_last=card.channels_last,
        )
    return found, what


def _without_head(network: nn.Module, task: Task) -> tuple[nn.Module, Task]:
    """Return what gives the features in front of the head, and a task that keeps them."""
    if task.dense or task.name == "generate":
        raise ConfigError(f"features: these weights {task.name}; their features are not pooled")
    return Pooled(network), FeatureRows(task.card)


def _input_size(card: Card) -> tuple[int, int, int]:
    return (3, *EvalTransform(card.preprocess).size)


def _source(question: Question, card: Card) -> tuple[ImageSource, str, Card]:
    """Return the images to judge, what they are called, and the card with the classes' names."""
    if question.files:
        return unlabelled(question.files, card.classes), "files", card
    return open_split(question.data, question.split, card)


def main() -> int:
    """Run as one of torchrun's ranks; the exit code says how it ended."""
    end_with_parent()
    folder, env = Path(sys.argv[1]), rank_env() or RankEnv()
    try:
        question = Question(**json.loads((folder / "question.json").read_text()))
        plan = read_plan(folder / "plan.json")
        torch.set_num_threads(threads_per_rank(plan, env.local_world))
        found, what = judge_rank(question, plan, env)
        if env.is_main:
            values = _map_leaves(_to_tensor, vars(found))
            torch.save({"evaluation": values, "what": what}, folder / "answer.pt")
    except Exception as error:  # noqa: BLE001  # the launcher says it, in one line
        return report_failure(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
