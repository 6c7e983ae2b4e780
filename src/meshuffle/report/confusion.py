"""The confusion of a classifier, for its report: the matrix or the worst pairs, and per class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshuffle.files import write_bytes
from meshuffle.infer.evaluation import Evaluation
from meshuffle.report import page
from meshuffle.report.plots import draw_confusion
from meshuffle.tasks.base import Rows

MAX_MATRIX_CLASSES = 40
_MAX_ROWS = 20


@dataclass(frozen=True)
class Confusion:
    """What the section shows.

    Attributes:
        names: of the classes.
        matrix: for each true class, (count, shade) of each predicted one; of few classes alone.
        pairs: of many classes, (true, predicted, images, share) of the most frequent mistakes.
        per_class: (name, percent, images), the worst class first.
        style: CSS classes of the matrix.
    """

    names: tuple[str, ...]
    matrix: list[tuple[str, list[tuple[int, str]]]] | None
    pairs: list[tuple[str, str, str, str]] | None
    per_class: list[tuple[str, str, str]]
    note: str
    style: str


def confusion_of(evaluation: Evaluation, names: tuple[str, ...], folder: Path) -> Confusion | None:
    """Return what the section shows; a matrix is also drawn into `folder`. None of no samples."""
    if not evaluation.num_samples:
        return None
    counts, is_large = confusion(evaluation.rows, len(names)), len(names) > MAX_MATRIX_CLASSES
    if not is_large:
        short = [page.printable(name)[:24] for name in names]
        write_bytes(folder / "confusion.png", draw_confusion(counts, short))
    is_wide = len(names) > 15
    style = " wide" if is_wide else ""
    style += " tall" if max(map(len, names)) > (2 if is_wide else 4) else ""
    per_class, note = _per_class(counts, names)
    return Confusion(
        names,
        matrix=None if is_large else _shaded(counts, names),
        pairs=_confused_pairs(counts, names) if is_large else None,
        per_class=per_class,
        note=note,
        style=style,
    )


def confusion(rows: Rows, num_classes: int) -> NDArray[np.int64]:
    """Return how often class i (row) was taken for class j (column), int64 (C, C)."""
    flat = rows["labels"] * num_classes + rows["top_classes"][:, 0]
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def _shaded(
    counts: NDArray[np.int64], names: tuple[str, ...]
) -> list[tuple[str, list[tuple[int, str]]]]:
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    levels = np.ceil(9 * np.sqrt(shares)).astype(int).tolist()
    return [
        (
            names[i],
            [(count, f"{'h' if i == j else 'm'}{levels[i][j]}") for j, count in enumerate(row)],
        )
        for i, row in enumerate(counts.tolist())
    ]


def _confused_pairs(
    counts: NDArray[np.int64], names: tuple[str, ...]
) -> list[tuple[str, str, str, str]]:
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    totals = counts.sum(1)
    order = np.argsort(-errors, axis=None, kind="stable")[:_MAX_ROWS]
    pairs = [divmod(int(flat), len(names)) for flat in order]
    return [
        (names[i], names[j], f"{errors[i, j]:,}", page.percent(errors[i, j] / totals[i]))
        for i, j in pairs
        if errors[i, j]
    ]


def _per_class(
    counts: NDArray[np.int64], names: tuple[str, ...]
) -> tuple[list[tuple[str, str, str]], str]:
    totals, hits = counts.sum(1), counts.diagonal()
    present = np.flatnonzero(totals)
    shares = hits[present] / totals[present]
    order = np.argsort(shares, kind="stable")
    rows = [
        (
            names[present[k]],
            f"{100 * shares[k]:.1f}",
            f"{hits[present[k]]:,} / {totals[present[k]]:,}",
        )
        for k in order[:_MAX_ROWS]
    ]
    notes = []
    if rest := len(present) - len(rows):
        notes.append(f"{rest:,} more classes at {100 * shares[order[_MAX_ROWS]]:.1f} % or above")
    if absent := len(names) - len(present):
        notes.append(f"{absent:,} classes without images here")
    return rows, "; ".join(notes)
