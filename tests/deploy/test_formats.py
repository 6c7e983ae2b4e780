"""Formats are found by name, and imported only when they are used."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from meshuffle.deploy.formats import FORMATS, find_format
from meshuffle.deploy.formats.executorch import _quiet
from meshuffle.errors import ConfigError


@pytest.mark.parametrize("name", FORMATS)
def test_a_known_format_has_its_name_and_a_suffix(name: str) -> None:
    form = find_format(name)
    assert form.name == name
    assert form.suffix.startswith(".")


@pytest.mark.parametrize(
    ("name", "hint"), [("onxx", "; did you mean 'onnx'?"), ("tflite-micro", ""), ("", "")]
)
def test_an_unknown_format_gets_the_nearest_one(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_format(name)
    expected = f"unknown export format {name!r}{hint}; this version writes {', '.join(FORMATS)}"
    assert str(caught.value) == expected


def test_finding_a_format_imports_no_toolchain() -> None:
    code = "import sys, meshuffle.deploy.formats as d; [*map(d.find_format, d.FORMATS)]"
    command = [sys.executable, "-c", f"{code}; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "meshuffle.deploy.formats.pt2" in loaded
    assert not loaded & {"torch", "onnx", "onnxruntime", "openvino", "executorch"}


def test_a_runtime_is_quiet_while_it_starts(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ExecuTorch writes about files of the CPU that are not there, past Python's sys.stderr."""
    monkeypatch.delenv("MESHUFFLE_DEBUG", raising=False)
    with _quiet():
        os.write(2, b"[cpuinfo_utils.cpp:87] Failed to open")
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "seen\n"
    monkeypatch.setenv("MESHUFFLE_DEBUG", "1")
    with _quiet():
        os.write(2, b"cpuinfo\n")
    assert capfd.readouterr().err == "cpuinfo\n"
