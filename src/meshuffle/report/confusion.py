"""The confusion of a classifier, for its report: the matrix or the worst pairs, and per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshuffle.files import write_bytes
from meshuffle.infer.evaluate import Evaluation
from meshuffle.report import page
from meshuffle.report.page import text
from meshuffle.report.plots import draw_confusion
from meshuffle.tasks.base import Rows

MAX_MATRIX_CLASSES = 40
_MAX_ROWS = 20


def confusion_section(evaluation: Evaluation, names: tuple[str, ...], folder: Path) -> str:
    """Return the section's content; a matrix is also written to `folder`. Nothing of nothing."""
    if not evaluation.num_samples:
        return ""
    counts = confusion(evaluation.rows, len(names))
    if len(names) > MAX_MATRIX_CLASSES:
        left = _confused_pairs(counts, names)
    else:
        short = [page.printable(name)[:24] for name in names]
        write_bytes(folder / "confusion.png", draw_confusion(counts, short))
        left = _matrix(counts, names)
    return f'<div class="pair"><div>{left}</div><div>{_per_class(counts, names)}</div></div>'


def _matrix(confusion: np.ndarray, names: tuple[str, ...]) -> str:
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    levels = np.ceil(9 * np.sqrt(shares)).astype(int)
    rows = []
    for row, name in enumerate(names):
        cells = "".join(
            f'<td class="{"h" if row == column else "m"}{levels[row, column]}">{count}</td>'
            if count
            else "<td></td>"
            for column, count in enumerate(confusion[row].tolist())
        )
        rows.append(f'<tr><th scope="row" title="{text(name)}">{text(name)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in names)
    is_wide = len(names) > 15
    kind = " wide" if is_wide else ""
    kind += " tall" if max(map(len, names)) > (2 if is_wide else 4) else ""
    return (
        '<h3>Rows: true. Columns: predicted.</h3><div class="scroll">'
        f'<table class="matrix{kind}"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _confused_pairs(confusion: np.ndarray, names: tuple[str, ...]) -> str:
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    totals = confusion.sum(1)
    order = np.argsort(-errors, axis=None, kind="stable")[:_MAX_ROWS]
    pairs = [divmod(int(flat), len(names)) for flat in order]
    rows = [
        (
            text(names[i]),
            text(names[j]),
            f"{errors[i, j]:,}",
            page.percent(errors[i, j] / totals[i]),
        )
        for i, j in pairs
        if errors[i, j]
    ]
    head = ("true", "predicted", "images", "of the class")
    title = f"<h3>Most confused pairs of {len(names):,} classes</h3>"
    return title + (page.table(head, rows, 2) if rows else '<p class="note">none</p>')


def _per_class(confusion: np.ndarray, names: tuple[str, ...]) -> str:
    totals, hits = confusion.sum(1), confusion.diagonal()
    present = np.flatnonzero(totals)
    shares = hits[present] / totals[present]
    order = np.argsort(shares, kind="stable")
    rows = [
        (
            text(names[present[k]]),
            f'<div class="bar"><i style="width:{100 * shares[k]:.1f}%"></i></div>',
            f"{100 * shares[k]:.1f} %",
            f"{hits[present[k]]:,} / {totals[present[k]]:,}",
        )
        for k in order[:_MAX_ROWS]
    ]
    notes = []
    if rest := len(present) - len(rows):
        notes.append(f"{rest:,} more classes at {100 * shares[order[_MAX_ROWS]]:.1f} % or above")
    if absent := len(names) - len(present):
        notes.append(f"{absent:,} classes without images here")
    note = f'<p class="note">{"; ".join(notes)}</p>' if notes else ""
    head = ("class", "", "top-1", "images")
    return f"<h3>Accuracy per class, worst first</h3>{page.table(head, rows, 2)}{note}"


def confusion(rows: Rows, num_classes: int) -> NDArray[np.int64]:
    """Return how often class i (row) was taken for class j (column), int64 (C, C)."""
    flat = rows["labels"] * num_classes + rows["top_classes"][:, 0]
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)
