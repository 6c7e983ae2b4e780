"""From settings to a run folder, and from a run folder to ranks that train.

prepare ──▶ run folder: config.toml, plan.json, env.json ──▶ launch ──▶ train_rank (rank.py)
"""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from meshuffle.comm.device import check_device, num_accelerators, num_cores
from meshuffle.comm.group import RankEnv
from meshuffle.comm.launch import torchrun
from meshuffle.comm.lost_ranks import ranks_in_words, read_waiting
from meshuffle.config import Origin, TrainConfig, read_config, resolve, to_toml
from meshuffle.data import (
    Data,
    EpochSampler,
    augmentation_for,
    build_train_transform,
    open_data,
)
from meshuffle.errors import ConfigError, PlanError, RankFailed, RunError
from meshuffle.files import write_json, write_text
from meshuffle.parallel.place import threads_per_rank
from meshuffle.planner.plan import Plan, parse_plan, read_plan
from meshuffle.tasks import find_task
from meshuffle.tasks.base import Task
from meshuffle.train.candidates import fastest_plan
from meshuffle.train.checkpoint.checkpoint import way_back
from meshuffle.train.compiling import CompileChoice
from meshuffle.train.initial_weights import START, adopt_model, has_new_head
from meshuffle.train.place import schedule_of, split_model
from meshuffle.train.state import augment_config, augment_values, build_model, make_card
from meshuffle.train.watch import environment
from meshuffle.weights import Card, require_repeated, save_weights


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run folder that is ready to train, its plan, and how long a step should take."""

    run: Path
    plan: Plan
    lines: tuple[str, ...] = ()


def prepare(
    config: TrainConfig, origins: Mapping[str, Origin], env: RankEnv | None = None
) -> Prepared:
    """Check everything that can be checked, choose what was left open, make the run folder.

    Args:
        config: as given; Nones are resolved here.
        origins: where each value came from, by field name.
        env: the ranks that a launcher has started, or None.

    Raises:
        InputError: the data, the model, the plan or a setting is wrong.
    """
    begins = config.from_ and absolute_data(config.from_)
    config = dataclasses.replace(config, data=absolute_data(config.data), from_=begins)
    given, config = config, adopt_model(config, origins)
    data = open_data(config.data, task=config.task, need=("train", "val"))
    resolved = resolve_for(config, data)
    card = make_card(resolved, data)
    model, frozen, about = _rehearse(resolved, card, len(data.splits["train"]))
    plan, lines = _choose_plan(resolved, card, env)
    if plan.tp > 1 or plan.pp > 1:
        split = split_model(model, frozen, resolved, plan, torch.device("cpu"))
        plan = dataclasses.replace(plan, cuts=split.cuts)
    origins = {
        name: origins.get(name, "chosen" if getattr(given, name) != value else "default")
        for name, value in vars(resolved).items()
    }
    run = make_run_folder(resolved)
    # Without the folder, so that the run can be moved, and made again from its settings.
    resolved = dataclasses.replace(resolved, plan=str(plan), out=None)
    write_text(run / "config.toml", to_toml(resolved, origins))
    write_json(run / "plan.json", plan.to_dict())
    write_json(run / "env.json", {**environment(), **({"from": about} if about else {})})
    if config.from_:
        save_weights(run / START, model.state_dict(), card)
    return Prepared(run, plan, tuple(lines))


def _rehearse(
    config: TrainConfig, card: Card, num_train: int
) -> tuple[nn.Module, list[str], list[str]]:
    """Build what every rank will build, so that a wrong value leaves no run folder behind.

    Returns what `build_model` does.
    """
    check_device(config.device)
    CompileChoice(config, None)
    augment = augment_config(config)
    EpochSampler(num_train, config.batch or 1, repeats=augment.repeats)
    build_train_transform(augment, card.preprocess, dense=find_task(config.task).dense)
    return build_model(config, card)


def absolute_data(spec: str) -> str:
    """Return DATA, or weights, with the path made absolute: a run goes on from anywhere."""
    prefix, colon, path = spec.partition(":")
    path, mark, options = (path, "", "") if Path(path).exists() else path.partition("?")
    if Path(spec).expanduser().exists():
        return str(Path(spec).expanduser().resolve())
    if colon and Path(path).expanduser().exists():
        return f"{prefix}:{Path(path).expanduser().resolve()}{mark}{options}"
    return spec


def reopen(run: Path, env: RankEnv | None = None, model: str | None = None) -> Prepared:
    """Return what `prepare` returned for an existing run folder, to continue it.

    Args:
        model: repeats the name of a `package.module:function` model, to allow its import.

    Raises:
        RunError: not a run folder; PlanError: other ranks than the run was made for.
    """
    if not (run / "config.toml").is_file():
        raise RunError(f"{run}: no config.toml in it; is it a run folder?")
    config = TrainConfig(**read_config(run / "config.toml"))
    require_repeated(config.model, model)
    plan = read_plan(run / "plan.json")
    _check_plan(plan, config, env)
    return Prepared(run, plan)


def resolve_for(config: TrainConfig, data: Data) -> TrainConfig:
    """Return `config` with every open value chosen for `data`."""
    augment = augment_values(augmentation_for(data))
    task = find_task(config.task)
    if (config.mixup or config.cutmix) and not task.mixes:
        raise ConfigError(f"--mixup and --cutmix: {config.task} has no labels to mix")
    if config.class_weights != "none" and not task.weighs_classes:
        raise ConfigError(f"--class-weights {config.class_weights}: {config.task} has none")
    if config.label_smoothing and not task.smooths:
        raise ConfigError(f"--label-smoothing {config.label_smoothing:g}: {config.task} has none")
    new_head = bool(config.from_) and has_new_head(config, data)
    num_train = len(data.splits["train"])
    return resolve(config, num_train, data.input_size, augment, suits=task.suits, new_head=new_head)


def launch(prepared: Prepared, module: str = "meshuffle.train.rank") -> None:
    """Train: in this process where the plan has one rank, else in ranks started by torchrun."""
    from meshuffle.train.rank import train_rank

    if prepared.plan.num_ranks == 1:
        train_rank(prepared.run)
    else:
        threads = threads_per_rank(prepared.plan)
        try:
            torchrun(module, [str(prepared.run)], prepared.plan.num_ranks, threads=threads)
        except RankFailed as failed:
            raise explained(failed, prepared.run) from None


def explained(failed: RankFailed, run: Path) -> RankFailed:
    """Add to a lost rank's message what the others waited for, and how to go on."""
    waiting = read_waiting(run / "lost")
    if not waiting:
        return failed
    world, step = waiting[0].world, max(each.step for each in waiting)
    silent = sorted(set(range(world)) - {each.rank for each in waiting})
    text = str(failed)
    if silent and all(each.is_late for each in waiting):
        text = f"{ranks_in_words(silent)} of {world} did not answer"
    ops = " and ".join(sorted({each.op for each in waiting}))
    late = ranks_in_words([each.rank for each in waiting])
    found = RankFailed(
        f"{text}; {late} waited for {ops} at step {step} (see {run / 'lost'}); {way_back(run)}"
    )
    found.exit_code = failed.exit_code
    return found


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


def check_splits(plan: Plan, task: Task | type[Task]) -> None:
    """Refuse a plan that splits a model in a way that its task does not know."""
    for axis, size in (("tp", plan.tp), ("pp", plan.pp)):
        if size > 1 and axis not in task.splits:
            known = ", ".join(("dp", *task.splits))
            raise PlanError(f"plan {plan}: --task {task.name} knows {known}, not {axis}")


def _check_plan(plan: Plan, config: TrainConfig, env: RankEnv | None) -> None:
    """Refuse what a later version will do, and what this batch or these ranks cannot."""
    check_splits(plan, find_task(config.task))
    if plan.pp > 1 or plan.mb:
        _check_micro_batches(plan, config)
    if plan.dp_kind == "central" and plan.tp * plan.pp > 1:
        raise PlanError(f"plan {plan}: central updates know no tp and no pp; use dp={plan.dp}")
    if plan.num_ranks > 1 and platform.system() != "Linux":
        raise PlanError(f"plan {plan}: {platform.system()} runs a single rank; use dp=1")
    if plan.dp > (config.batch or 1):
        raise PlanError(
            f"plan {plan}: {plan.dp} ranks share a batch of {config.batch}; "
            f"use --batch {plan.dp} or more, or a smaller dp"
        )
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
        RunError: `--out` exists and is not empty, or cannot be made.
    """
    try:
        if config.out is not None:
            return _make_given(Path(config.out).expanduser().resolve())
        name = re.sub(r"[^\w.-]+", "_", f"{config.model}-{_data_name(config.data)}").strip("_")
        number = 1
        while True:
            run = Path.cwd() / "runs" / f"{name}-{number}"
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
            f"--resume {run}"
        )
    run.mkdir(parents=True, exist_ok=True)
    return run


def _data_name(data: str) -> str:
    prefix, _, path = data.rpartition(":")
    return Path(path).expanduser().resolve().name if "/" in path or path == "." else prefix or path
