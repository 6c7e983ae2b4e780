"""What several verbs share: options, and how they tell of their progress."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

Json = Annotated[
    bool, Parameter(name="--json", negative=(), help="One JSON value on standard output.")
]
Debug = Annotated[
    bool, Parameter(name="--debug", negative=(), help="Show the traceback of an error.")
]
Model = Annotated[
    str | None,
    Parameter(
        help="The model of plain weights whose keys do not tell; or repeats the name of a "
        "package.module:function model, to run its code."
    ),
]
Spread = Annotated[
    str,
    Parameter(
        name="--plan", help="How to spread it over ranks, for example dp=2, tp=2:spatial or pp=2."
    ),
]


def say(line: str) -> None:
    """Print a line on what is going on."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
