"""What a run has written about itself, read back leniently.

A run may have been stopped at any instant, so every file may be missing, short, or end in half
a line. Such a part comes back empty; reading never fails because of it.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """The files of one run folder.

    Attributes:
        name: of the folder.
        epochs: the rows of `metrics.csv`; cells are text, possibly empty.
        steps: lines of `log.jsonl`, by ascending step; of a step that a resumed run made again,
            the later line. events: its other lines.
        plan, env, result: `plan.json`, `env.json`, `result.json`; empty where missing.
        config: the text of `config.toml`.
    """

    name: str
    epochs: tuple[Row, ...] = ()
    steps: tuple[Row, ...] = ()
    events: tuple[Row, ...] = ()
    plan: Row = field(default_factory=dict)
    env: Row = field(default_factory=dict)
    result: Row = field(default_factory=dict)
    config: str = ""

    @property
    def splits(self) -> dict[str, Row]:
        """Metrics per split of `result.json`."""
        splits = self.result.get("splits")
        splits = splits if isinstance(splits, Mapping) else {}
        return {str(name): row for name, row in splits.items() if isinstance(row, Mapping)}

    @property
    def seconds(self) -> float | None:
        """Training time in seconds: the epochs' sum, else the span of the log, else None."""
        spent = [s for row in self.epochs if (s := number(row.get("seconds"))) is not None]
        if spent:
            return sum(spent)
        times = [t for row in self.steps if (t := number(row.get("time"))) is not None]
        return times[-1] - times[0] if len(times) > 1 else None

    @property
    def images_per_s(self) -> float | None:
        """The median of the epochs, else of the logged steps, in images per second, or None."""
        for rows in (self.epochs, self.steps):
            rates = sorted(r for row in rows if (r := number(row.get("images_per_s"))) is not None)
            if rates:
                return rates[len(rates) // 2]
        return None

    @property
    def data_wait(self) -> float | None:
        """The share of the time that training waited for data, 0 … 1; the epochs' median."""
        shares = sorted(s for row in self.epochs if (s := number(row.get("data_wait"))) is not None)
        return shares[len(shares) // 2] if shares else None


def read_record(run: Path) -> Record:
    """Read what there is in the folder `run`."""
    lines = tuple(_json_lines(_text(run / "log.jsonl")))
    return Record(
        name=run.resolve().name,
        epochs=tuple(csv.DictReader(_text(run / "metrics.csv").replace("\0", "").splitlines())),
        steps=_last_of_each_step(line for line in lines if line.get("kind") == "step"),
        events=tuple(line for line in lines if line.get("kind") == "event"),
        plan=_json_object(run / "plan.json"),
        env=_json_object(run / "env.json"),
        result=_json_object(run / "result.json"),
        config=_text(run / "config.toml"),
    )


def number(value: Any) -> float | None:
    """Return `value` as a finite float, or None: empty text, None, nan, half a line.

    >>> [number(value) for value in (3, "0.5", "", None, "nan", True)]
    [3.0, 0.5, None, None, None, None]
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def series(rows: Iterable[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return the columns `x` and `y` of the rows in which both are finite numbers."""
    pairs = [(number(row.get(x)), number(row.get(y))) for row in rows]
    full = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in full], [b for _, b in full]


def flatten(values: Row, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for nested plain data; a list of plain values is one text.

    >>> list(flatten({"torch": "2.15", "host": {"cores": 2, "gpus": []}}))
    [('torch', '2.15'), ('host.cores', '2'), ('host.gpus', 'none')]
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{key}", "none" if value is None else str(value)


def _last_of_each_step(lines: Iterable[Row]) -> tuple[Row, ...]:
    by_step = {step: line for line in lines if (step := number(line.get("step"))) is not None}
    return tuple(by_step[step] for step in sorted(by_step))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json_lines(text: str) -> Iterator[Row]:
    for line in text.splitlines():
        value = _json(line)
        if isinstance(value, Mapping):
            yield value


def _json_object(path: Path) -> Row:
    value = _json(_text(path))
    return value if isinstance(value, Mapping) else {}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def loss_text(loss: float) -> str:
    """Return a loss for people.

    >>> loss_text(0.25), loss_text(3.76e20)
    ('0.2500', '3.76e+20')
    """
    return f"{loss:.4f}" if abs(loss) < 1e5 else f"{loss:.3g}"
