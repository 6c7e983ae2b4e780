"""Random programs are computed exactly, or refused; so are those that once were not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.ranks import PYTHON_PATH, ROOT

FOUND = Path(__file__).with_name("found")


def test_random_programs_and_those_that_were_found(tmp_path: Path) -> None:
    files = map(str, sorted(FOUND.glob("*.py")))
    options = ["--programs", "12", "--seed", "0", "--no-row", "--failures", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), *options, "--again", *files],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
