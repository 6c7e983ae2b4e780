"""A small set of photos, a run on them, and commands that must fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meshuffle.cli import main
from meshuffle.report import report
from tests.launched import WRITE_REPORT

FAST = """
model = "shufflenet_v2_x0_5"
plan = "dp=1,threads=1"
epochs = 1
batch = 8
input_size = 32
workers = 0
compile = "off"
[knobs]
width = "0.25"
depths = "[1, 1, 1]"
head_channels = "32"
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos", ("blue", "red"))


def make_photos(root: Path, classes: Sequence[str], counts: tuple[int, int] = (9, 4)) -> Path:
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val"), counts, strict=True):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (36, 40, 3), dtype=np.uint8)
                pixels[..., 2 * label] += 120
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail with one line on standard error; return the line."""

    def run(*arguments: str, exit_code: int = 2) -> str:
        assert main(list(arguments)) == exit_code
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert lines[-1].startswith("error: ")
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert "Traceback" not in captured.err + captured.out
        return lines[-1]

    return run


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "fast.toml").write_text(FAST)
    out = folder / "run"
    arguments = ["--config", str(folder / "fast.toml"), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", WRITE_REPORT)
        assert main(["train", str(photos), *arguments]) == 0
    return out
