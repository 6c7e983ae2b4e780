"""Rows of figures, appended to a CSV file of results/."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def append(name: str, rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Append rows to results/NAME.csv; a new file gets the columns, those of the first row."""
    path = RESULTS / f"{name}.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns or rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
