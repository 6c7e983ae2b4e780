"""Ranks that fail, in every way: one line and the exit code reach the parent, at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshuffle.comm.launch import report_failure, torchrun
from meshuffle.errors import DataError, Interrupted, MeshuffleError, RankFailed
from tests.ranks import PYTHON_PATH, ROOT


def launch(how: str, *arguments: str) -> None:
    torchrun(
        "tests.comm.crash",
        [how, *arguments],
        2,
        threads=1,
        environment={"PYTHONPATH": PYTHON_PATH},
    )


def handlers_of_signals() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun` leaves variables behind, on purpose; not here."""
    for name in ("PYTHONPATH", "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")


@pytest.mark.parametrize(
    ("how", "says", "exit_code"),
    [
        ("input", "photos: no such\nfolder", 2),
        ("kill", "rank 1 of 2 was killed by signal 9", 1),
        pytest.param(
            *("fault", "unexpected ZeroDivisionError: by zero; --debug shows where", 1),
            marks=pytest.mark.slow,
        ),
        pytest.param(*("exit", "rank 1 of 2 exited with 7", 7), marks=pytest.mark.slow),
    ],
)
def test_the_first_failure_reaches_the_parent(
    how: str, says: str, exit_code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the other rank, which would wait half an hour, ends without a word of its own."""
    handlers = handlers_of_signals()
    with pytest.raises(RankFailed) as error:
        launch(how)
    assert handlers_of_signals() == handlers  # Ctrl-C stops what comes next, as before
    assert str(error.value).startswith(says)
    assert error.value.exit_code == exit_code
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_rank_that_was_stopped_stops_the_run() -> None:
    with pytest.raises(Interrupted) as stopped:
        launch("term")
    assert stopped.value.exit_code == 143


@pytest.mark.slow
def test_threads_reach_the_ranks(tmp_path: Path) -> None:
    launch("threads", str(tmp_path))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from meshuffle.comm.launch import torchrun\n"
        f"torchrun('tests.comm.crash', ['wait', {str(tmp_path)!r}], 2, threads=1)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    pids: list[int] = []
    while len(pids) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        texts = [path.read_text() for path in tmp_path.glob("*.pid")]
        pids = [int(text) for text in texts if text]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2
    assert not any(map(runs, pids))


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_failure_is_written_for_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    causes: list[tuple[Exception, int, bool]] = [
        (DataError("a"), 2, True),
        (MeshuffleError("b"), 1, True),
        (RankFailed("rank 0 of 2 has died"), 1, False),
        (RuntimeError("[gloo] Connection closed by peer"), 1, False),
        (OSError(28, "No space left on device"), 1, True),
    ]
    for error, exit_code, cause in causes:
        assert report_failure(error) == exit_code
        record = json.loads(path.read_text())["message"]
        assert record["cause"] is cause
    assert record["message"] == "No space left on device"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert report_failure(DataError("nobody asks")) == 2
