"""A run that continues on other data than it began with: refused, or said."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from meshuffle.config import TrainConfig
from meshuffle.data import open_data
from meshuffle.errors import DataError, Interrupted, RunError
from meshuffle.train.api import resume, train
from meshuffle.train.checkpoint import data_record
from meshuffle.train.checkpoint.data_record import FILE, data_changes, write_data_record
from tests.train.test_resume import stop_when


@pytest.fixture
def data(photos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "my photos"))


@pytest.fixture
def stopped(small: TrainConfig, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped in the last step of epoch 2 of 4."""
    with monkeypatch.context() as patch:
        stop_when(patch, "_step", 7)
        with pytest.raises(Interrupted):
            train(dataclasses.replace(small, data=str(data), epochs=4))
    return Path(small.out or "")


def test_other_classes_are_refused(stopped: Path, data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "red").rename(data / split / "aaa")
    says = (
        rf"other classes than .* \(new: aaa; gone: red\): it had blue, red, and now aaa, blue; .* "
        rf"meshuffle train '{data}' --from {stopped}$"
    )
    with pytest.raises(DataError, match=says):
        resume(stopped)
    for split in ("train", "val"):
        (data / split / "aaa").rename(data / split / "red")
        shutil.copytree(data / split / "red", data / split / "zebra")
    with pytest.raises(DataError, match=r"\(new: zebra\)"):
        resume(stopped)


def test_other_files_are_listed_and_the_run_goes_on(stopped: Path, data: Path) -> None:
    """Fewer steps are in an epoch than the run has done of it; its rate still only falls."""
    for path in (data / "train").rglob("*.png"):
        if len(path.stem) == 2 or path.stem > "2":  # all but three of each class
            path.unlink()
    shutil.copy(data / "val" / "red" / "0.png", data / "val" / "red" / "new.png")
    (data / "val" / "red" / "1.png").write_bytes((data / "val" / "red" / "2.png").read_bytes())
    result = resume(stopped)
    log = (stopped / "log.jsonl").read_text()
    assert "1 added (val/red/new.png); 20 removed (train/blue/10.png, train/blue/11.png, " in log
    assert "no longer the same as one without a stop" in log
    assert result["metrics"]["val"]["top1"] >= 0
    rows = [line.split(",") for line in (stopped / "metrics.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    rates = [float(row[2]) for row in rows]
    assert rates[1:] == sorted(rates[1:], reverse=True) and min(rates) > 0


def test_the_same_data_are_not_mentioned(stopped: Path, data: Path) -> None:
    assert data_changes(stopped, open_data(str(data))) == []
    moved = data.rename(data.with_name("elsewhere"))
    assert data_changes(stopped, open_data(str(moved))) == []


def test_a_run_without_a_record_resumes_as_before(stopped: Path) -> None:
    (stopped / FILE).write_bytes(b"\x1f\x8b broken")
    with pytest.raises(RunError, match="delete it to continue"):
        resume(stopped)
    (stopped / FILE).unlink()
    resume(stopped)
    assert "have changed" not in (stopped / "log.jsonl").read_text()


def test_what_changes_are_seen(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def after(change: object) -> str:
        return " ".join(data_changes(tmp_path, open_data(str(data))))

    def record() -> None:
        write_data_record(tmp_path, open_data(str(data)))

    first = data / "train" / "red" / "0.png"
    record()
    assert after(first.write_bytes(first.read_bytes() + b"\0")).count("1 of another size") == 1
    table = data / "table.csv"
    rows = [
        f"{p.relative_to(data)},{p.parent.name},train"
        for p in sorted((data / "train").rglob("*.png"))
    ]
    rows += [f"{p.relative_to(data)},{p.parent.name},val" for p in (data / "val").rglob("*.png")]
    for lines, says in (
        (rows, ""),
        ([rows[0].replace(",blue,", ",red,"), *rows[1:]], "other labels or another order"),
        (rows[::-1], "other labels or another order"),
        ([row.replace(",val", ",train") if "val/red/0" in row else row for row in rows], "1 moved"),
    ):
        table.write_text("\n".join(["image,label,split", *lines]))
        opened = open_data(f"csv:{table}")
        if lines is rows:
            write_data_record(tmp_path, opened)
        assert says in " ".join(data_changes(tmp_path, opened))
    monkeypatch.setattr(data_record, "_MOST_LISTED", 3)
    record()
    first.unlink()
    assert "train: 26 images, now 25" in after(None)
    write_data_record(tmp_path, open_data("digits"))
    assert data_changes(tmp_path, open_data("digits")) == []
