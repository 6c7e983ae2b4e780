"""Run the longest test files first, by their measured times, so that workers end together.

`pytest --store-durations` writes what it measures to `dev/test_durations.csv`: seconds of each
file, set-up and clean-up included, and of each test above a second.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[1] / "dev" / "test_durations.csv"
_UNKNOWN_S = 30.0  # of a new file: early, but behind the long ones
_seconds: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store-durations", action="store_true", help="Write the table of times.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = _read()
    items.sort(key=lambda item: -known.get(_file(item.nodeid), _UNKNOWN_S))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    if session.config.getoption("--store-durations") and not is_worker:
        _write()


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _read() -> dict[str, float]:
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {row["test"]: float(row["seconds"]) for row in csv.DictReader(file)}


def _write() -> None:
    files: Counter[str] = Counter()
    for nodeid, seconds in _seconds.items():
        files[_file(nodeid)] += seconds
    long = {nodeid: seconds for nodeid, seconds in _seconds.items() if seconds >= 1}
    rows = sorted((files | long).items(), key=lambda row: -row[1])
    with TABLE.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("test", "seconds"))
        table.writerows((test, f"{seconds:.1f}") for test, seconds in rows)
