"""Which checkpoint a run goes on from: the newest whose files are what was written.

The main rank looks, before anything is loaded or written, and tells the others.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from meshuffle.comm.group import RankEnv
from meshuffle.errors import MeshuffleError, RunError
from meshuffle.files import disk_errors
from meshuffle.train.checkpoint.checkpoint import META, checkpoints, read_checkpoint
from meshuffle.train.checkpoint.checksums import CHECKSUMS, find_damage

_ASIDE = "damaged-"


@dataclass(frozen=True)
class Found:
    """A checkpoint, or none; `lines` inform the user.

    Attributes:
        damaged: newer folders, and what is wrong with them.
    """

    folder: Path | None = None
    damaged: tuple[tuple[Path, str], ...] = ()
    lines: tuple[str, ...] = ()


def find_checkpoint(state: Path) -> Found:
    """Return the newest checkpoint in `state` that is whole; changes nothing.

    Raises:
        RunError: there are checkpoints, and none of them is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in checkpoints(state):
        damage = "; ".join(_find_damage(folder))
        if not damage:
            return Found(folder, tuple(damaged), _remarks(folder))
        damaged.append((folder, damage))
    if damaged or any(state.glob(f"{_ASIDE}*")):
        words = [f"{folder.name} ({damage})" for folder, damage in damaged]
        words += [path.name for path in sorted(state.glob(f"{_ASIDE}*"))]
        raise RunError(
            f"{state}: no checkpoint is whole: {', '.join(words)}; put back what is missing from a "
            f"copy, or train a new run with --from {shlex.quote(str(state.parent))}, which starts "
            "from its weights"
        )
    return Found()


def latest_checkpoint(state: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the meta data of the newest checkpoint in `state` that is whole.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    folder = find_checkpoint(state).folder
    if folder is None:
        raise RunError(f"{state}: no checkpoint yet; start the run again without --resume")
    return read_checkpoint(folder)


def agree_on_checkpoint(state: Path, env: RankEnv, control: dist.ProcessGroup) -> Found:
    """Return the same on all ranks: what the main rank found; it has set damaged folders aside.

    Raises:
        RunError: as of `find_checkpoint`, on every rank.
    """
    outcome: list[Found | MeshuffleError | None] = [None]
    if env.is_main:
        try:
            outcome = [_set_aside(state, find_checkpoint(state))]
        except MeshuffleError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=control)
    if isinstance(outcome[0], MeshuffleError):
        raise outcome[0]
    assert outcome[0] is not None
    return outcome[0]


def _set_aside(state: Path, found: Found) -> Found:
    """Rename damaged folders, so that they do not count among the newest, which are kept.

    None is deleted: a person may repair or compare it.
    """
    lines = []
    for folder, damage in found.damaged:
        aside = state / f"{_ASIDE}{folder.name}"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}~")
        with disk_errors(state.parent):
            folder.rename(aside)
        assert found.folder is not None
        lines.append(
            f"checkpoint {folder.name} is damaged: {damage}. Continuing from the one before, step "
            f"{_step(found.folder)}; the damaged one is kept as {state.name}/{aside.name}"
        )
    return Found(found.folder, lines=(*lines, *found.lines))


def _step(folder: Path) -> int:
    return int(json.loads((folder / META).read_text())["step"])


def _find_damage(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint; one of an earlier version is read as a whole."""
    try:
        return find_damage(folder)
    except FileNotFoundError:
        pass
    try:
        meta = read_checkpoint(folder)[1]
    except RunError as error:
        return [f"{CHECKSUMS} is missing; {str(error).removeprefix(f'{folder}: ')}"]
    return [f"{CHECKSUMS} is missing"] if meta.get("checksums") else []


def _remarks(folder: Path) -> tuple[str, ...]:
    if (folder / CHECKSUMS).exists():
        return ()
    return (f"checkpoint {folder.name} is of an earlier version: it has no checksums to verify",)
