"""Tiny data sets, made in the test's own folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import noise


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[dict[str, int]], Path]:
    """make_folder({"train/ants": 3, …}) writes that many distinct PNGs per folder."""

    def make(counts: dict[str, int]) -> Path:
        seed = 0
        for folder, count in counts.items():
            (tmp_path / "photos" / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                seed += 1
                noise(seed).save(tmp_path / "photos" / folder / f"{i:03}.png")
        return tmp_path / "photos"

    return make


@pytest.fixture
def hymenoptera() -> Path:
    """Real photographs, which are not part of the project."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "hymenoptera"
    if not folder.is_dir():
        pytest.skip("the photographs of ../shared/data/hymenoptera are not on this machine")
    return folder
