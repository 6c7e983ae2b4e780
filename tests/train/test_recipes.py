"""Every recipe is whole: its settings are known, and its header says what it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshuffle.config import TrainConfig, check, read_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_settings_and_header(path: Path) -> None:
    config = check(TrainConfig(**read_config(path)))
    assert config.data
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    said = [line.split()[1] for line in header if line.startswith("# ") and line[2:3].isupper()]
    for word in ("Source", "Expected", "Time", "Command"):
        assert said.count(word) == 1, word
    command = next(line for line in header if line.startswith("# Command"))
    assert command.endswith(f"train {config.data} --config recipes/{path.name}")


def test_there_are_some() -> None:
    assert {"digits", "coco-classify", "imagenet-v2-long", "imagenet-v2-paper"} <= {
        path.stem for path in RECIPES
    }
