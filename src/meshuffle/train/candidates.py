"""`--plan auto`, until the planner's search exists: time the candidates here, take the fastest.

One launch of the largest number of ranks times them all: for a candidate of k ranks the first k
train random images and the others wait. Candidates take turns, and each keeps its best turn, so
that a disturbance of the machine must hit all turns of one to mislead.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshuffle.comm.device import num_cores, pick_device, synchronize
from meshuffle.comm.group import RankEnv, new_group, process_group, rank_env
from meshuffle.comm.heap import keep_freed_pages
from meshuffle.comm.launch import end_with_parent, report_failure, torchrun
from meshuffle.config import TrainConfig, read_config, to_toml
from meshuffle.data import Batch, shard_bounds
from meshuffle.files import write_text
from meshuffle.parallel.ranks import make_mesh
from meshuffle.planner.plan import Plan, parse_plan
from meshuffle.tasks.card import Card
from meshuffle.train.state import TrainState, build_state

_TURNS, _TURN_S, _MAX_STEPS = 3, 0.5, 8
_AS_GOOD = 1.05


def candidate_plans(batch: int, num_cores: int, num_accelerators: int) -> list[Plan]:
    """Return the plans worth timing on one host.

    A small model may be fastest on one thread: waking another costs more than it brings.

    >>> [str(plan) for plan in candidate_plans(64, 4, 0)]
    ['dp=1,threads=4', 'dp=2,threads=2', 'dp=4,threads=1', 'dp=1,threads=1']
    """
    if num_accelerators > 1:
        return [Plan(dp=n) for n in (1, num_accelerators) if n <= batch]
    if num_accelerators == 1:
        return [Plan()]
    sizes = [n for n in (1, num_cores // 4, num_cores // 2, num_cores) if 1 <= n <= batch]
    plans = [Plan(dp=n, threads=max(1, num_cores // n)) for n in dict.fromkeys(sizes)]
    return list(dict.fromkeys([*plans, Plan(threads=1)]))


def fastest_plan(
    config: TrainConfig, card: Card, num_cores: int, num_accelerators: int
) -> tuple[Plan, list[str]]:
    """Return the plan, and a line that says why; one candidate needs no timing."""
    assert config.batch is not None
    if config.device == "cpu":
        num_accelerators = 0
    plans = candidate_plans(config.batch, num_cores, num_accelerators)
    if len(plans) == 1:
        return plans[0], [f"plan {plans[0]}: the only candidate on this machine"]
    times = time_plans(config, card, plans)
    best, why = choose(times)
    shown = ", ".join(f"{text} {ms:.0f} ms" for text, ms in times.items())
    plan = dataclasses.replace(parse_plan(best), predicted_step_ms=round(times[best], 1))
    return plan, [f"plan {best}: {why} ({shown} a step)"]


def choose(times: dict[str, float]) -> tuple[str, str]:
    """Return the plan to take, and why: the smaller plan where times are as good as equal.

    A core that computes nothing loads and augments images meanwhile.

    >>> choose({"dp=2,threads=1": 100.0, "dp=1,threads=1": 104.0})
    ('dp=1,threads=1', 'within 5 % of the fastest here, on less of the machine')
    """
    fastest = min(times, key=lambda text: times[text])
    near = [text for text, ms in times.items() if ms <= _AS_GOOD * times[fastest]]
    best = min(near, key=lambda text: (_num_cores(parse_plan(text)), times[text]))
    if best == fastest:
        return best, "the fastest here"
    return best, "within 5 % of the fastest here, on less of the machine"


def _num_cores(plan: Plan) -> int:
    return plan.num_ranks * (plan.threads or 1)


def time_plans(config: TrainConfig, card: Card, plans: list[Plan]) -> dict[str, float]:
    """Return milliseconds of a step by plan text, measured in ranks of their own."""
    with tempfile.TemporaryDirectory() as folder:
        settings, out = Path(folder) / "config.toml", Path(folder) / "times.json"
        write_text(settings, to_toml(config, {}))
        described = Path(folder) / "card.json"
        described.write_text(card.to_json())
        arguments = [str(settings), str(out), str(described), *(str(plan) for plan in plans)]
        most = max(plan.num_ranks for plan in plans)
        torchrun("meshuffle.train.candidates", arguments, most, threads=max(1, num_cores() // most))
        return json.loads(out.read_text())


def _time_all(config: TrainConfig, card: Card, plans: list[Plan]) -> dict[str, float]:
    env = rank_env() or RankEnv()
    device = pick_device(config.device, env.local_rank)
    keep_freed_pages()
    best = {str(plan): float("inf") for plan in plans}
    with process_group(env, device):
        control = new_group(backend="gloo")
        meshes = [make_mesh(plan, device) for plan in plans]
        states = [
            _build(config, plan, card, env, device, mesh) if env.rank < plan.dp else None
            for plan, mesh in zip(plans, meshes, strict=True)
        ]
        for turn in range(_TURNS + 1):
            for plan, state in zip(plans, states, strict=True):
                step_s = _turn(state, plan, env, warm=turn == 0) if state else float("inf")
                if turn:
                    best[str(plan)] = min(best[str(plan)], 1000 * step_s)
                dist.barrier(control)
    return best


def _build(
    config: TrainConfig,
    plan: Plan,
    card: Card,
    env: RankEnv,
    device: torch.device,
    mesh: DeviceMesh,
) -> TrainState:
    own = RankEnv(env.rank, plan.dp, env.rank, plan.dp)
    return build_state(config, plan, card, own, device, mesh.get_group("dp"), mesh=mesh)


def _turn(state: TrainState, plan: Plan, env: RankEnv, warm: bool) -> float:
    """Return the seconds of a step, the mean over about a second of steps."""
    if state.step.device.type == "cpu":
        torch.set_num_threads(plan.threads or 1)
    batch, total = _random_batch(state, plan, env)
    micro_batches = state.step.micro_batches(batch)
    counts = [total // len(micro_batches)] * len(micro_batches)
    num_steps, began = 0, time.perf_counter()
    num_wanted = 1 if warm else _MAX_STEPS
    while num_steps < num_wanted:
        state.step.run(micro_batches, counts, lr=0.0)
        synchronize(state.step.device)
        num_steps += 1
        seconds = torch.tensor(time.perf_counter() - began)
        dist.broadcast(seconds, group_src=0, group=state.group)
        if seconds > _TURN_S:
            break
    return (time.perf_counter() - began) / num_steps


def _random_batch(state: TrainState, plan: Plan, env: RankEnv) -> tuple[Batch, int]:
    config = state.config
    assert config.batch is not None and config.input_size is not None
    start, stop = shard_bounds(config.batch, plan.dp)[env.rank]
    num, size = stop - start, config.input_size
    images = torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8)
    zeros = torch.zeros(num, dtype=torch.int64)
    blank = torch.as_tensor(state.step.task.blank())
    targets = blank.expand(num, *blank.shape).clone()
    images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, targets, zeros, zeros, torch.arange(num), []), config.batch


def main() -> int:
    """Run as one of torchrun's ranks: CONFIG OUT CARD PLAN…"""
    end_with_parent()
    settings, out, described, *texts = sys.argv[1:]
    try:
        config = TrainConfig(**read_config(Path(settings)))
        card = Card.from_json(Path(described).read_text())
        times = _time_all(config, card, [parse_plan(text) for text in texts])
    except Exception as error:  # noqa: BLE001  # the launcher says it, in one line
        return report_failure(error)
    if (rank_env() or RankEnv()).is_main:
        Path(out).write_text(json.dumps(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
