"""Evaluate weights on a data set, and predict what is in images; see `rank.py` for the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from meshuffle.data import decode_image
from meshuffle.data.scan import image_files
from meshuffle.errors import DataError
from meshuffle.infer.evaluation import Evaluation
from meshuffle.infer.rank import Question, answer
from meshuffle.models.given import given
from meshuffle.planner.plan import parse_plan
from meshuffle.tasks import make_task
from meshuffle.tasks.base import Task
from meshuffle.weights import find_weights, open_weights


def evaluate(
    target: Path,
    *,
    data: str | None = None,
    split: str | None = None,
    batch: int = 64,
    model: nn.Module | str | None = None,
    plan: str = "dp=1",
) -> tuple[Evaluation, str]:
    """Evaluate the weights of `target`; returns the evaluation and `DATA split`.

    Args:
        target: a run folder or a weights file.
        data: DATA; None is the one that the weights were trained on. All of another folder that
            has no splits is evaluated, as its train split.
        split: None is test where the data has one, else val.
        batch: images at a time, over all ranks.
        model: a name, or the module object that was trained.
        plan: how to spread the work; where a launcher has started ranks, those of the plan.

    Raises:
        DataError: no such split, or none of its images can be read; RunError: no such weights;
            PlanError: nothing can be split so.
    """
    with given(model) as name:
        found, what = answer(Question(str(target), name, batch, data, split), parse_plan(plan))
    if not found.num_samples:
        reason = f"; the first: {found.skipped[0]}" if found.skipped else ""
        raise DataError(f"{what}: none of its images could be read{reason}")
    return found, what


def predict(
    target: Path,
    images: Sequence[Path],
    *,
    batch: int = 64,
    model: nn.Module | str | None = None,
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
    paths = [str(path) for path in image_files(images)]
    with given(model) as name:
        found, _ = answer(Question(str(target), name, batch, files=paths), parse_plan(plan))
        task = make_task(open_weights(target, name).card)
    rows = {int(index): row for row, index in enumerate(found.indices)}
    return [_prediction(task, path, rows.get(i), found, pictures) for i, path in enumerate(paths)]


def _prediction(
    task: Task, path: str, row: int | None, found: Evaluation, pictures: Path | None
) -> dict[str, Any]:
    if row is None:
        error = next(text for text in found.skipped if text.startswith(f"{path}: "))
        return {"file": path, "error": error}
    image = decode_image(path)
    prediction = {"file": path, **task.prediction(found.rows, row, image.size)}
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        prediction["picture"] = str(pictures / f"{row:05d}-{Path(path).stem}.png")
        task.picture(image, found.rows, row).save(prediction["picture"])
        if (mask := task.mask(found.rows, row, image.size)) is not None:
            prediction["mask"] = prediction["picture"].removesuffix(".png") + "-mask.png"
            mask.save(prediction["mask"])
    return {**prediction, "text": task.sentence(prediction)}
