"""Tables: a CSV, or a JSON list of objects, with an image and its target in each row."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.annotated import AnnotatedSource, LabelTargets, RowTargets, Targets
from meshuffle.data.base import Data, shortened
from meshuffle.data.entries import (
    SPLITS,
    Problems,
    absent,
    assemble,
    check_filled,
    existing_file,
    only_split,
    split_options,
    stem,
    suffix,
    with_slashes,
)
from meshuffle.data.formats.table_rows import TARGETS, WANTED, Table, read_csv, read_json
from meshuffle.data.image import EXTENSIONS
from meshuffle.data.objects import note_unused, path_table
from meshuffle.data.scan import image_paths
from meshuffle.errors import DataError, did_you_mean

_IMAGE = ("image", "file", "path", "filename", "file_name", "image_path", "filepath")
_SPLIT = ("split",)
_LABEL = ("label", "class")
_LABELS = ("labels",)
_SEPARATORS = ("|", ";")
_INDEX = re.compile(r"(.*[ _])?([Ii]ndex|INDEX|[Ii]d)|.*(Id|ID)")
_MANY = 10  # rows: a few targets may count up by chance
_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class _Known:
    """The classes, labels and targets of all rows, for one task."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    targets: NDArray[Any]


def open_csv(
    path: str, *, task: str = "classify", seed: int = 0, need: Sequence[str] = ("train", "val")
) -> Data:
    """Open a CSV with a header; paths of images are relative to it.

    The image is in the column image, file, path or filename, else in the first; `split` (train,
    val, test) is optional: without it, 20 % chosen by `seed` become val. classify: a column
    `label` or `class`. multilabel: `labels`, names separated by `|` or `;`, or one column of
    0 and 1 per class. regress: every column of numbers. `PATH?targets=a,b` names the columns
    of multilabel or regress. Names of columns match in any case; one of whole
    numbers that is called index, id or nothing, or counts up by 1, numbers the rows and is no
    target. See `read_csv` for separators and encodings.

    Raises `DataError`: the file, and the first bad lines.
    """
    return _open(read_csv, path, task=task, seed=seed, need=need)


def open_json(
    path: str, *, task: str = "classify", seed: int = 0, need: Sequence[str] = ("train", "val")
) -> Data:
    """Open a JSON list of objects, or JSON lines, with the keys of `open_csv`.

    `labels` may be a list; numbers of regress may stand in an object `targets`. Raises
    `DataError`.
    """
    return _open(read_json, path, task=task, seed=seed, need=need)


def _open(
    read: Callable[[Path, Sequence[str], Problems], Table],
    path: str,
    *,
    task: str,
    seed: int,
    need: Sequence[str],
) -> Data:
    head, options = split_options(path, [TARGETS])
    file = existing_file(head)
    chosen = [name.strip() for name in options.get(TARGETS, "").split(",") if name.strip()]
    problems = Problems(str(file))
    table = read(file, chosen, problems)
    if not table.rows:
        problems.raise_any()
        raise DataError(f"{file} holds no row")
    paths = _paths(table)
    split_of_row = _splits(table, need)
    known = _TASKS[task](table)
    problems.raise_any()
    splits = {
        split: _source(table, np.flatnonzero(split_of_row == split), paths, known)
        for split in ("train", "val", "test")
        if split == "train" or split in split_of_row
    }
    if task == "classify" and need and len(splits["train"]):
        check_filled(str(file), splits["train"].labels, known.classes, "row")
    if task == "multilabel":
        shown = np.nonzero(known.targets[split_of_row == "train"])[1]
        note_unused(shown, known.classes, problems.notes if len(splits["train"]) else [])
    return assemble(
        path, task, known.classes, splits, problems, seed=seed, need=need, layout=table.layout
    )


def _source(
    table: Table, rows: NDArray[np.int64], paths: Sequence[str], known: _Known
) -> AnnotatedSource:
    labels, values = known.labels[rows], known.targets[rows]
    targets: Targets = LabelTargets(values) if values.ndim == 1 else RowTargets(values)
    of_rows = path_table([paths[row] for row in rows.tolist()])
    return AnnotatedSource(table.file.parent, of_rows, labels, known.classes, targets)


def _image_column(table: Table) -> str:
    """Return the column of this name, else the first with names of images, else the first."""
    names = [*table.columns]
    found = (name for name in names if suffix(str(table.columns[name][0])) in EXTENSIONS)
    return table.column(_IMAGE) or next(found, names[0] if names else "")


def _paths(table: Table) -> list[str]:
    """Return the image of each row; missing and repeated images are problems."""
    column = _image_column(table)
    paths: list[str] = []
    first: dict[str, str] = {}
    for row, cell in enumerate(table.columns.get(column, ())):
        good = isinstance(cell, str) and cell != "" and "\0" not in cell
        paths.append(cell if good else "")
        if not good:
            table.problems.add(f"{table.name_of(row, column)}, not the path of an image")
        elif (line := first.setdefault(os.path.normpath(cell), table.rows[row])) != table.rows[row]:
            table.problems.add(f"{table.name_of(row, column)}, as in {line}; one row per image")
    paths = with_slashes(table.file.parent, paths)
    gone = set(absent(table.file.parent, [path for path in paths if path]))
    files = _by_name(table, gone) if gone else {}
    for row, path in enumerate(paths):
        if len(same := files.get(path, [])) == 1:
            paths[row] = same[0]
        elif same:
            what = f"{path} is {' or '.join(same[:2])} in {table.file.parent}: write its folder too"
            table.problems.add(f"{table.rows[row]}: {what}")
        elif path in gone:
            table.problems.add(f"{table.rows[row]}: no such image in {table.file.parent}: {path}")
    return paths


def _by_name(table: Table, gone: set[str]) -> dict[str, list[str]]:
    """Return the files of bare names, and of Kaggle's ids."""
    files: dict[str, list[str]] = {}
    for file in image_paths(table.file.parent):
        for name in (stem(file), file.rpartition("/")[2]):
            files.setdefault(name, []).append(file)
    found = {path: files[path] for path in gone if path in files}
    if alone := {path: same[0] for path, same in found.items() if len(same) == 1}:
        path, file = min(alone.items())
        table.problems.notices.append(
            f"{len(alone)} images have no extension or folder in the table: {path} is read as "
            f"{file}, …"
        )
    return found


def _splits(table: Table, need: Sequence[str]) -> NDArray[Any]:
    """Return train, val or test for each row."""
    column = table.column(_SPLIT)
    if column is None:
        return np.full(len(table.rows), only_split(need))
    found = []
    for row, cell in enumerate(table.columns[column]):
        split = SPLITS.get(cell.lower()) if isinstance(cell, str) else None
        if split is None:
            table.problems.add(f"{table.name_of(row, column)}; wanted: train, val or test")
        found.append(split or "train")
    return np.array(found)


def _classify(table: Table) -> _Known:
    column = next(iter(table.chosen), None) or table.column(_LABEL) or ""
    if column not in table.columns:
        _lack(table, "a column `label` or `class`, or ?targets=NAME", [column, *_LABEL])
    names = []
    for row, cell in enumerate(table.columns[column]):
        if not isinstance(cell, str | int) or cell == "":
            table.problems.add(f"{table.name_of(row, column)}, no name of a class")
            cell = ""
        names.append(str(cell))
    classes = tuple(sorted(set(names) - {""}, key=os.fsencode))
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of.get(name, 0) for name in names], dtype=np.int64)
    return _Known(classes, labels, labels)


def _multilabel(table: Table) -> _Known:
    column = table.column(_LABELS)
    if column is None or table.chosen:
        return _indicators(table)
    lists = [_label_list(table, column, row) for row in range(len(table.rows))]
    classes = tuple(sorted({name for names in lists for name in names}, key=os.fsencode))
    label_of = {name: label for label, name in enumerate(classes)}
    values = np.zeros((len(lists), len(classes)), dtype=np.uint8)
    for row, names in enumerate(lists):
        values[row, [label_of[name] for name in names]] = 1
    if not classes:
        table.problems.raise_any()
        raise DataError(f"{table.file}: its column {column} names no class")
    return _Known(classes, values.argmax(axis=1), values)


def _label_list(table: Table, column: str, row: int) -> list[str]:
    cell = table.columns[column][row]
    if isinstance(cell, str):
        separator = next((mark for mark in _SEPARATORS if mark in cell), _SEPARATORS[0])
        return [name.strip() for name in cell.split(separator) if name.strip()]
    if isinstance(cell, list) and all(isinstance(name, str | int) and name != "" for name in cell):
        return [str(name) for name in cell]
    table.problems.add(f"{table.name_of(row, column)}, no list of names")
    return []


def _indicators(table: Table) -> _Known:
    names = _number_columns(table, lambda number: number in (0, 1), "0 or 1")
    if not names:
        _lack(table, "a column `labels`, or columns of 0 and 1", _LABELS)
    values = _numbers(table, names, lambda number: number in (0, 1), "not 0 or 1")
    bits = values.astype(np.uint8)
    return _Known(tuple(names), bits.argmax(axis=1), bits)


def _regress(table: Table) -> _Known:
    _read_decimal_commas(table)
    names = _number_columns(table, math.isfinite, "numbers")
    if not names:
        _lack(table, "a column of numbers", [])
    values = _numbers(table, names, math.isfinite, "no number").astype(np.float32)
    cells = {name: {str(cell).lower() for cell in table.columns[name]} for name in names}
    if logical := [name for name in names if cells[name] <= {"true", "false"}]:
        table.problems.notices.append(
            f"{shortened(logical)}: true and false are the targets 1 and 0; ?targets=… chooses"
        )
    return _Known(tuple(names), np.zeros(len(values), dtype=np.int64), values)


def _read_decimal_commas(table: Table) -> None:
    """Write 3.5 for 3,5 in columns of such numbers, unless commas separate the columns.

    A column that has a point as well is left as it is: 1.234 may be a thousand or one.
    """
    others = {_image_column(table), table.column(_SPLIT)}
    names = []
    for name, cells in table.columns.items() if table.separator in (";", "\t") else ():
        if name not in others and any(map(_COMMA.fullmatch, cells)) and "." not in "".join(cells):
            table.columns[name] = [cell.replace(",", ".") for cell in cells]
            names.append(name)
    if names:
        table.problems.notices.append(f"decimal commas in {shortened(names)}: 3,5 is read as 3.5")


def _generate(table: Table) -> _Known:
    labels = np.zeros(len(table.rows), dtype=np.int64)
    return _Known(("image",), labels, labels)


def _number_columns(table: Table, right: Callable[[float], bool], what: str) -> list[str]:
    """Return the chosen columns, or those of which more than half the cells are `right`."""
    if unknown := [name for name in table.chosen if name not in table.columns]:
        _lack(table, f"the column {unknown[0]!r}", unknown)
    if table.chosen:
        return list(table.chosen)
    others = {_image_column(table), table.column(_SPLIT)}
    found: list[str] = []
    left_out: list[str] = []
    for name, cells in table.columns.items():
        numbers = [_number(cell) for cell in cells]
        count = sum(right(number) for number in numbers if number is not None)
        if name not in others and _numbers_rows(name, numbers):
            table.problems.notices.append(
                f"column {name} numbers the rows: left out; ?targets={name},… takes it"
            )
        elif name not in others:
            (found if 2 * count > len(cells) else left_out).append(name)
    table.problems.notes += [f"column {name} does not hold {what}: left out" for name in left_out]
    return found


def _numbers_rows(name: str, numbers: Sequence[float | None]) -> bool:
    """Return whether a column counts up by 1, or is called an id and holds no number twice."""
    whole = [number for number in numbers if number is not None and number.is_integer()]
    if len(whole) < len(numbers) or len({*whole}) < len(whole):
        return False
    steps = len(whole) >= _MANY and {*np.diff(whole).tolist()} == {1}
    return steps or bool(_INDEX.fullmatch(name))


def _numbers(
    table: Table, names: Sequence[str], right: Callable[[float], bool], what: str
) -> NDArray[np.float64]:
    """Return the cells as float64 [N, T]; those that are not `right` are problems, and 0."""
    values = np.zeros((len(table.rows), len(names)))
    for row in range(len(table.rows)):
        for i, name in enumerate(names):
            number = _number(table.columns[name][row])
            if number is None or not right(number):
                table.problems.add(f"{table.name_of(row, name)}, {what}")
            else:
                values[row, i] = number
    return values


def _number(cell: Any) -> float | None:
    """Return the number in a cell, or None; true and false, as pandas writes them, are 1 and 0."""
    if isinstance(cell, str):
        cell = {"true": 1, "false": 0}.get(cell.lower(), cell)
    try:
        return float(cell) if isinstance(cell, str | int | float) else None
    except (ValueError, OverflowError):
        return None


def _lack(table: Table, what: str, wanted: Sequence[str]) -> NoReturn:
    """Raise `DataError` for a missing column."""
    known = list(table.columns)
    hints = (did_you_mean(name, known) for name in wanted)
    hint = next((hint for hint in hints if hint), "" if len(known) > 1 else f"; {WANTED}")
    notices = "".join(f"; {notice}" for notice in table.problems.notices)
    raise DataError(f"{table.file}: lacks {what}{hint}; it has {shortened(known, 12)}{notices}")


_TASKS: Mapping[str, Callable[[Table], _Known]] = {
    "classify": _classify,
    "generate": _generate,
    "multilabel": _multilabel,
    "regress": _regress,
}
