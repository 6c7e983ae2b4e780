from __future__ import annotations

import subprocess
import sys

import pytest

import meshuffle


def test_the_public_names_are_these() -> None:
    assert meshuffle.__all__ == [
        "TrainConfig",
        "capture",
        "create_model",
        "evaluate",
        "export",
        "list_models",
        "parallelize",
        "predict",
        "resume",
        "train",
        "verify",
    ]


@pytest.mark.parametrize("name", meshuffle.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    assert getattr(meshuffle, name).__doc__


def test_functions_are_not_hidden_by_the_folders_of_their_name() -> None:
    """`meshuffle.train` is a folder and a function; once imported, the folder would win."""
    code = (
        "import meshuffle.config, meshuffle; from meshuffle import create_model; "
        "from meshuffle import train; print(callable(train))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "True", found.stderr


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        meshuffle.trian  # noqa: B018
