"""Runs that are stopped, killed and launched by others, by the command line. Minutes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from meshuffle.train.checkpoint.intact import latest_checkpoint
from tests.cli.conftest import FAST, make_photos
from tests.ranks import free_port

pytestmark = pytest.mark.slow

PLANS = ["dp=1,threads=1", "dp=2,threads=1", "tp=2:channel,threads=1"]
MESHUFFLE = [sys.executable, "-m", "meshuffle"]
EPOCHS = 40
RUN = ["train", "photos", "--config", "fast.toml", "--out", "run"]
TRAIN = [*RUN, "--epochs", str(EPOCHS)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", ("blue", "red"))
    (tmp_path / "fast.toml").write_text(FAST)
    return tmp_path


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command line in a process group of its own, and wait for its second epoch."""
    process = subprocess.Popen(
        [*MESHUFFLE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: num_epochs(Path("run")) >= 2, process)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def wait_for(condition, process: subprocess.Popen[str] | None = None) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def num_epochs(run: Path) -> int:
    try:
        return len((run / "metrics.csv").read_text().splitlines()) - 1
    except OSError:
        return 0


def ranks_of(run: Path) -> list[int]:
    """Return the process ids of the ranks that train in `run`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"meshuffle.train.rank" in words and str(run.resolve()).encode() in words:
                found.append(int(folder.name))
    return sorted(found)


def finish(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MESHUFFLE, *arguments], capture_output=True, text=True, timeout=200)


def resume_and_compare(plan: str) -> None:
    """The stopped run goes on and ends as the one that nobody stopped."""
    done = finish("train", "--resume", "run")
    assert done.returncode == 0, done.stderr
    assert num_epochs(Path("run")) == EPOCHS
    whole = finish(*RUN[:-1], "whole", "--epochs", str(EPOCHS), "--plan", plan)
    assert whole.returncode == 0, whole.stderr
    a, b = (latest_checkpoint(Path(run) / "state")[0] for run in ("run", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)],
)
def test_a_signal_saves_and_exits(plan: str, number: signal.Signals, whole_group: bool) -> None:
    """Sent to the command alone, or as a terminal sends it, to its whole process group."""
    with started(*TRAIN, "--plan", plan) as process:
        if whole_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        assert "Traceback" not in err
        assert "error:" not in err
        assert (out + err).count("stopped") == 1 and "continue with" in out, err
    assert ranks_of(Path("run")) == []
    stopped_at = num_epochs(Path("run"))
    assert 2 <= stopped_at < EPOCHS
    if number == signal.SIGINT and whole_group:
        resume_and_compare(plan)


@pytest.mark.parametrize("plan", PLANS[1:])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loader_processes_are_no_hindrance(plan: str, number: signal.Signals) -> None:
    """The signal takes the workers too, in training or in evaluation: the run is saved still."""
    for delay in (0.0, 0.15, 0.3, 0.6):
        with started(*TRAIN, "--plan", plan, "--workers", "1") as process:
            time.sleep(delay)
            os.killpg(process.pid, number)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 128 + number, err
            assert "Traceback" not in err
        assert latest_checkpoint(Path("run/state"))[1]["step"] > 0
        Path("run").rename(f"run-{delay}")


@pytest.mark.parametrize("plan", PLANS)
def test_kill_9_of_everything_loses_little(plan: str) -> None:
    with started(*TRAIN, "--plan", plan, "--save-every", "3") as process:
        ranks = ranks_of(Path("run"))
        assert len(ranks) == (0 if "dp=1" in plan else 2)
        for pid in [process.pid, *ranks]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    resume_and_compare(plan)


def test_kill_9_of_the_command_ends_the_ranks() -> None:
    with started(*TRAIN, "--plan", "dp=2,threads=1") as process:
        process.kill()
        process.wait()
        wait_for(lambda: not ranks_of(Path("run")))
    assert latest_checkpoint(Path("run/state"))[1]["step"] > 0  # they saved before
    resume_and_compare("dp=2,threads=1")


@pytest.mark.parametrize("plan", PLANS[1:])
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_one_rank_ends_the_other(plan: str, victim: int) -> None:
    with started(*TRAIN, "--plan", plan) as process:
        os.kill(ranks_of(Path("run"))[victim], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        lines = [line for line in err.splitlines() if line]
        assert len(lines) == 1, err
        assert "was killed by signal 9" in lines[0]
    assert ranks_of(Path("run")) == []


@pytest.mark.parametrize("plan", PLANS[1:])
def test_a_rank_asked_to_stop_stops_all(plan: str) -> None:
    with started(*TRAIN, "--plan", plan) as process:
        os.kill(ranks_of(Path("run"))[1], signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        assert "Traceback" not in err
    assert latest_checkpoint(Path("run/state"))[1]["step"] > 0


@pytest.mark.parametrize("plan", PLANS)
def test_data_that_vanishes(plan: str, here: Path) -> None:
    """Every image is reported once; the run does not hang."""
    with started(*TRAIN, "--plan", plan) as process:
        (here / "photos" / "train").rename(here / "elsewhere")
        _, err = process.communicate(timeout=250)
        assert process.returncode in (0, 2), err
        assert "Traceback" not in err


def check_launched(out: str, err: str) -> None:
    assert "Traceback" not in err
    lines = out.splitlines()
    assert len(lines) == 1
    assert Path(json.loads(lines[0])["run"]).name == "run"


def test_torchrun() -> None:
    script = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*script, "-m", "meshuffle", *RUN, "--epochs", "2", "--plan", "dp=2,threads=1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check_launched(done.stdout, done.stderr)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode != 0
    assert again.stderr.count("error: --out") == 1


def slurm(*arguments: str) -> list[tuple[int, str, str]]:
    """Start two tasks as `srun --ntasks 2` does; return (exit code, out, err) of each."""
    shared = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [
        subprocess.Popen(
            [*MESHUFFLE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
        )
        for rank in "01"
    ]
    texts = [task.communicate(timeout=120) for task in tasks]
    return [(task.returncode, *text) for task, text in zip(tasks, texts, strict=True)]


def test_slurm() -> None:
    main, other = slurm(*RUN, "--epochs", "2", "--plan", "auto", "--json")
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    check_launched(main[1], main[2])
    assert "plan dp=2: the ranks that were launched" in main[2]
    assert other[1] == ""
    main, other = slurm("train", "--resume", "run")
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    main, other = slurm(*RUN[:-1], "run2", "--plan", "dp=3")
    assert (main[0], other[0]) == (2, 2)
    assert "has 3 ranks, but the launcher started 2" in main[2]
    assert other[2] == ""
