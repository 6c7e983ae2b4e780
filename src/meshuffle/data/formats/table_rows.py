"""Read a CSV, JSON or JSON lines into columns; errors name the line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshuffle.data.entries import Problems, decoded, read_text, suffix
from meshuffle.data.image import EXTENSIONS
from meshuffle.errors import DataError

TARGETS = "targets"
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_FALLBACK = "cp1252"
WANTED = "wanted: a header such as image,label; a row names a file of an image, not its pixels"


@dataclass(frozen=True, eq=False)
class Table:
    """The cells of each column: text of a CSV, any JSON value, or None.

    Attributes:
        rows: name of each row for messages, such as `line 3`.
        chosen: the columns that the caller named.
        problems: collects bad cells.
        layout: how the file is written, in words.
        separator: what separates the columns, or nothing.
    """

    file: Path
    columns: dict[str, Sequence[Any]]
    rows: Sequence[str]
    chosen: Sequence[str]
    problems: Problems
    layout: str
    separator: str = ""

    def column(self, names: Sequence[str]) -> str | None:
        """Return the first column that has one of `names`, in any case, with `_` for a space."""
        known = {name.lower().replace(" ", "_"): name for name in reversed(self.columns)}
        return next((known[name] for name in names if name in known), None)

    def name_of(self, row: int, column: str) -> str:
        """Return the name and the content of a cell for messages."""
        content = repr(self.columns[column][row])
        return f"{self.rows[row]}: {column} is {content[:200]}{' …' * (len(content) > 200)}"


def read_csv(file: Path, chosen: Sequence[str], problems: Problems) -> Table:
    """Return the rows of a CSV; see `Table` for `chosen` and `problems`.

    Comma, semicolon or tab separate the columns: the one that splits the first line most. That is
    the header, unless it begins with the name of an image: then the file is a list of image and
    label, which spaces may separate as well. The text is UTF-8, UTF-16, or cp1252 (latin-1), as
    spreadsheets write it.
    """
    text, encoding = decoded(file, _FALLBACK)
    if encoding == _FALLBACK:
        problems.notices.append(f"{file.name} is not UTF-8; it is read as {encoding} (latin-1)")
    delimiter = _delimiter(text, "\t" if suffix(file.name) == ".tsv" else ",")
    lines, blank = io.StringIO(text, newline=""), delimiter == " "
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=blank)
    header: list[str] = []
    cells: list[list[str]] = []
    rows: list[str] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not header and suffix(row[0].strip()) in EXTENSIONS:
                header = ["image", "label", *map(str, range(2, len(row)))][: len(row)]
            elif not header:
                header = [name.strip() for name in row]
                continue
            if len(row) != len(header):
                problems.add(f"line {reader.line_num}: {len(row)} cells for {len(header)} columns")
            else:
                cells.append([cell.strip() for cell in row])
                rows.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: {error}") from error
    columns = dict(zip(header, zip(*cells, strict=True), strict=True)) if cells else {}
    left = _targets(columns, chosen, problems)
    if len(set(header)) < len(header) or "" in list(left)[1:]:
        raise DataError(
            f"{file}: its header has a column twice or without a name: {', '.join(header[:9])}; "
            f"{WANTED}"
        )
    layout = f"CSV: {_SEPARATORS.get(delimiter, 'spaces')} between columns, {encoding}"
    return Table(file, left, rows, chosen, problems, layout, delimiter)


def _delimiter(text: str, usual: str) -> str:
    """Return the separator that splits the first line most; `usual` where they are equal."""
    head = next((line for line in text.splitlines() if line.strip()), "")
    if suffix(head.partition(" ")[0]) in EXTENSIONS:
        return " "
    marks = [usual, *(mark for mark in _SEPARATORS if mark != usual)]
    return max(marks, key=lambda mark: len(next(csv.reader([head], delimiter=mark))))


def _targets(
    columns: Mapping[str, Sequence[Any]], chosen: Sequence[str], problems: Problems
) -> dict[str, Sequence[Any]]:
    """Return the columns without those that have no name, of whole numbers or of nothing.

    They are pandas' index of chosen rows, or come from a separator at each line's end.
    """
    kept: dict[str, Sequence[Any]] = {}
    for name, column in columns.items():
        bare = name.startswith("Unnamed:") or not name
        if name in chosen or not bare or not all(str(cell or "0").isdecimal() for cell in column):
            kept[name] = column
        elif name:
            problems.notes.append(f"column {name} numbers the rows: left out")
    return kept


def read_json(file: Path, chosen: Sequence[str], problems: Problems) -> Table:
    """Return the objects of a JSON list or of JSON lines; a missing key is None."""
    text = read_text(file)
    if re.match(r"\s*\{.*\}\s*$", text, re.MULTILINE):
        entries = [(f"line {i}", line) for i, line in enumerate(text.splitlines(), 1)]
        named = [(row, _parse(file, line, row)) for row, line in entries if line.strip()]
        if len(named) == 1 and (columns_of := _by_column(named[0][1])):
            named = columns_of
    else:
        tree = _parse(file, text, "")
        if isinstance(tree, list):
            named = [(f"entry {i}", entry) for i, entry in enumerate(tree, 1)]
        elif not (named := _by_column(tree)):
            raise DataError(
                f"{file}: wanted: a list of objects, or one object a line, each with its image and "
                "label; a COCO file is opened as coco:PATH"
            )
    for row, entry in named:
        if not isinstance(entry, dict):
            problems.add(f"{row}: {entry!r} is no object")
    flat = [(row, _flat(entry)) for row, entry in named if isinstance(entry, dict)]
    names = dict.fromkeys(name for _, entry in flat for name in entry)
    columns: dict[str, Sequence[Any]] = {
        name: [entry.get(name) for _, entry in flat] for name in names
    }
    rows = [row for row, _ in flat]
    return Table(file, _targets(columns, chosen, problems), rows, chosen, problems, "JSON")


def _by_column(tree: Any) -> list[tuple[str, Any]]:
    """Return the rows of `{"image": {"0": …}, "label": {"0": …}}`, as pandas' `to_json` writes."""
    if not isinstance(tree, dict) or {*map(type, tree.values())} != {dict} or len(tree) < 2:
        return []
    keys = dict.fromkeys(key for column in tree.values() for key in column)
    return [(f"row {key}", {name: tree[name].get(key) for name in tree}) for key in keys]


def _parse(file: Path, text: str, row: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("<"):
            raise DataError(f"{file} is XML, not JSON") from error
        where = row or f"line {error.lineno}"
        raise DataError(f"{file}: {where}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{file}: nested too deeply") from error


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry with the keys of its `targets` beside the others."""
    inner = entry.get(TARGETS)
    if not isinstance(inner, dict):
        return dict(entry)
    return {**{key: entry[key] for key in entry if key != TARGETS}, **inner}
