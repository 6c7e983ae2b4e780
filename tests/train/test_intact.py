"""A damaged checkpoint is found before anything is written, and the one before is used."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from meshuffle.comm.group import RankEnv
from meshuffle.config import TrainConfig
from meshuffle.errors import RunError
from meshuffle.train.api import resume, train
from meshuffle.train.checkpoint import intact
from meshuffle.train.checkpoint.checkpoint import checkpoints, save_checkpoint
from meshuffle.train.checkpoint.intact import (
    agree_on_checkpoint,
    find_checkpoint,
    latest_checkpoint,
)
from tests.ranks import run_ranks
from tests.train.test_split_training import new_run, train_all

SHARD = "__0_0.distcp"


def truncate(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path, name: str = SHARD) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def scribble(folder: Path) -> None:
    (folder / "checksums.json").write_text('{"meta.json": 3}')


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, rf"{SHARD} has [\d,]+ bytes, and had [\d,]+"),
    "flipped": (flip, f"{SHARD} has changed: its checksum is another"),
    "no shard": (remove(SHARD), f"{SHARD} is missing"),
    "no meta": (remove("meta.json"), "meta.json is missing"),
    "flipped meta": (lambda f: flip(f, "meta.json"), "meta.json has changed"),
    "no index": (remove(".metadata"), r"\.metadata is missing"),
    "no checksums": (remove("checksums.json"), "checksums.json is missing"),
    "broken checksums": (scribble, "checksums.json cannot be read"),
    "no files": (empty, "checksums.json is missing"),
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    for step in (1, 2):
        tensors = {"model.weight": torch.full((40, 50), float(step))}
        save_checkpoint(tmp_path / "state", step, tensors, {})
    return tmp_path / "state"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_one_before_is_used(state: Path, name: str) -> None:
    assert find_checkpoint(state).folder == state / "step-00000002"
    damage, words = DAMAGES[name]
    damage(state / "step-00000002")
    before = content(state)
    found = find_checkpoint(state)
    assert found.folder == state / "step-00000001"
    ((damaged, told),) = found.damaged
    assert damaged.name == "step-00000002"
    assert "\n" not in told
    assert re.search(words, told), told
    assert content(state) == before
    tensors, meta = latest_checkpoint(state)
    assert (meta["step"], float(tensors["model.weight"].mean())) == (1, 1.0)


@pytest.mark.parametrize("name", DAMAGES)
def test_none_is_whole(state: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    for folder in state.iterdir():
        damage(folder)
    before = content(state)
    expected = rf"step-00000002 \(.*{words}.*step-00000001 \(.*{words}.*--from"
    with pytest.raises(RunError, match=expected) as error:
        find_checkpoint(state)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert content(state) == before


def make_old(folder: Path) -> None:
    """Turn a checkpoint into one of the version before checksums."""
    (folder / "checksums.json").unlink()
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksums"]
    (folder / "meta.json").write_text(json.dumps(meta))


def test_checkpoints_of_an_earlier_version(state: Path) -> None:
    for folder in state.iterdir():
        make_old(folder)
    found = find_checkpoint(state)
    assert found.folder == state / "step-00000002"
    assert "no checksums to verify" in found.lines[0]
    truncate(state / "step-00000002")  # what cannot be read is found by reading it
    found = find_checkpoint(state)
    assert found.folder == state / "step-00000001"
    assert "cannot be read" in found.damaged[0][1]


def damage_newest(run: Path) -> None:
    flip(sorted((run / "state").glob("step-*"))[-1])


def test_a_run_goes_on_from_the_one_before(
    small: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(train(dataclasses.replace(small, save_every="5", optimizer="adamw"))["run"])
    expected, _ = latest_checkpoint(run / "state")
    damage_newest(run)
    capsys.readouterr()
    resume(run)
    out = capsys.readouterr().out.replace("\n", " ")
    assert "checkpoint step-00000012 is damaged: __0_0.distcp has changed" in out
    assert "Continuing from the one before, step 10" in out
    tensors, meta = latest_checkpoint(run / "state")
    assert meta["step"] == 12
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    names = sorted(path.name for path in (run / "state").iterdir())
    assert names == ["damaged-step-00000012", "step-00000010", "step-00000012"]
    damage_newest(run)  # again: a second folder of that name
    resume(run)
    assert (run / "state" / "damaged-step-00000012~").is_dir()


def test_a_run_without_a_whole_checkpoint(small: TrainConfig) -> None:
    """It must not begin anew over what is there."""
    run = Path(train(dataclasses.replace(small, epochs=1, save_every="3"))["run"])
    for folder in (run / "state").iterdir():
        truncate(folder)
    before = content(run)
    with pytest.raises(RunError, match=r"no checkpoint is whole: step-00000004 \(__0_0.distcp"):
        resume(run)
    assert content(run) == before
    for folder in (run / "state").iterdir():  # as if the good one had been removed later
        folder.rename(folder.with_name(f"damaged-{folder.name}"))
    with pytest.raises(RunError, match="no checkpoint is whole: damaged-step-00000003"):
        resume(run)


def test_without_verification_the_damage_goes_unseen(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit in a tensor can be read: only the checksum finds it."""
    flip(state / "step-00000002")
    monkeypatch.setattr(intact, "find_damage", lambda _: [])
    tensors, _ = latest_checkpoint(state)
    assert not torch.equal(tensors["model.weight"], torch.full((40, 50), 2.0))


def agree_on_damaged(group: dist.ProcessGroup, state: Path) -> dict[str, tuple[str, str]]:
    """Return for each damage of the newest checkpoint which folder is taken, and what is told."""
    env, told = RankEnv(dist.get_rank(group), dist.get_world_size(group)), {}
    for name, (damage, _) in DAMAGES.items():
        copy = state.with_name(f"{state.name} {name}")
        if env.is_main:
            shutil.copytree(state, copy)
            damage(checkpoints(copy)[0])
        found = agree_on_checkpoint(copy, env, group)
        told[name] = (found.folder.name if found.folder else "none", found.lines[0])
    return told


def go_on_and_fail(
    group: dist.ProcessGroup, run: str
) -> tuple[bool, str, int, dict[str, tuple[str, str]]]:
    """Train, continue with a damaged checkpoint, and try with none; as one rank.

    Returns whether the second run ended as the first, the third one's error and exit code, and what
    `agree_on_damaged` returned.
    """
    state, first = Path(run) / "state", dist.get_rank(group) == 0
    train_all(group, [run])
    expected, _ = latest_checkpoint(state)
    told = agree_on_damaged(group, state)
    if first:
        damage_newest(Path(run))
    dist.barrier(group)
    train_all(group, [run])
    found, _ = latest_checkpoint(state)
    dist.barrier(group)
    if first:
        for folder in state.iterdir():
            truncate(folder)
    dist.barrier(group)
    with pytest.raises(RunError) as error:
        train_all(group, [run])
    same = all(torch.equal(found[name], expected[name]) for name in expected)
    return same, str(error.value), error.value.exit_code, told


def test_ranks_of_a_split_model_take_the_same_one(photos: Path, tmp_path: Path) -> None:
    run = new_run(photos, "simple tp=2:channel", tmp_path / "run", epochs=1, save_every="4")
    results = run_ranks(go_on_and_fail, 2, str(run))
    for same, error, exit_code, told in results:
        assert same
        assert told == results[0][3]
        assert re.search(r"no checkpoint is whole: step-00000006 \(.*step-00000004 \(", error)
        assert exit_code == 2
    for name, (_, words) in DAMAGES.items():
        taken, line = results[0][3][name]
        assert taken == "step-00000004"
        assert re.search(rf"step-00000006 is damaged: .*{words}.*one before, step 4;", line)
    log = (run / "log.jsonl").read_text()
    assert "checkpoint step-00000006 is damaged: __0_0.distcp has changed" in log
    assert "one before, step 4;" in log
