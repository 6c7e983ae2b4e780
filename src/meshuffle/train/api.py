"""What the verb `train` does, as functions: train and resume; `infer/predict.py` has others."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from meshuffle.comm.device import pick_device
from meshuffle.comm.group import RankEnv, process_group, rank_env
from meshuffle.config import Origin, TrainConfig, to_toml
from meshuffle.errors import MeshuffleError, PlanError
from meshuffle.files import expanded
from meshuffle.models.given import given
from meshuffle.planner.plan import parse_plan
from meshuffle.tasks import find_task
from meshuffle.train.launch import launch
from meshuffle.train.rank import train_rank
from meshuffle.train.resolve import resolve_run
from meshuffle.train.run import Prepared, prepare, read_run, reopen
from meshuffle.weights import load_model


def train(
    config: TrainConfig,
    origins: Mapping[str, Origin] | None = None,
    *,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Train as `config` says, in as many ranks as its plan has; returns what `--json` prints.

    Under torchrun or SLURM every rank calls this; the main one prepares the run folder.

    Args:
        origins: where each setting came from.
        model: a module object to train in place of `config.model`, from its own weights, on one
            rank; it has the best weights afterwards. Pass it again to `resume`, `evaluate` and
            `predict`.
    """
    env = rank_env()
    if model is not None:
        return _train_object(config, origins or {}, model, env)
    if env is not None:
        return _train_launched(partial(prepare, config, origins or {}, env), config.device, env)
    return _run(prepare(config, origins or {}))


def _train_object(
    config: TrainConfig, origins: Mapping[str, Origin], model: nn.Module, env: RankEnv | None
) -> dict[str, Any]:
    plan = "dp=1" if config.plan == "auto" else config.plan
    if env is not None or parse_plan(plan).num_ranks > 1:
        raise PlanError(
            f"plan {plan}: a module object trains on one rank; for more, put it in a function and "
            "give --model package.module:function"
        )
    with given(model) as name:
        config = dataclasses.replace(config, model=str(name), plan=plan)
        result = _run(prepare(config, {**origins, "model": "flag"}))
        model.load_state_dict(load_model(Path(result["run"]))[0].state_dict())
    return result


def resume(
    run: Path, *, model: nn.Module | str | None = None, plan: str | None = None
) -> dict[str, Any]:
    """Continue the run folder `run` with its own settings.

    Args:
        model: repeats the name of a `package.module:function` model, to allow its import; or the
            module object that the run trains, which has the best weights afterwards.
        plan: another plan to continue under, from now on: a text, `auto` or a `plan.json`.
    """
    env, run = rank_env(), expanded(run).resolve()
    with given(model) as name:
        if env is not None:
            return _train_launched(partial(reopen, run, env, name, plan), read_run(run).device, env)
        result = _run(reopen(run, env, name, plan))
        if isinstance(model, nn.Module):
            model.load_state_dict(load_model(run)[0].state_dict())
    return result


def _run(prepared: Prepared) -> dict[str, Any]:
    _say(str(prepared.run), *prepared.lines)
    launch(prepared)
    return _result(prepared)


def _train_launched(ready: Callable[[], Prepared], device: str, env: RankEnv) -> dict[str, Any]:
    """Let the main rank make or reopen the run folder, tell the others where, and train.

    Where that fails the main rank says why, and the others end with its exit code.
    """
    with process_group(env, pick_device(device, env.local_rank)):
        message: list[Any] = [None]
        if env.is_main:
            try:
                prepared = ready()
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
            shown = find_task(result.get("task", "classify")).metrics_text(metrics)
            _say(f"{split}: {shown}, best epoch {result['best_epoch']}")
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
    resolved = resolve_run(config, origins)
    settings = dataclasses.asdict(resolved.config)
    values = {k: {"value": v, "origin": resolved.origins[k]} for k, v in settings.items()}
    for name, reason in resolved.reasons.items():
        values[name]["reason"] = reason
    return values, to_toml(resolved.config, resolved.origins, resolved.reasons).rstrip()
