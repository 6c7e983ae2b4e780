"""Files are written beside training: of the state as it was, one at a time, to the end."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch

from meshuffle.config import TrainConfig
from meshuffle.errors import Interrupted, MeshuffleError
from meshuffle.train import loop
from meshuffle.train.api import train
from meshuffle.train.checkpoint import checkpoint
from meshuffle.train.checkpoint.checkpoint import read_checkpoint, save_checkpoint
from meshuffle.train.checkpoint.intact import latest_checkpoint
from meshuffle.train.checkpoint.saver import Saver
from meshuffle.weights import read_weights
from tests.train.test_resume import stop_when


def fail() -> None:
    raise MeshuffleError("the disk is full")


@pytest.mark.parametrize("where", ["check", "submit", "copy", "wait", "end"])
def test_an_error_reaches_the_loop(where: str) -> None:
    with pytest.raises(MeshuffleError, match="the disk is full"), Saver() as saver:
        saver.submit(fail)
        if where == "check":
            until = time.monotonic() + 10
            while time.monotonic() < until:
                saver.check()
            raise AssertionError("the error never came")
        elif where == "submit":
            saver.submit(lambda: None)
        elif where == "copy":
            saver.copy({})
        elif where == "wait":
            saver.wait()


def test_an_error_of_the_loop_comes_first() -> None:
    done = []
    with pytest.raises(KeyError), Saver() as saver:
        saver.submit(lambda: (time.sleep(0.1), done.append(1), fail())[0])
        raise KeyError
    assert done == [1]  # and the write had its time


def test_one_at_a_time() -> None:
    running, most, order = 0, 0, []

    def job(number: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        order.append(number)
        running -= 1

    with Saver() as saver:
        for number in range(5):
            saver.submit(lambda number=number: job(number))
    assert (most, order) == (1, [0, 1, 2, 3, 4])


def held_until_the_epoch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the write of step 3 wait until step 4 has been done."""
    ended, close, save = threading.Event(), loop.Loop._close_epoch, checkpoint.save_checkpoint

    def close_epoch(self: loop.Loop) -> None:
        ended.set()
        close(self)

    def save_late(state: Path, step: int, *rest: Any) -> Path:
        if step == 3:
            assert ended.wait(60), "the loop waits for the write"
        return save(state, step, *rest)

    monkeypatch.setattr(loop.Loop, "_close_epoch", close_epoch)
    monkeypatch.setattr(checkpoint, "save_checkpoint", save_late)


def test_what_is_written_is_the_state_of_its_step(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late: the optimiser changes parameters, moments and averages in place."""
    config = dataclasses.replace(small, epochs=1, save_every="3", optimizer="adamw", ema=0.9)
    runs = [Path(train(dataclasses.replace(config, out=f"{small.out}-whole"))["run"])]
    with monkeypatch.context() as patch:
        held_until_the_epoch_ends(patch)
        runs.append(Path(train(config)["run"]))
    expected, found = (read_checkpoint(run / "state" / "step-00000003") for run in runs)
    changed = [n for n, t in expected[0].items() if not torch.equal(t, found[0][n])]
    assert not changed
    assert {key.partition(".")[0] for key in found[0]} == {"model", "optim", "ema"}
    for name in ("epoch", "epoch_step", "step", "finished", "sums"):
        assert found[1][name] == expected[1][name]
    later = read_checkpoint(runs[1] / "state" / "step-00000004")[0]
    kinds = {n.partition(".")[0] for n, t in later.items() if not torch.equal(t, found[0][n])}
    assert kinds == {"model", "optim", "ema"}  # otherwise nothing would have been to be seen


def test_last_weights_are_those_of_the_checkpoint(small: TrainConfig) -> None:
    for ema, prefix in ((0.0, "model."), (0.9, "ema.module.")):
        config = dataclasses.replace(small, epochs=1, ema=ema, out=f"{small.out}-{ema}")
        run = Path(train(config)["run"])
        tensors, card = read_weights(run / "weights" / "last.safetensors")
        saved = latest_checkpoint(run / "state")[0]
        of_model = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        assert tensors.keys() == of_model.keys()
        assert all(torch.equal(tensors[name], of_model[name]) for name in tensors)
        assert card is not None
        assert (card.epoch, card.metrics) == (1, {})


def test_a_signal_waits_for_the_write(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save_checkpoint

    def slow(*arguments: Any) -> Path:
        time.sleep(0.5)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    stop_when(monkeypatch, "_step", 2)
    with pytest.raises(Interrupted, match="continue with: meshuffle train --resume"):
        train(small)
    assert latest_checkpoint(Path(small.out or "") / "state")[1]["step"] == 2


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *_: fail())


def test_a_failed_write_ends_the_next_step(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = [], loop.Loop._step

    def counted(self: loop.Loop, batch: Any) -> None:
        step(self, batch)
        steps.append(1)
        if job := self.saver._job:
            futures.wait([job], 60)

    monkeypatch.setattr(loop.Loop, "_step", counted)
    failing(monkeypatch)
    with pytest.raises(MeshuffleError, match="the disk is full"):
        train(dataclasses.replace(small, save_every="2"))
    assert len(steps) == 2


def test_a_failed_write_is_not_a_stop_that_saved(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch)
    stop_when(monkeypatch, "_step", 2)
    with pytest.raises(MeshuffleError, match="the disk is full"):
        train(small)


KILLED = """
import sys, time, torch, torch.distributed.checkpoint as dcp
from pathlib import Path
from meshuffle.train.checkpoint.checkpoint import save_checkpoint
from meshuffle.train.checkpoint.saver import Saver
def stuck(self, *_):
    (Path(self.path) / "__0_0.distcp").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
dcp.FileSystemWriter.write_data = stuck
with Saver() as saver:
    tensors = saver.copy({"x": torch.zeros(3)})
    saver.submit(lambda: save_checkpoint(Path(sys.argv[1]), 2, tensors, {}))
"""


def test_kill_9_in_the_middle_of_a_write(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)}, {})
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert list(tmp_path.glob(".*.tmp"))
    tensors, meta = latest_checkpoint(tmp_path)
    assert (meta["step"], tensors["x"].tolist()) == (1, [1, 1, 1])
