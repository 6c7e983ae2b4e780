"""Read a CSV, JSON or JSON lines into columns; errors name the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshuffle.data.entries import Problems, read_text, suffix
from meshuffle.errors import DataError

TARGETS = "targets"


@dataclass(frozen=True, eq=False)
class Table:
    """The cells of each column: text of a CSV, any JSON value, or None.

    Attributes:
        rows: name of each row for messages, such as `line 3`.
        chosen: the columns that the caller named.
        problems: collects bad cells.
    """

    file: Path
    columns: Mapping[str, Sequence[Any]]
    rows: Sequence[str]
    chosen: Sequence[str]
    problems: Problems

    def name_of(self, row: int, column: str) -> str:
        """Return the name and the content of a cell for messages."""
        return f"{self.rows[row]}: {column} is {self.columns[column][row]!r}"


def read_csv(file: Path, chosen: Sequence[str], problems: Problems) -> Table:
    """Return the rows of a CSV with a header; see `Table` for `chosen` and `problems`."""
    delimiter = "\t" if suffix(file.name) == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(file)), delimiter=delimiter, strict=True)
    header: list[str] = []
    cells: list[list[str]] = []
    rows: list[str] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [name.strip() for name in row]
            elif len(row) != len(header):
                problems.add(f"line {reader.line_num}: {len(row)} cells for {len(header)} columns")
            else:
                cells.append([cell.strip() for cell in row])
                rows.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: {error}") from error
    if len(set(header)) < len(header) or "" in header:
        raise DataError(f"{file}: its header has a column twice or without a name: {header}")
    columns = dict(zip(header, zip(*cells, strict=True), strict=True)) if cells else {}
    return Table(file, columns, rows, chosen, problems)


def read_json(file: Path, chosen: Sequence[str], problems: Problems) -> Table:
    """Return the objects of a JSON list or of JSON lines; a missing key is None."""
    text = read_text(file)
    if text.lstrip().startswith("{"):
        entries = [(f"line {i}", line) for i, line in enumerate(text.splitlines(), 1)]
        named = [(row, _parse(file, line, row)) for row, line in entries if line.strip()]
    else:
        tree = _parse(file, text, "")
        if not isinstance(tree, list):
            raise DataError(f"{file}: wanted: a list of objects, or one object a line")
        named = [(f"entry {i}", entry) for i, entry in enumerate(tree, 1)]
    for row, entry in named:
        if not isinstance(entry, dict):
            problems.add(f"{row}: {entry!r} is no object")
    flat = [(row, _flat(entry)) for row, entry in named if isinstance(entry, dict)]
    names = dict.fromkeys(name for _, entry in flat for name in entry)
    columns = {name: [entry.get(name) for _, entry in flat] for name in names}
    return Table(file, columns, [row for row, _ in flat], chosen, problems)


def _parse(file: Path, text: str, row: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = row or f"line {error.lineno}"
        hint = "; a COCO file is opened as coco:PATH" if '"annotations"' in text else ""
        raise DataError(f"{file}: {where}, column {error.colno}: {error.msg}{hint}") from error
    except RecursionError as error:
        raise DataError(f"{file}: nested too deeply") from error


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry with the keys of its `targets` beside the others."""
    inner = entry.get(TARGETS)
    if not isinstance(inner, dict):
        return dict(entry)
    return {**{key: entry[key] for key in entry if key != TARGETS}, **inner}
