"""`meshuffle data check`: look at a data set before training on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from meshuffle.cli import Answer
from meshuffle.cli.options import DATA_HELP, Debug, Json, doc
from meshuffle.config import TaskName


def register(app: App) -> None:
    """Add the verb to `app`."""
    group = App(name="data", help="Look at data sets.")
    group.command(check)
    app.command(group)


def check(
    data: Annotated[str, Parameter(help=DATA_HELP)],
    /,
    *,
    task: Annotated[TaskName, doc("Task whose targets are checked.")] = "classify",
    grid: Annotated[Path, doc("File for a picture of samples.")] = Path("data-check.png"),
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Count classes, find broken images and duplicates between splits, and draw a grid."""
    from meshuffle.data import check_data

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{done:,} of {total:,} images", end=end, file=sys.stderr)  # noqa: T201

    report = check_data(data, grid_path=grid, progress=progress, task=task)
    return Answer(report.to_dict(), report.render())
