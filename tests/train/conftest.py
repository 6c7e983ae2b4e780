from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meshuffle.train.config import TrainConfig

SMALL = {"width": "0.25", "depths": "[1, 1, 1]", "head_channels": "32"}


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 2 classes, 13 + 6 images each, that a small model can learn: red and blue."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 6)):
        for label, name in enumerate(("blue", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (40, 44, 3), dtype=np.uint8)
                pixels[..., 2 - 2 * label] += 120
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def small(photos: Path, tmp_path: Path) -> TrainConfig:
    """Settings of a run of a few seconds."""
    return TrainConfig(
        data=str(photos),
        model="shufflenet_v2_x0_5",
        knobs=SMALL,
        plan="dp=1,threads=1",
        epochs=3,
        batch=8,
        input_size=32,
        workers=0,
        compile="off",
        out=str(tmp_path / "run"),
    )
