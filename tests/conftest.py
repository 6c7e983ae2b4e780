from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from meshuffle.comm.forking import fork_server
from meshuffle.comm.launch import torchrun
from meshuffle.config import TrainConfig
from meshuffle.report import report
from meshuffle.train.api import train
from tests.durations import (  # noqa: F401  # hooks of pytest
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)
from tests.launched import LAUNCHERS, WRITE_REPORT, forked_torchrun, no_report

# Tests never assert times, and these machines are shared. `make test-all` takes the profile `all`.
settings.register_profile("quick", deadline=None, max_examples=40)
settings.register_profile("all", deadline=None)
settings.load_profile("quick")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Threads of several test processes on few cores only hinder each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _rank_server() -> Iterator[None]:
    """See `tests/forked.py` and `tests/launched.py`; the imports go on beside the first tests."""
    fork_server("tests.forked")
    with pytest.MonkeyPatch.context() as patch:
        for module in LAUNCHERS:
            patch.setattr(module, "torchrun", forked_torchrun)
        yield


@pytest.fixture
def real_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are started as for a user."""
    for module in LAUNCHERS:
        monkeypatch.setattr(module, "torchrun", torchrun)


@pytest.fixture(autouse=True, scope="session")
def _no_report() -> Iterator[None]:
    """Most tests do not read the report of their run, which takes seconds; see `with_report`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", no_report)
        yield


@pytest.fixture
def with_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of this test write their reports."""
    monkeypatch.setattr(report, "write_report", WRITE_REPORT)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this one process."""
    from meshuffle.comm.group import RankEnv, process_group

    with process_group(RankEnv(), torch.device("cpu")):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the project; tests skip where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    return folder


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
    return small_config(photos, tmp_path / "run")


@pytest.fixture(scope="session")
def one_epoch(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `small` with one epoch; tests that change it take a copy."""
    config = small_config(photos, tmp_path_factory.mktemp("one_epoch") / "run")
    return Path(train(dataclasses.replace(config, epochs=1))["run"])


def small_config(photos: Path, out: Path) -> TrainConfig:
    """Return the settings of a run of a few seconds."""
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
        out=str(out),
    )
