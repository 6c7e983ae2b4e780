"""Checkpoints: whole or not there, read without running code."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from meshuffle import files
from meshuffle.config import TrainConfig
from meshuffle.data import Preprocess
from meshuffle.errors import MeshuffleError, RunError
from meshuffle.tasks.card import Card
from meshuffle.train import state
from meshuffle.train.api import resume, train
from meshuffle.train.checkpoint.checkpoint import (
    checkpoints,
    locked,
    read_checkpoint,
    resume_command,
    save_checkpoint,
)
from meshuffle.train.checkpoint.intact import latest_checkpoint
from meshuffle.train.run import make_run_folder
from meshuffle.weights import read_weights, save_weights

TENSORS = {
    "model.weight": torch.arange(24.0).reshape(2, 3, 2, 2),
    "model.half": torch.ones(3, dtype=torch.bfloat16),
    "model.count": torch.tensor(7),
    "optim.weight.step": torch.tensor(3.0),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_round_trip(folder: Path) -> None:
    save_checkpoint(folder, 12, TENSORS, {"epoch": 2, "skipped": ["a.png: broken"]})
    tensors, meta = latest_checkpoint(folder)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert meta == {"step": 12, "epoch": 2, "skipped": ["a.png: broken"], "checksums": True}


def test_only_the_two_newest_are_kept(folder: Path) -> None:
    for step in (1, 2, 30, 4):
        save_checkpoint(folder, step, TENSORS, {})
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000004", "step-00000030"]
    assert latest_checkpoint(folder)[1]["step"] == 30


def test_the_same_step_again(folder: Path) -> None:
    save_checkpoint(folder, 1, TENSORS, {"try": 1})
    save_checkpoint(folder, 1, TENSORS, {"try": 2})
    assert latest_checkpoint(folder)[1]["try"] == 2


def test_no_checkpoint(folder: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint yet"):
        latest_checkpoint(folder)


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_malicious_index_runs_no_code(folder: Path, tmp_path: Path) -> None:
    saved = save_checkpoint(folder, 1, TENSORS, {})
    trace = tmp_path / "executed"
    (saved / ".metadata").write_bytes(pickle.dumps(Malice(trace)))
    with pytest.raises(RunError, match="which no checkpoint needs"):
        read_checkpoint(saved)
    with pytest.raises(RunError, match=r"\.metadata has"):
        latest_checkpoint(folder)
    (saved / "checksums.json").unlink()  # as of an earlier version, which is read to verify it
    with pytest.raises(RunError, match="which no checkpoint needs"):
        latest_checkpoint(folder)
    assert not trace.exists()
    pickle.loads((saved / ".metadata").read_bytes())  # the plant works where it is let
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"garbage", b"(lp0\n.", b"\x80\x04N."])
def test_a_broken_index(folder: Path, content: bytes) -> None:
    saved = save_checkpoint(folder, 1, TENSORS, {})
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(RunError, match="cannot be read") as error:
        read_checkpoint(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("meta", ["", "{", "3", "[1]"])
def test_broken_numbers(folder: Path, meta: str) -> None:
    saved = save_checkpoint(folder, 1, TENSORS, {})
    (saved / "meta.json").write_text(meta)
    with pytest.raises(RunError, match="cannot be read"):
        read_checkpoint(saved)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_kill_between_the_renames_of_one_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """The step is written again: before the new folder has its place, and before the old goes."""
    save_checkpoint(folder, 1, TENSORS, {"try": 1})
    with monkeypatch.context() as patch:
        if stage == 1:
            patch.setattr(Path, "replace", only_files(Path.replace))
            with pytest.raises(MeshuffleError):
                save_checkpoint(folder, 1, TENSORS, {"try": 2})
        else:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            save_checkpoint(folder, 1, TENSORS, {"try": 2})
    names = [path.name for path in checkpoints(folder)]
    assert names == ["step-00000001", "step-00000001.before"][2 - stage :]
    assert latest_checkpoint(folder)[1]["try"] == stage
    save_checkpoint(folder, 1, TENSORS, {"try": 3})
    assert latest_checkpoint(folder)[1]["try"] == 3
    assert [path.name for path in checkpoints(folder)] == ["step-00000001"]


def only_files(replace: Callable[..., Any]) -> Callable[..., Any]:
    def moved(self: Path, target: Path) -> Path:
        return full() if self.name.endswith(".tmp") and self.is_dir() else replace(self, target)

    return moved


def test_steps_are_numbers(folder: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_checkpoint(folder, step, TENSORS, {})
    (folder / "step-by-step").mkdir()
    assert latest_checkpoint(folder)[1]["step"] == 100_000_000


def test_what_a_kill_left_is_ignored_and_removed(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(folder, 1, TENSORS, {})
    left = folder / ".step-00000002.4711.tmp"
    left.mkdir()
    (left / "part").write_bytes(b"half")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / ".best.safetensors.4711.tmp").write_bytes(b"half")
    assert latest_checkpoint(folder)[1]["step"] == 1
    with locked(tmp_path):
        assert not left.exists()
        assert list(weights.iterdir()) == []
    assert latest_checkpoint(folder)[1]["step"] == 1


def failing(number: int) -> Callable[..., Any]:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, None])
def test_where_there_are_no_locks_a_run_goes_on_and_says_so(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    """None: no `fcntl`, as on Windows. What another process may be writing stays."""
    if number is None:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", failing(number))
    run = Path(train(dataclasses.replace(small, epochs=1))["run"])
    reason = os.strerror(number) if number else "this system has no file locks"
    assert f"cannot be locked ({reason}): let no other process" in (run / "log.jsonl").read_text()
    (run / ".part.tmp").touch()
    with locked(run), locked(run):
        assert (run / ".part.tmp").exists()


def test_another_error_of_the_lock_is_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", failing(errno.EIO))
    with pytest.raises(RunError, match="cannot be locked: Input/output error"), locked(tmp_path):
        pass


def test_training_in_a_thread_catches_no_signals(small: TrainConfig) -> None:
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, dataclasses.replace(small, epochs=1)).result()
    assert Path(result["run"], "result.json").exists()


def test_commands_that_are_printed_can_be_pasted(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    (run / "state" / "damaged-step-1").mkdir(parents=True)
    assert resume_command(run) == f"meshuffle train --resume '{run}'"
    with pytest.raises(RunError, match=f"--from '{run}', which"):
        latest_checkpoint(run / "state")
    with pytest.raises(RunError, match=f"--resume '{run}'"):
        make_run_folder(TrainConfig(out=str(run)))


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("part", ["shard", "numbers", "rename"])
def test_a_full_disk_leaves_the_older_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    save_checkpoint(folder, 1, TENSORS, {})
    if part == "shard":
        monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    elif part == "numbers":
        monkeypatch.setattr(files, "sync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MeshuffleError, match=r"cannot write to .*MB are free") as error:
        save_checkpoint(folder, 2, TENSORS, {})
    monkeypatch.undo()
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    tensors, meta = latest_checkpoint(folder)
    assert meta["step"] == 1
    assert torch.equal(tensors["model.weight"], TENSORS["model.weight"])
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]


def test_weights_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, card = tmp_path / "w.safetensors", Card("m", ("a", "b"), Preprocess.imagenet(32))
    save_weights(path, {"x": torch.ones(2)}, card)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        with pytest.raises(MeshuffleError, match="No space left on device"):
            save_weights(path, {"x": torch.zeros(2)}, card)
    assert read_weights(path)[0]["x"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_run_that_fills_the_disk_can_go_on(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = 0
    save = state.checkpoint.save_checkpoint

    def second_fails(*arguments: Any) -> Any:
        nonlocal saves
        saves += 1
        with files.disk_errors(Path(small.out or "")):
            return full() if saves == 2 else save(*arguments)

    config = dataclasses.replace(small, save_every="3")
    with monkeypatch.context() as patch:
        patch.setattr(state.checkpoint, "save_checkpoint", second_fails)
        with pytest.raises(MeshuffleError, match="No space left"):
            train(config)
    whole = train(dataclasses.replace(config, out=f"{small.out}-whole"))["run"]
    run = resume(Path(small.out or ""))["run"]
    a, b = (latest_checkpoint(Path(r) / "state")[0] for r in (run, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_another_model(small: TrainConfig) -> None:
    run = Path(train(dataclasses.replace(small, epochs=1))["run"])
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('head_channels = "32"', 'head_channels = "16"'))
    with pytest.raises(RunError, match="does not fit the model of the run's config") as error:
        resume(run)
    assert "\n" not in str(error.value)
