"""Every error that Meshuffle raises on purpose, and the exit code of each.

    MeshuffleError                     1   the work failed
    ├── InputError                     2   something that the caller supplied is wrong
    │   ├── ConfigError                    an option, a config key, or a value of one
    │   ├── PlanError                      a plan text that does not parse or does not fit
    │   ├── DataError                      a data set as a whole: path, format, classes
    │   │   └── ImageError                 one image; training reports it once and goes on
    │   ├── ModelError                     a model name, its knobs, or its weights
    │   │   └── CaptureError               its program cannot be captured; dp=N needs none
    │   └── RunError                       a run folder that is missing, broken or in use
    ├── OutOfMemory                    1   names the largest batch that fits
    ├── ParityError                    1   an exported file disagrees with the model
    ├── RankFailed                     1   a rank died or hung
    └── Interrupted                130/143 Ctrl-C or SIGTERM, after saving

The command line prints `error: ` and the message on one line; the message says what,
where, the values, and what to do. `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal


class MeshuffleError(Exception):
    """The root of the tree; `exit_code` is what the process returns."""

    exit_code = 1


class InputError(MeshuffleError):
    """Something that the caller supplied is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """An option, a config key, or a value of one."""


class PlanError(InputError):
    """A plan text that does not parse, or does not fit the ranks or the batch."""


class DataError(InputError):
    """A data set as a whole: its path, its format, its classes."""


class ImageError(DataError):
    """One image that cannot be used.

    `kind`: `broken` (truncated, empty or unreadable), `unknown` (no format that we read) or `large`
    (more pixels than are allowed).
    """

    def __init__(
        self, message: str, kind: Literal["broken", "unknown", "large"] = "broken"
    ) -> None:
        super().__init__(message)
        self.kind = kind


class ModelError(InputError):
    """A model name, the knobs of a model, or its weights."""


class CaptureError(ModelError):
    """A model whose program cannot be captured whole, so that only plans of dp alone can run it."""


class RunError(InputError):
    """A run folder that is missing, broken, or in use by another process."""


class OutOfMemory(MeshuffleError):
    """The batch does not fit; the message names the largest one that does."""


class ParityError(MeshuffleError):
    """An exported file does not compute what the model computes."""


class RankFailed(MeshuffleError):
    """A rank died or did not answer in time; `op` is what was asked of it."""

    def __init__(self, message: str, op: str = "") -> None:
        super().__init__(message)
        self.op = op


class Interrupted(MeshuffleError):
    """Ctrl-C (SIGINT) or SIGTERM arrived; the state has been saved.

    `is_printed`: the message is on the screen already.
    """

    def __init__(self, message: str, signal_number: int, *, is_printed: bool = False) -> None:
        super().__init__(message)
        self.is_printed = is_printed
        self.exit_code = 128 + signal_number


def in_words(error: BaseException) -> str:
    """Return what to print of any error: ours as it is, the system's, or a fault of the program.

    >>> in_words(PermissionError(13, "Permission denied", "/data"))
    '/data: Permission denied'
    """
    if isinstance(error, MeshuffleError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error).partition("\n")[0]
    return f"unexpected {type(error).__name__}: {text}; --debug shows where. Please report it"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known word nearest to `word`, or `""`.

    >>> did_you_mean("epoch", ["epochs", "batch"])
    "; did you mean 'epochs'?"
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
