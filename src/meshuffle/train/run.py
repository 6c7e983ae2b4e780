"""From settings to a run folder, and from a run folder to ranks that train.

resolve_run ──▶ build_model ──▶ plan ──▶ run folder ──▶ launch ──▶ train_rank (rank.py)
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from meshuffle.comm.device import check_device, num_accelerators, num_cores
from meshuffle.comm.group import RankEnv
from meshuffle.comm.launch import require_memory
from meshuffle.config import Origin, TrainConfig, read_config, to_toml
from meshuffle.data import EpochSampler, build_train_transform, open_data
from meshuffle.data.source import absolute_data
from meshuffle.errors import CaptureError, ModelError, PlanError, RunError
from meshuffle.files import expanded, write_json, write_text
from meshuffle.planner.plan import Plan, parse_plan, read_plan
from meshuffle.tasks import find_task, make_task
from meshuffle.tasks.card import Card
from meshuffle.train.candidates import fastest_plan
from meshuffle.train.checkpoint.checkpoint import locked
from meshuffle.train.checkpoint.data_record import write_data_record
from meshuffle.train.compiling import CompileChoice
from meshuffle.train.initial_weights import START
from meshuffle.train.model_trial import try_model
from meshuffle.train.resolve import resolve_run
from meshuffle.train.single_value import check_values
from meshuffle.train.split import num_micro_batches, refuse_inexact, schedule_of, split_model
from meshuffle.train.state import STEPS, augment_config, build_model, make_card
from meshuffle.train.watch import environment
from meshuffle.weights import require_repeated, save_weights, split_key


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run folder that is ready to train, its plan, and how long a step should take."""

    run: Path
    plan: Plan
    lines: tuple[str, ...] = ()


def prepare(
    given: TrainConfig, origins: Mapping[str, Origin], env: RankEnv | None = None
) -> Prepared:
    """Check everything that can be checked, choose what was left open, make the run folder.

    Args:
        given: settings as the user gave them; Nones are resolved here.
        origins: where each value came from, by field name.
        env: the ranks that a launcher has started, or None.

    Raises:
        InputError: the data, the model, the plan or a setting is wrong.
    """
    resolved = resolve_run(_with_absolute_paths(given), origins)
    config, start = resolved.config, resolved.start
    card = make_card(config, resolved.data, start)
    _try_settings(config, card, len(resolved.data.splits["train"]))
    model, frozen, start_lines = build_model(config, card, start)
    config, card, model_lines = _fit_model(config, card, model)
    plan, lines = _choose_plan(config, card, env)
    lines += check_values(model, frozen, config, plan, len(resolved.data.splits["train"]))
    plan = _with_cuts(plan, model, frozen, config)
    plan, more = _exact_plan(plan, model, frozen, config, env)
    lines += more
    run = make_run_folder(config)
    # Without the folder, so that the run can be moved, and made again from its settings.
    config = dataclasses.replace(config, plan=str(plan), out=None)
    write_text(run / "config.toml", to_toml(config, resolved.origins, resolved.reasons))
    write_json(run / "plan.json", plan.to_dict())
    write_json(run / "env.json", environment() | ({"from": start_lines} if start_lines else {}))
    write_data_record(run, resolved.data)
    if start is not None:
        save_weights(run / START, model.state_dict(), card)
    return Prepared(run, plan, (*model_lines, *lines))


def _fit_model(
    config: TrainConfig, card: Card, model: nn.Module
) -> tuple[TrainConfig, Card, list[str]]:
    """Try a model of other people's; return settings and card with its memory format, and lines."""
    if ":" not in config.model:
        return (
            dataclasses.replace(config, channels_last=config.channels_last is not False),
            card,
            [],
        )
    trial = try_model(model, make_task(card), config.model)
    if config.channels_last and not trial.channels_last:
        raise ModelError(
            f"--channels-last: {config.model} does not compute the same in this memory format; "
            "leave the option out"
        )
    chosen = trial.channels_last if config.channels_last is None else config.channels_last
    lines = []
    if not trial.channels_last:
        lines.append(f"{config.model} needs contiguous memory: it trains without channels-last")
    if trial.unused:
        lines.append(f"the loss uses the main output alone; unused: {', '.join(trial.unused)}")
    config = dataclasses.replace(config, channels_last=chosen)
    return config, dataclasses.replace(card, channels_last=chosen), lines


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    start = config.from_
    if start:
        file, key = split_key(expanded(start))
        if file.exists():
            start = f"{file.resolve()}?key={key}" if key else str(file.resolve())
    return dataclasses.replace(config, data=absolute_data(config.data), from_=start)


def _try_settings(config: TrainConfig, card: Card, num_train: int) -> None:
    """Make what every rank will make, so that a wrong value leaves no run folder behind."""
    check_device(config.device)
    CompileChoice(config, None)
    augment = augment_config(config)
    EpochSampler(num_train, config.batch or 1, repeats=augment.repeats)
    build_train_transform(augment, card.preprocess, dense=find_task(config.task).dense)


def read_run(run: Path) -> TrainConfig:
    """Return the settings of an existing run folder.

    Raises:
        RunError: not a run folder.
    """
    if not (run / "config.toml").is_file():
        raise RunError(f"{run}: no config.toml in it; is it a run folder?")
    return TrainConfig(**read_config(run / "config.toml"))


def reopen(
    run: Path, env: RankEnv | None = None, model: str | None = None, plan: str | None = None
) -> Prepared:
    """Return what `prepare` returned for an existing run folder, to continue it.

    Args:
        model: repeats the name of a `package.module:function` model, to allow its import.
        plan: another plan to continue under; it is written to the run folder.

    Raises:
        RunError: not a run folder, or in use; PlanError: other ranks than the plan has.
    """
    config = read_run(run)
    require_repeated(config.model, model)
    before = read_plan(run / "plan.json")
    if plan is None:
        _check_plan(before, config, env)
        return Prepared(run, before)
    data = open_data(config.data, task=config.task, need=("train", "val"))
    card = make_card(config, data)
    chosen, lines = _choose_plan(dataclasses.replace(config, plan=plan), card, env)
    if str(chosen) == str(before) and chosen.cuts in ((), before.cuts):
        return Prepared(run, before, tuple(lines))
    network, frozen, _ = build_model(config, card)
    lines += check_values(network, frozen, config, chosen, len(data.splits["train"]))
    chosen = _with_cuts(chosen, network, frozen, config)
    asked = dataclasses.replace(config, plan=plan)
    chosen, more = _exact_plan(chosen, network, frozen, asked, env)
    lines += more
    with locked(run):
        text = (run / "config.toml").read_text()
        line = f"plan = {json.dumps(str(chosen))}  # flag"
        write_text(run / "config.toml", re.sub(r"(?m)^plan = .*$", lambda _: line, text))
        write_json(run / "plan.json", chosen.to_dict())
    return Prepared(run, chosen, (*lines, f"continuing under plan {chosen} (was {before})"))


def _with_cuts(plan: Plan, model: nn.Module, frozen: list[str], config: TrainConfig) -> Plan:
    """Return the plan with the cuts between its stages; tries whether `model` can be split so."""
    if not plan.is_split:
        return plan
    split = split_model(model, frozen, config, plan, torch.device("cpu"))
    return dataclasses.replace(plan, cuts=split.cuts)


def _exact_plan(
    plan: Plan, model: nn.Module, frozen: list[str], config: TrainConfig, env: RankEnv | None
) -> tuple[Plan, list[str]]:
    """Return a plan that computes what one device does, and lines about what it does not.

    Raises:
        ModelError: the user's plan does not, and `--allow-inexact` is not given.
    """
    is_tried = plan.is_split and not config.allow_inexact  # as a split model, already
    has_parts = plan.num_ranks > 1 and plan.dp * num_micro_batches(config, plan) > 1
    if is_tried or not has_parts or config.task in STEPS:
        return plan, []
    try:
        refuse_inexact(model, frozen, config, plan)
    except CaptureError as error:
        return plan, [f"not checked whether {config.model} mixes samples of a batch: {error}"]
    except ModelError as error:
        if config.allow_inexact:
            return plan, [f"inexact: {error}"]
        if config.plan == "auto" and env is None:
            return Plan(threads=plan.threads), [f"plan dp=1 in place of {plan}: {error}"]
        raise ModelError(f"{error}; --allow-inexact trains with it all the same") from None
    return plan, []


def _choose_plan(config: TrainConfig, card: Card, env: RankEnv | None) -> tuple[Plan, list[str]]:
    """Return the plan, and lines to print."""
    assert config.batch is not None
    if config.plan != "auto":
        plan = parse_plan(config.plan)
        _check_plan(plan, config, env)
        return plan, []
    if env is not None:
        return Plan(dp=env.world), [f"plan dp={env.world}: the ranks that were launched"]
    return fastest_plan(config, card, num_cores(), num_accelerators())


def _check_plan(plan: Plan, config: TrainConfig, env: RankEnv | None) -> None:
    """Refuse what a later version will do, and what this batch or these ranks cannot."""
    find_task(config.task).check_plan(plan)
    if plan.pp > 1 or plan.mb:
        _check_micro_batches(plan, config)
    if plan.dp_kind == "central" and plan.is_split:
        raise PlanError(f"plan {plan}: central updates know no tp and no pp; use dp={plan.dp}")
    if plan.num_ranks > 1 and platform.system() != "Linux":
        raise PlanError(f"plan {plan}: {platform.system()} runs a single rank; use dp=1")
    if plan.dp > (config.batch or 1):
        raise PlanError(
            f"plan {plan}: {plan.dp} ranks share a batch of {config.batch}; "
            f"use --batch {plan.dp} or more, or a smaller dp"
        )
    if env is None:
        require_memory(plan.num_ranks)
    check_device(config.device, env.local_world if env else plan.num_ranks)
    if env is not None and plan.num_ranks != env.world:
        raise PlanError(
            f"plan {plan} has {plan.num_ranks} ranks, but the launcher started {env.world}"
        )


def _check_micro_batches(plan: Plan, config: TrainConfig) -> None:
    if config.accumulate > 1:
        raise PlanError(
            f"plan {plan} and --accumulate {config.accumulate}: both say how many micro-batches a "
            "step has; give one of them"
        )
    least = (config.batch or 1) // plan.dp
    if least < plan.num_micro_batches:
        raise PlanError(
            f"plan {plan}: a replica has {least} images for {plan.num_micro_batches} micro-batches;"
            f" use --batch {plan.dp * plan.num_micro_batches} or more, or a smaller mb"
        )
    if plan.pp > 1 and config.compile == "on":
        raise PlanError(f"plan {plan}: pipeline stages are not compiled yet; leave --compile off")
    schedule = schedule_of(config, plan)
    if plan.cuts and len(plan.cuts) != schedule.num_stages - 1:
        raise PlanError(
            f"plan {plan}: {schedule.num_stages} stages have {schedule.num_stages - 1} cuts, not "
            f"{len(plan.cuts)}: {', '.join(plan.cuts)}; leave cuts empty to have them chosen"
        )


def make_run_folder(config: TrainConfig) -> Path:
    """Make and return the run folder: `--out`, or the first free runs/MODEL-DATA-N.

    Raises:
        RunError: `--out` exists and is not empty, or cannot be made, or is not UTF-8.
    """
    folder = Path.cwd() / "runs" if config.out is None else expanded(config.out).resolve()
    if os.fsencode(folder) != str(folder).encode("utf-8", "replace"):
        raise RunError(
            f"{os.fsencode(folder)!r}: TensorBoard cannot write to a folder whose path is not "
            "UTF-8; choose another with --out"
        )
    try:
        if config.out is not None:
            return _make_given(folder)
        name = re.sub(r"[^\w.-]+", "_", f"{config.model}-{_data_name(config.data)}").strip("_")
        number = 1
        while True:
            run = folder / f"{name}-{number}"
            try:
                run.mkdir(parents=True)
                return run
            except FileExistsError:
                number += 1
    except OSError as error:
        where = error.filename or config.out
        raise RunError(f"cannot make the run folder {where}: {error.strerror}") from None


def _make_given(run: Path) -> Path:
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise RunError(
            f"--out {run}: exists already; choose another folder, or continue that run with "
            f"--resume {shlex.quote(str(run))}"
        )
    run.mkdir(parents=True, exist_ok=True)
    return run


def _data_name(data: str) -> str:
    prefix, _, path = data.rpartition(":")
    return expanded(path).resolve().name if "/" in path or path == "." else prefix or path
