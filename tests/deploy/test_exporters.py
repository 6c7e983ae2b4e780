"""Formats are found by name, and imported only when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from meshuffle.deploy import EXPORTERS, LATER, find_exporter
from meshuffle.errors import ConfigError


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_known_format_has_a_suffix_and_a_function(name: str) -> None:
    exporter = find_exporter(name)
    assert exporter.suffix.startswith(".")
    assert callable(exporter.load())


@pytest.mark.parametrize("name", LATER)
def test_a_format_of_a_later_version_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^export to {name} comes in a later version"):
        find_exporter(name)


@pytest.mark.parametrize(
    ("name", "hint"), [("onxx", "; did you mean 'onnx'?"), ("tflite-micro", ""), ("", "")]
)
def test_an_unknown_format_gets_the_nearest_one(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_exporter(name)
    expected = f"unknown export format {name!r}{hint}; this version writes onnx"
    assert str(caught.value) == expected


def test_listing_the_formats_does_not_import_torch() -> None:
    code = (
        "import sys, meshuffle.deploy as d; d.find_exporter('onnx'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
