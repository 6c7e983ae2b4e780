"""What the report shows of one task alone; a task without an entry shows its metrics and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from meshuffle.infer.evaluate import Evaluation
from meshuffle.report.confusion import confusion_section
from meshuffle.report.page import thumbnail
from meshuffle.tasks.base import Task
from meshuffle.tasks.generate import SHOWN, sheet


def sections_of(
    task: Task, evaluation: Evaluation, folder: Path, where: str
) -> Iterator[tuple[str, str]]:
    """Yield (title, HTML) of the sections that the task of `evaluation` has of its own.

    Args:
        folder: takes the pictures of the report as files.
        where: for example ` on the test split`, for a title.
    """
    if task.name in _SECTIONS:
        yield from _SECTIONS[task.name](task, evaluation, folder, where)


def _confusion(
    task: Task, evaluation: Evaluation, folder: Path, where: str
) -> Iterator[tuple[str, str]]:
    names = tuple(task.card.titles.get(name, name) for name in evaluation.classes)
    yield f"Confusion{where}", confusion_section(evaluation, names, folder)


def _generated(
    task: Task, evaluation: Evaluation, folder: Path, where: str
) -> Iterator[tuple[str, str]]:
    if evaluation.num_samples:
        drawn = sheet(evaluation.rows["samples"][:SHOWN])
        picture = f'<div class="made"><img src="{thumbnail(drawn, 640)}" alt=""></div>'
        yield "Generated images", picture


_SECTIONS: Mapping[str, Callable[[Task, Evaluation, Path, str], Iterator[tuple[str, str]]]] = {
    "classify": _confusion,
    "generate": _generated,
}
