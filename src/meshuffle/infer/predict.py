"""Evaluate and predict, on one device or under a plan: replicas see different images.

evaluate, predict ──▶ job ──▶ this process, or ranks started by torchrun ──▶ answer
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from meshuffle.comm.device import check_device, pick_device
from meshuffle.comm.group import RankEnv, new_group, process_group, rank_env
from meshuffle.comm.heap import return_freed_blocks
from meshuffle.comm.launch import end_with_parent, report_failure, torchrun
from meshuffle.data import (
    EvalTransform,
    ImageSource,
    Preprocess,
    auto_workers,
    decode_image,
    eval_loader,
)
from meshuffle.errors import ConfigError, DataError, PlanError
from meshuffle.files import write_json
from meshuffle.infer import evaluate as evaluation
from meshuffle.infer.evaluate import Evaluation
from meshuffle.infer.images import open_split
from meshuffle.infer.replica_batches import replica_group, shared
from meshuffle.models.heads import Pooled
from meshuffle.parallel.build import build
from meshuffle.parallel.place import join_ranks, place_of, threads_per_rank
from meshuffle.planner.plan import Plan, parse_plan, read_plan
from meshuffle.planner.schedules import make_schedule
from meshuffle.tasks import make_task
from meshuffle.tasks.base import Task
from meshuffle.tasks.features import FeatureRows
from meshuffle.train.run import check_splits
from meshuffle.weights import Card, find_weights, load_model, open_weights

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def evaluate(
    target: Path,
    *,
    data: str | None = None,
    split: str | None = None,
    batch: int = 64,
    model: str | None = None,
    plan: str = "dp=1",
) -> tuple[Evaluation, str]:
    """Evaluate the weights of `target`; returns the evaluation and `DATA split`.

    Args:
        target: a run folder or a weights file.
        data: DATA; None is the one that the weights were trained on. All of another folder that
            has no splits is evaluated, as its train split.
        split: None is test where the data has one, else val.
        batch: images at a time, over all ranks.
        plan: how to spread the work; where a launcher has started ranks, those of the plan.

    Raises:
        DataError: no such split; RunError: no such weights; PlanError: nothing can be split so.
    """
    return answer(Question(str(target), model, batch, data, split), parse_plan(plan))


def predict(
    target: Path,
    images: Sequence[Path],
    *,
    batch: int = 64,
    model: str | None = None,
    plan: str = "dp=1",
    pictures: Path | None = None,
) -> list[dict[str, Any]]:
    """Return `{"file"}` and what the task predicts per image, or `{"file", "error"}`.

    A classifier says `label` and `probability`; see `prediction` of each task. `text` is the same
    in words.

    Args:
        target: a run folder or a weights file.
        images: image files, or folders that hold some.
        batch, plan: see `evaluate`.
        pictures: a folder for the images with what was predicted drawn on them; None draws none.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    find_weights(target)  # the run first, if both are wrong
    paths = [str(path) for path in expanded(images)]
    question = Question(str(target), model, batch, files=paths)
    found, _ = answer(question, parse_plan(plan))
    task = make_task(open_weights(target, model)[1])
    rows = {int(index): row for row, index in enumerate(found.indices)}
    return [_prediction(task, path, rows.get(i), found, pictures) for i, path in enumerate(paths)]


def _prediction(
    task: Task, path: str, row: int | None, found: Evaluation, pictures: Path | None
) -> dict[str, Any]:
    if row is None:
        error = next(text for text in found.skipped if text.startswith(f"{path}: "))
        return {"file": path, "error": error}
    image = decode_image(path)
    told = {"file": path, **task.prediction(found.rows, row, image.size)}
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        told["picture"] = str(pictures / f"{row:05d}-{Path(path).stem}.png")
        task.picture(image, found.rows, row).save(told["picture"])
        if (mask := task.mask(found.rows, row, image.size)) is not None:
            told["mask"] = told["picture"].removesuffix(".png") + "-mask.png"
            mask.save(told["mask"])
    return {**told, "text": task.sentence(told)}


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
    """Of files: what the head gets, instead of what it makes of it."""


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
        torchrun(__name__, [name], plan.num_ranks, threads=threads)
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
    make_schedule(plan.pp_kind, plan.pp, plan.num_micro_batches)
    check_device("auto", env.local_world if env else plan.num_ranks)


def judge_rank(question: Question, plan: Plan, env: RankEnv) -> tuple[Evaluation, str]:
    """Judge as one rank of `plan`; every rank returns the whole answer."""
    device = pick_device(local_rank=env.local_rank)
    is_split = plan.tp * plan.pp > 1
    network, card = load_model(Path(question.target), question.model, mapped=is_split)
    source, what, card = _source(question, card)
    task = make_task(card)
    if question.features:
        network, task = _without_head(network, task)
    if question.files:
        network = task.answering(network)
    else:
        task.require()
    check_splits(plan, task)
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
        batches = shared(read, replica_group(place))
        num = max(2, -(-question.batch // plan.dp))  # a captured batch of 1 would stay 1
        example = torch.empty(num, *_input_size(card), device="meta")
        if is_split:
            network, example = Normalised(network, card.preprocess), example.to(torch.uint8)
        judged = own_part(network, example, plan, env, device)
        found = evaluation.evaluate(
            judged,
            (batch for batch in batches if batch is not None),
            task,
            None if is_split else card.preprocess,
            device,
            labelled=not question.files,
            group=control,
            is_output_rank=place.is_output_rank,
        )
    return found, what


def _without_head(network: nn.Module, task: Task) -> tuple[nn.Module, Task]:
    """Return what gives the features in front of the head, and a task that keeps them."""
    if task.dense or task.name == "generate":
        raise ConfigError(f"features: these weights {task.name}; their features are not pooled")
    return Pooled(network), FeatureRows(task.card)


class Normalised(nn.Module):
    """`Preprocess.normalise` in front of a network, so that each rank does its part of that."""

    factor: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.network, self.reverse = network, preprocess.channels == "BGR"
        factor, shift = preprocess.affine()
        self.register_buffer("factor", factor[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return the outputs for uint8 RGB images (N, 3, h, w)."""
        images_NCHW = images_NCHW.flip(1) if self.reverse else images_NCHW
        x_NCHW = torch.addcmul(self.shift, images_NCHW.to(torch.float32), self.factor)
        outputs: Tensor = self.network(x_NCHW)
        return outputs


def own_part(
    network: nn.Module, example: Tensor, plan: Plan, env: RankEnv, device: torch.device
) -> nn.Module:
    """Return this rank's part of a model, for its forward in eval mode.

    Args:
        network: with its weights; it computes no gradients any more.
        example: a replica's batch; only shape and dtype count.
        env: of the ranks that are joined.
    """
    network.eval().requires_grad_(False)
    ranks = join_ranks(plan, env, device)
    if ranks is None:
        return network.to(device)
    if device.type == "cpu":
        return_freed_blocks(4 << 20)  # who splits a network lacks memory rather than time
    alone = dataclasses.replace(plan, dp=1)  # in eval mode replicas share no statistics
    part = build(network, (example,), alone, ranks, device)
    if device.type == "cpu":  # out of the file, which may be written meanwhile
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()
    return part


def _input_size(card: Card) -> tuple[int, int, int]:
    return (3, *EvalTransform(card.preprocess).size)


def _source(question: Question, card: Card) -> tuple[ImageSource, str, Card]:
    """Return the images to judge, what they are called, and the card with the classes' names."""
    if question.files:
        return _Files(tuple(question.files), card.classes), "files", card
    return open_split(question.data, question.split, card)


@dataclass(frozen=True)
class _Files:
    """Images without labels."""

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    in_memory: bool = False

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.zeros(len(self.paths), np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        return decode_image(self.paths[index])

    def target(self, index: int) -> NDArray[Any]:
        return np.zeros((), np.int64)

    def name(self, index: int) -> str:
        return self.paths[index]

    def content(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()


def expanded(paths: Sequence[Path]) -> list[Path]:
    """Return the image files that `paths` mean, folders searched through.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
            if not inside:
                raise DataError(f"{path}: no image in this folder ({', '.join(_IMAGE_SUFFIXES)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return found


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
