"""What the report shows of one task alone; a task without an entry shows its metrics and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meshuffle.infer.evaluation import Evaluation
from meshuffle.report.confusion import confusion_of
from meshuffle.report.page import thumbnail
from meshuffle.tasks.base import Task
from meshuffle.tasks.generate import SHOWN, sheet


@dataclass(frozen=True)
class Section:
    """A section of the page; `kind` says how the template shows `content`."""

    title: str
    kind: Literal["confusion", "picture"]
    content: Any


def sections_of(task: Task, evaluation: Evaluation, folder: Path, where: str) -> Iterator[Section]:
    """Yield the sections that the task has of its own.

    Args:
        folder: takes the pictures of the report as files.
        where: for example ` on the test split`, for a title.
    """
    if task.name in _SECTIONS:
        yield from _SECTIONS[task.name](task, evaluation, folder, where)


def _confusion(task: Task, evaluation: Evaluation, folder: Path, where: str) -> Iterator[Section]:
    names = tuple(task.card.titles.get(name, name) for name in evaluation.classes)
    yield Section(f"Confusion{where}", "confusion", confusion_of(evaluation, names, folder))


def _generated(task: Task, evaluation: Evaluation, folder: Path, where: str) -> Iterator[Section]:
    if evaluation.num_samples:
        drawn = sheet(evaluation.rows["samples"][:SHOWN])
        yield Section("Generated images", "picture", thumbnail(drawn, 640))


_SECTIONS: Mapping[str, Callable[[Task, Evaluation, Path, str], Iterator[Section]]] = {
    "classify": _confusion,
    "generate": _generated,
}
