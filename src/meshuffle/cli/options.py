"""Options that several verbs share, and the printing of progress."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Json = Annotated[
    bool, Parameter(negative=(), help="Print one JSON value on standard output, nothing else.")
]
Debug = Annotated[bool, Parameter(negative=(), help="Show the traceback of an error.")]
Model = Annotated[
    str | None,
    Parameter(
        help="Name of the model, where the weights file does not identify it. Repeat the name of "
        "a package.module:function model to let its code run."
    ),
]
Spread = Annotated[
    str,
    Parameter(
        name="--plan",
        help="How to spread the work over ranks, for example dp=2, tp=2:spatial or pp=2.",
    ),
]


def doc(text: str) -> Parameter:
    """Return an option's help text, for its annotation."""
    return Parameter(help=text)


Force = Annotated[
    bool, Parameter(negative=(), help="Start the plan's ranks even if memory may not suffice.")
]


_FOLDERS = ("imagenet", "cifar10", "mnist", "fashion-mnist", "coco", "voc", "yolo", "masks")
DATA_FORMATS = {**dict.fromkeys(_FOLDERS, "PATH"), "csv": "FILE", "json": "FILE", "hf": "NAME"}
"""What follows each prefix of `data.source.FORMATS`, which `--help` may not import (torch)."""

DATA_HELP = "digits, a folder, or " + ", ".join(
    f"{prefix}:{rest}" for prefix, rest in DATA_FORMATS.items()
)


def say_remarks(target: Path, model: str | None) -> None:
    """Print what is to be known of a weights file: prefixes taken off, other weights in it."""
    from meshuffle.comm.group import RankEnv, rank_env
    from meshuffle.weights import remarks_on

    if (rank_env() or RankEnv()).is_main:
        for line in remarks_on(target, model):
            say(line)


def say(line: str) -> None:
    """Print a line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
