"""The command line: one thin function per verb, in a file of its own.

No verb's file imports torch at its top, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence

from cyclopts import App, CycloptsError

from meshuffle.comm.launch import let_threads_sleep
from meshuffle.errors import Interrupted, in_words
from meshuffle.files import finite

_VERBS = "doctor models data verify train evaluate predict export bench serve"
_QUIET = {
    "PYTHONWARNINGS": "ignore",
    "TORCH_LOGS": "-torch.utils._pytree",  # torchao makes it warn
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' too
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}


def build_app() -> App:
    """Return the app with every verb that exists."""
    from importlib import import_module

    from meshuffle import __version__

    app = App(
        name="meshuffle",
        help="Train, verify, evaluate, export and serve ShuffleNets and other PyTorch models.",
        version=f"meshuffle {__version__}",
        help_format="plaintext",  # markdown would cost a third of the time that --help takes
        suppress_keyboard_interrupt=False,
    )
    for verb in _VERBS.split():
        import_module(f"meshuffle.cli.{verb}").register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (errors.py says which)."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    if debug:
        os.environ["MESHUFFLE_DEBUG"] = "1"  # for the ranks
    if "--force" in tokens:
        os.environ["MESHUFFLE_FORCE"] = "1"
    # Warnings of other libraries are for their developers.
    if not debug and arguments is None and not sys.warnoptions:
        warnings.simplefilter("ignore")
        for variable, value in _QUIET.items():  # the ranks inherit them
            os.environ.setdefault(variable, value)
    let_threads_sleep()
    early = " before the service was ready" if tokens[:1] == ["serve"] else ""
    if arguments is None:
        _print_any_path()
    try:
        with _stopped_by_sigterm():
            return _run(tokens)
    except CycloptsError as error:
        return _fail(_one_line(str(error)), 2)
    except BrokenPipeError:  # `meshuffle models | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # kept until the process ends
        return 0
    except _Stopped:
        return _fail(f"stopped{early}", 143)
    except KeyboardInterrupt:
        return _fail(f"interrupted{early}", 130)
    except Exception as error:  # noqa: BLE001  # contract: one line, and a traceback on request
        if debug:
            traceback.print_exc()
        if isinstance(error, Interrupted):
            if not error.is_printed:
                print(error, file=sys.stderr)  # noqa: T201
            return error.exit_code
        return _fail(in_words(error), getattr(error, "exit_code", 1))


def _print_any_path() -> None:
    """Let a path that is not UTF-8 be printed, as its bytes, here and by the ranks."""
    os.environ.setdefault("PYTHONIOENCODING", ":surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def _run(tokens: list[str]) -> int:
    if tokens and tokens[0] in ("profile", "plan", "simulate"):
        return _fail(f"'{tokens[0]}' does not exist yet; it comes with the planner", 2)
    answer = build_app()(
        tokens, exit_on_error=False, print_error=False, result_action="return_value"
    )
    _show(answer, as_json="--json" in tokens)
    sys.stdout.flush()  # here, where a closed pipe is no error
    return answer.exit_code if isinstance(answer, Answer) else 0


class _Stopped(KeyboardInterrupt):
    """Raised when the process gets SIGTERM."""


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end a verb as Ctrl-C does, so that temporary files (gigabytes) are deleted."""

    def stop(*_: object) -> None:
        raise _Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _fail(text: str, exit_code: int) -> int:
    print(f"error: {_one_line(text)}", file=sys.stderr)  # noqa: T201
    return exit_code


def _one_line(text: str) -> str:
    return " ".join(text.split())


class Answer:
    """The result of a verb: one JSON value, the text to print, and the exit code."""

    def __init__(self, value: object, text: str = "", exit_code: int = 0) -> None:
        self.value, self.text, self.exit_code = value, text, exit_code


def from_main(answer: Answer) -> Answer | None:
    """Return the answer on the main rank, and None on the others, so that it prints once."""
    from meshuffle.comm.group import RankEnv, rank_env

    return answer if (rank_env() or RankEnv()).is_main else None


def _show(answer: object, as_json: bool) -> None:
    if not isinstance(answer, Answer):
        return
    if as_json:
        print(json.dumps(finite(answer.value)))  # noqa: T201
    elif answer.text:
        print(answer.text)  # noqa: T201
