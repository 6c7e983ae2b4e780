"""The records of a run, and what a person sees without a terminal."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from meshuffle.config import TrainConfig
from meshuffle.data import Preprocess
from meshuffle.errors import Interrupted, MeshuffleError
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.train import watch
from meshuffle.train.api import resume, train
from meshuffle.train.watch import columns, environment, watch_run
from tests.train.test_resume import stop_when

TASK = make_task(Card("none", ("a", "b"), Preprocess()))
COLUMNS = columns(TASK)

ROW: dict[str, Any] = {
    "epoch": 1,
    "step": 4,
    "lr": 0.1,
    "train_loss": 0.5,
    "train_top1": 75.0,
    "val_loss": 0.4,
    "val_top1": 80.0,
    "images_per_s": 10.0,
    "data_wait": 0.0,
    "seconds": 1.0,
}
VALUES = {"step": 4, "epoch": 1, "loss": 0.5, "top1": 75.0, "lr": 0.1, "images_per_s": 10.0}


def strict(line: str) -> dict[str, Any]:
    """Parse JSON without the NaN and Infinity that Python adds to it."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_records_of_a_stopped_and_resumed_run(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(small, epochs=4)
    with monkeypatch.context() as patch:
        stop_when(patch, "_step", 10)
        with pytest.raises(Interrupted):
            train(config)
    run = Path(small.out or "")
    assert [row["epoch"] for row in rows(run)] == ["1", "2"]
    resume(run)
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3", "4"]
    assert [row["step"] for row in rows(run)] == ["4", "8", "12", "16"]
    lines = [strict(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"step", "event"}
    texts = [line["text"] for line in lines if line["kind"] == "event"]
    assert any(text.startswith("stopped in epoch 3") for text in texts)
    assert "resumed at epoch 3, step 10" in texts
    assert list((run / "tensorboard").glob("events.out.*"))


def test_a_row_of_an_epoch_that_is_made_again_goes(tmp_path: Path) -> None:
    for first_epoch, expected in ((1, ["1"]), (2, ["1", "1"]), (1, ["1"])):
        with watch_run(
            tmp_path, TASK, first_step=0, first_epoch=first_epoch, quiet=True
        ) as records:
            records.end_epoch(ROW)
        assert [row["epoch"] for row in rows(tmp_path)] == expected
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert rows(tmp_path)[0]["val_top5"] == ""


def test_half_a_row_of_a_killed_run_goes(tmp_path: Path) -> None:
    text = ",".join(COLUMNS) + "\n1,4,0.1,0.5,75,0.4,80,,10,0,1\n2,"
    (tmp_path / "metrics.csv").write_text(text)
    with watch_run(tmp_path, TASK, first_step=4, first_epoch=2, quiet=True):
        pass
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]
    (tmp_path / "metrics.csv").write_text(text.removesuffix("2,") + "\0\0,")
    with watch_run(tmp_path, TASK, first_step=4, first_epoch=2, quiet=True):
        pass
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]


def test_plain_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_PLAIN_EVERY_S", 0.0)
    with watch_run(tmp_path, TASK, first_step=0, first_epoch=1, quiet=False) as records:
        records.begin_epoch(1, 3, 4, 0)
        records.step(VALUES, 4)
        records.end_epoch(ROW)
        records.event("a [bold]path[/bold] /tmp/" + "x" * 200)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    assert lines[0].startswith("epoch 1/3 step 4  loss 0.5000  top-1  75.0 %")
    assert "val top-1 80.00 %" in lines[1]
    assert lines[2] == "a [bold]path[/bold] /tmp/" + "x" * 200  # neither markup nor wrapped
    assert len(lines) == 3


def test_quiet_leaves_standard_output_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with watch_run(tmp_path, TASK, first_step=0, first_epoch=1, quiet=True) as records:
        records.event("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    with watch_run(tmp_path, TASK, first_step=0, first_epoch=1, quiet=True) as records:
        records.step({**VALUES, "loss": math.nan, "lr": math.inf}, 1)
    line = strict((tmp_path / "log.jsonl").read_text())
    assert line["loss"] is None
    assert line["lr"] is None


def test_a_loss_that_is_no_number_ends_the_run(small: TrainConfig) -> None:
    config = dataclasses.replace(small, lr=1e30)
    with pytest.raises(MeshuffleError, match=r"the loss is nan at step \d+.* lower --lr"):
        train(config)


def test_environment_is_plain_data() -> None:
    found = environment()
    assert strict(json.dumps(found)) == found
    assert {"meshuffle", "torch", "python", "device", "cores"} <= found.keys()
