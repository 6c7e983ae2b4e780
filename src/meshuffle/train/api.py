"""What the verbs do, as functions: train, resume, evaluate, predict."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshuffle.data import decode_image, eval_loader, open_data, relabel
from meshuffle.data.base import Data
from meshuffle.dist.device import pick_device
from meshuffle.dist.group import RankEnv, process_group, rank_env
from meshuffle.errors import DataError, ImageError, MeshuffleError
from meshuffle.train import evaluate as evaluation
from meshuffle.train.config import Origin, TrainConfig, to_toml
from meshuffle.train.rank import train_rank
from meshuffle.train.run import Prepared, absolute_data, launch, prepare, reopen, resolve_for
from meshuffle.train.weights import load_model

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def train(config: TrainConfig, origins: Mapping[str, Origin] | None = None) -> dict[str, Any]:
    """Train as `config` says, in as many ranks as its plan has; returns what `--json` prints.

    Under torchrun or SLURM every rank calls this; the main one prepares the run folder.
    """
    env = rank_env()
    if env is not None:
        return _train_launched(config, origins or {}, env)
    return _run(prepare(config, origins or {}))


def resume(run: Path, *, model: str | None = None) -> dict[str, Any]:
    """Continue the run folder `run` with its own settings.

    Args:
        model: repeats the name of a `package.module:function` model, to allow its import.
    """
    env = rank_env()
    prepared = reopen(run.expanduser().resolve(), env, model)
    if env is not None:
        if env.is_main:
            _say(str(prepared.run))
        train_rank(prepared.run)
        return _result(prepared) if env.is_main else {"run": str(prepared.run)}
    return _run(prepared)


def _run(prepared: Prepared) -> dict[str, Any]:
    _say(str(prepared.run), *prepared.lines)
    launch(prepared)
    return _result(prepared)


def _train_launched(
    config: TrainConfig, origins: Mapping[str, Origin], env: RankEnv
) -> dict[str, Any]:
    """Let the main rank prepare, tell the others where, and train.

    Where that fails the main rank says why, and the others end with its exit code.
    """
    with process_group(env, pick_device(config.device, env.local_rank)):
        message: list[Any] = [None]
        if env.is_main:
            try:
                prepared = prepare(config, origins, env)
                message = [str(prepared.run)]
                _say(str(prepared.run), *prepared.lines)
            except Exception as error:
                exit_code = error.exit_code if isinstance(error, MeshuffleError) else 1
                dist.broadcast_object_list([exit_code], src=0)
                raise
        dist.broadcast_object_list(message, src=0)
        if isinstance(message[0], int):
            raise SystemExit(message[0])
        train_rank(Path(message[0]))
    return _result(prepared) if env.is_main else {"run": message[0]}


def _result(prepared: Prepared) -> dict[str, Any]:
    """Return the fixed keys of train's JSON, and print the end of a run."""
    result = json.loads((prepared.run / "result.json").read_text())
    for split, metrics in result["splits"].items():
        if metrics:
            _say(f"{split}: top-1 {metrics['top1']:.2f} %, best epoch {result['best_epoch']}")
    if result["skipped_inputs"]:
        _say(f"{result['skipped_inputs']} unreadable images were skipped (see report.html)")
    _say(f"report: {prepared.run / 'report.html'}")
    return {
        "run": str(prepared.run),
        "metrics": result["splits"],
        "skipped_inputs": result["skipped_inputs"],
        "predicted_step_ms": prepared.plan.predicted_step_ms,
        "measured_step_ms": result["measured_step_ms"],
    }


def _say(*lines: str) -> None:
    """Print lines: to standard error where standard output is for JSON."""
    file = sys.stderr if os.environ.get("MESHUFFLE_QUIET_STDOUT") == "1" else sys.stdout
    for line in lines:
        print(line, file=file, flush=True)


def describe_config(
    config: TrainConfig, origins: Mapping[str, Origin]
) -> tuple[dict[str, Any], str]:
    """Return the resolved settings as plain data and as TOML with origins; trains nothing."""
    resolved = resolve_for(config, open_data(config.data, need=("train", "val")))
    full = {
        name: origins.get(name, "chosen" if getattr(config, name) != value else "default")
        for name, value in vars(resolved).items()
    }
    values = {k: {"value": v, "origin": full[k]} for k, v in dataclasses.asdict(resolved).items()}
    return values, to_toml(resolved, full).rstrip()


def evaluate(
    target: Path,
    *,
    data: str | None = None,
    split: str | None = None,
    batch: int = 64,
    model: str | None = None,
) -> tuple[evaluation.Evaluation, str]:
    """Evaluate the weights of `target`; returns the evaluation and `DATA split`.

    Args:
        target: a run folder or a weights file.
        data: DATA; None is the one that the weights were trained on. All of another folder that
            has no splits is evaluated, as its train split.
        split: None is test where the data has one, else val.

    Raises:
        DataError: no such split; RunError: no such weights.
    """
    network, card = load_model(target, model)
    opened = open_data(data or card.data, need=())
    own = data is None or absolute_data(data) == card.data
    if own and "train" in opened.splits and "val" not in opened.splits:
        opened = open_data(card.data, need=("train", "val"))  # the part that training set aside
    opened = relabel(opened, card.classes)
    split = split or _last_split(opened)
    if split not in opened.splits:
        raise DataError(f"{opened.spec} has no {split} split; it has {', '.join(opened.splits)}")
    device = pick_device()
    batches = eval_loader(opened.splits[split], card.preprocess, batch_size=batch)
    found = evaluation.evaluate(network.to(device), batches, card.classes, card.preprocess, device)
    return found, f"{opened.spec} {split}"


def _last_split(data: Data) -> str:
    return next((s for s in ("test", "val", "train") if s in data.splits), "val")


@torch.inference_mode()
def predict(
    target: Path, images: Sequence[Path], *, model: str | None = None
) -> list[dict[str, Any]]:
    """Return `{"file", "label", "probability"}` per image, or `{"file", "error"}`.

    Args:
        target: a run folder or a weights file.
        images: image files, or folders that hold some.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    network, card = load_model(target, model)
    device = pick_device()
    network.to(device)
    values: list[dict[str, Any]] = []
    for path in _expanded(images):
        try:
            bytes_1CHW = card.preprocess.to_uint8(decode_image(path))[None].to(device)
        except ImageError as error:
            values.append({"file": str(path), "error": str(error)})
            continue
        probability, label = network(card.preprocess.normalise(bytes_1CHW)).softmax(1).max(1)
        name = card.classes[int(label)]
        shown = card.titles.get(name, name)
        values.append({"file": str(path), "label": shown, "probability": float(probability)})
    return values


def _expanded(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
            if not inside:
                raise DataError(f"{path}: no image in this folder ({', '.join(_IMAGE_SUFFIXES)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return found
