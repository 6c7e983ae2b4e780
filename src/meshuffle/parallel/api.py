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
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.planner.plan import Plan, parse_plan


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

    Args:
        model: the same on all ranks (rank 0's parameters and buffers are sent to the others).
        example: inputs of one replica's batch, batch in dim 0, at least 2 samples; only shapes
            and dtypes count, and later batches may have other sizes.
        plan: dp=N and tp=N[:channel|:spatial|:batch]; empty is tp over all ranks.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        PlanError: a plan for other ranks than were launched, or parts that only `train` has.
        ModelError: torch.export cannot capture the model.
    """
    env = rank_env() or RankEnv()
    where = pick_device(device, env.local_rank)
    _open_group(env, where)
    chosen = plan if isinstance(plan, Plan) else parse_plan(plan or f"tp={dist.get_world_size()}")
    if chosen.pp > 1 or chosen.mb or chosen.dp_kind:
        raise PlanError(f"plan {chosen}: parallelize takes dp=N and tp=N only")
    ranks = join(chosen, where)
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    model.to(where)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), src=0)
    split = Parallel(
        model,
        inputs,
        chosen.tp,
        ranks.tp_rank,
        prefer=chosen.tp_kind,
        dp=chosen.dp,
        device=where,
    )
    split.bind(ranks)
    _complete_gradients(split, ranks)
    return split


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
            parameter.register_hook(_Sum(group, ranks.dp_world))


class _Sum:
    """Adds up a gradient over a group, and averages over replicas."""

    def __init__(self, group: dist.ProcessGroup, replicas: int) -> None:
        self.group, self.replicas = group, replicas

    def __call__(self, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total / self.replicas if self.replicas > 1 else total
