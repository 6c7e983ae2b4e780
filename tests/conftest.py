from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from meshuffle.dist.forking import fork_server

# Tests never assert times, and these machines are shared.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Threads of several test processes on few cores only hinder each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _rank_server() -> None:
    """See `tests/forked.py`; its imports go on beside the first tests."""
    fork_server("tests.forked")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this one process."""
    from meshuffle.dist.group import RankEnv, process_group

    with process_group(RankEnv(), torch.device("cpu")):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the project; tests skip where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    return folder
