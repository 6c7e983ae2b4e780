"""`parallelize`: a split model for people with a training loop of their own."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.dist.device import pick_device
from meshuffle.dist.group import RankEnv, process_group, rank_env
from meshuffle.errors import PlanError
from meshuffle.parallel.draws import draw_key
from meshuffle.parallel.forward_backward import ForwardBackward
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.pipeline import Pipeline
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.planner.plan import Plan, parse_plan
from meshuffle.planner.schedules import make_schedule


def parallelize(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    plan: str | Plan = "",
    *,
    device: str = "auto",
) -> Parallel:
    """Return this rank's part of `model`, to be trained as any module.

        model = parallelize(Net(), example=x, plan="tp=2")
        optimizer = torch.optim.AdamW(model.parameters())
        loss_fn(model(x), y).backward()
        optimizer.step()

    Start the script by `torchrun --nproc-per-node N`. All ranks of a replica pass the same batch;
    with dp > 1 each replica has its own, and gradients are averaged over replicas as DDP does.
    Gradients are complete when `backward` returns, also when several backward passes accumulate.
    Dropout draws its masks from the seed of `torch.manual_seed`, new ones in each forward.

    Pipelines (pp=N) go forward and backward at once, in micro-batches; this line trains under every
    plan, and `model(x)` still returns the whole outputs, without gradients where there are stages:

        loss = model.forward_backward(x, y, loss_fn)

    Args:
        model: the same on all ranks (rank 0's parameters and buffers are sent to the others).
        example: inputs of one replica's batch, batch in dim 0, at least 2 samples; only shapes
            and dtypes count, and later batches may have other sizes.
        plan: dp=N, tp=N[:channel|:spatial|:batch], pp=N[:SCHEDULE] and mb=N; empty is tp over all
            ranks.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        PlanError: a plan for other ranks than were launched, or parts that only `train` has.
        ModelError: torch.export cannot capture the model.
    """
    env = rank_env() or RankEnv()
    where = pick_device(device, env.local_rank)
    _open_group(env, where)
    chosen = plan if isinstance(plan, Plan) else parse_plan(plan or f"tp={dist.get_world_size()}")
    if chosen.dp_kind:
        raise PlanError(f"plan {chosen}: parallelize replicates; use dp={chosen.dp}")
    schedule = make_schedule(chosen.pp_kind, chosen.pp, chosen.num_micro_batches)
    ranks = join(chosen, where)
    ranks.draws.to(where)
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    model.to(where)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), src=0)
    num = max(2, len(inputs[0]) // chosen.num_micro_batches)
    split = Parallel(
        model,
        tuple(x[:num] for x in inputs),
        chosen.tp,
        ranks.tp_rank,
        prefer=chosen.tp_kind,
        dp=chosen.dp,
        device=where,
        num_stages=schedule.num_stages,
        stages=schedule.stages_of(ranks.pp_rank),
        cuts=chosen.cuts,
    )
    split.bind(ranks)
    seed = _common_seed()
    split.forward_backward = ForwardBackward(split, ranks, chosen.num_micro_batches, seed)
    if chosen.pp > 1:
        Pipeline(split, ranks, schedule)
    else:
        _complete_gradients(split, ranks)
    ranks.draws.set(draw_key(seed, 0, 0))
    split.register_forward_pre_hook(_NewDraws(ranks))
    return split


def _common_seed() -> int:
    told = [torch.initial_seed()]
    dist.broadcast_object_list(told, src=0)
    return told[0]


class _NewDraws:
    """Gives each forward of a training step random masks of its own."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            self.ranks.draws.advance(self.ranks.dp_rank * len(inputs[0]))


def _open_group(env: RankEnv, device: torch.device) -> None:
    """Join the ranks until the program ends, unless the caller has."""
    if not dist.is_initialized():
        stack = contextlib.ExitStack()
        stack.enter_context(process_group(env, device))
        atexit.register(stack.close)


def _complete_gradients(module: Parallel, ranks: Ranks) -> None:
    """Sum each parameter's gradient over the ranks as it arrives, before it is added to `.grad`."""
    for name, parameter in module.named_parameters():
        group = ranks.every if name in module.partial else ranks.dp
        if parameter.requires_grad and dist.get_world_size(group) > 1:
            parameter.register_hook(_Sum(group, ranks.dp_world, module.forward_backward))


class _Sum:
    """Adds up a gradient over a group, and averages over replicas."""

    def __init__(
        self, group: dist.ProcessGroup, replicas: int, forward_backward: ForwardBackward
    ) -> None:
        self.group, self.replicas, self.forward_backward = group, replicas, forward_backward

    def __call__(self, grad: Tensor) -> Tensor:
        if self.forward_backward.running:  # which adds up once, at its end
            return grad
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total / self.replicas if self.replicas > 1 else total
