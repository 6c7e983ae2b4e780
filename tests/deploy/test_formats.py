"""Formats are found by name, and imported only when they are used."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshuffle
from meshuffle.deploy.formats import FORMATS, find_format
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


def test_no_module_of_deploy_imports_itself_through_others() -> None:
    """Imports for type checkers and inside functions count too."""
    root = Path(meshuffle.__file__).parent
    modules = {module_name(root, file): file for file in root.rglob("*.py")}
    needs = {
        name: {found for found in imported_by(file) if found in modules}
        for name, file in modules.items()
        if name.startswith("meshuffle.deploy.")
    }
    assert [*graphlib.TopologicalSorter(needs).static_order()]


def module_name(root: Path, file: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_by(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
