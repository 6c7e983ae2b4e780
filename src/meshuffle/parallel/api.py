"""`parallelize`: a split model for people with a training loop of their own, under every plan."""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meshuffle.comm.device import pick_device
from meshuffle.comm.group import RankEnv, process_group, rank_env
from meshuffle.errors import PlanError
from meshuffle.parallel.build import build
from meshuffle.parallel.gradients import sum_gradients
from meshuffle.parallel.random_masks import draw_key
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.planner.plan import Plan, parse_plan
from meshuffle.planner.schedules import make_schedule

LossFunction = Callable[[Any, Any], Tensor]


def parallelize(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    plan: str | Plan = "",
    *,
    device: str = "auto",
    allow_inexact: bool = False,
) -> RankModule:
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
        allow_inexact: go on where the model mixes samples that the plan computes apart.

    Raises:
        PlanError: a plan for other ranks than were launched, or parts that only `train` has.
        ModelError: torch.export cannot capture the model, or it mixes the samples of a batch.
    """
    env = rank_env() or RankEnv()
    where = pick_device(device, env.local_rank)
    _open_group(env, where)
    chosen = plan if isinstance(plan, Plan) else parse_plan(plan or f"tp={dist.get_world_size()}")
    if chosen.dp_kind:
        raise PlanError(f"plan {chosen}: parallelize replicates; use dp={chosen.dp}")
    if chosen.threads and where.type == "cpu":
        torch.set_num_threads(chosen.threads)
    make_schedule(chosen.pp_kind, chosen.pp, chosen.num_micro_batches)  # refused before a group
    ranks = join(chosen, where)
    ranks.draw_state.to(where)
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    model.to(where)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), src=0)
    num = max(2, len(inputs[0]) // chosen.num_micro_batches)
    first = tuple(x[:num] for x in inputs)
    split = build(
        model, first, chosen, ranks, where, always_pipeline=True, allow_inexact=allow_inexact
    )
    seeds = [torch.initial_seed()]
    dist.broadcast_object_list(seeds, src=0)
    step = ForwardBackward(split, ranks, chosen.num_micro_batches, seeds[0])
    split.forward_backward = step
    if chosen.pp == 1:
        _complete_gradients(split, ranks, step)
    ranks.draw_state.set(draw_key(seeds[0], 0, 0))

    def draw_anew(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            ranks.draw_state.advance(ranks.dp_rank * len(inputs[0]), len(inputs[0]))

    split.register_forward_pre_hook(draw_anew)
    return split


def _open_group(env: RankEnv, device: torch.device) -> None:
    """Join the ranks until the program ends, unless the caller has."""
    if not dist.is_initialized():
        stack = contextlib.ExitStack()
        stack.enter_context(process_group(env, device))
        atexit.register(stack.close)


def _complete_gradients(module: RankModule, ranks: Ranks, step: ForwardBackward) -> None:
    """Sum each parameter's gradient over the ranks as it arrives, before it is added to `.grad`."""

    def summed(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
        if step.running:  # it sums once, at its end
            return grad
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total / ranks.dp_world if ranks.dp_world > 1 else total

    for name, parameter in module.named_parameters():
        group = ranks.every if name in module.summed_over_tp else ranks.dp
        if parameter.requires_grad and dist.get_world_size(group) > 1:
            parameter.register_hook(functools.partial(summed, group=group))


class ForwardBackward:
    """Goes forward and backward through a replica's batch, in the plan's micro-batches.

    Args:
        module: bound to `ranks`, with a pipeline of one stage or several.
        num_micro_batches: micro-batches of a step.
        seed: seed of the random masks.
    """

    def __init__(self, module: RankModule, ranks: Ranks, num_micro_batches: int, seed: int) -> None:
        self.module, self.ranks, self.num = module, ranks, num_micro_batches
        self.seed, self.step, self.running = seed, 0, False

    def __call__(
        self, inputs: Tensor | Sequence[Tensor], targets: Any, loss_fn: LossFunction
    ) -> Tensor:
        """Add the gradients of the mean loss to `.grad`; return the loss, on all ranks.

        Args:
            inputs: the model's, of this replica's batch, the same on all of its ranks.
            targets: a tensor, or a structure of tensors with the batch in dim 0.
            loss_fn: from the model's outputs and the targets of a micro-batch to the mean over
                its samples. Micro-batches of unequal size count by their samples.
        """
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        batch, num = len(given[0]), min(self.num, len(given[0]))
        parts = [_part((given, targets), i, num) for i in range(num)]
        sizes = [len(part[0][0]) for part in parts]
        total = torch.zeros((), dtype=torch.float64, device=self.module.device)

        def finish(i: int, outputs: Any) -> Tensor:
            loss = loss_fn(outputs, parts[i][1]) * (sizes[i] / batch)
            total.add_(loss.detach())
            return loss

        pipeline = self.module.pipeline
        assert pipeline is not None
        with self._gradients_apart():
            pipeline.train(sizes, lambda i: parts[i][0], finish, lambda i: self._draw(i, sizes))
            sum_gradients(self.module, self.ranks, average=True)
            pipeline.sum_tied()
        self.step += 1
        dist.broadcast(total, group=self.ranks.pp, group_src=pipeline.schedule.ranks[-1])
        dist.all_reduce(total, group=self.ranks.dp)
        return total / self.ranks.dp_world

    def _draw(self, i: int, sizes: Sequence[int]) -> None:
        """Put in the key of a micro-batch's random masks; it holds the samples of all replicas."""
        first = self.ranks.dp_rank * sizes[i]
        self.ranks.draw_state.set(draw_key(self.seed, self.step, i), first, sizes[i])

    @contextlib.contextmanager
    def _gradients_apart(self) -> Iterator[None]:
        """Let a block see no gradients of earlier steps, and add them behind it."""
        kept = {p: p.grad for p in self.module.parameters() if p.grad is not None}
        self.module.zero_grad()
        self.running = True
        try:
            yield
        finally:
            self.running = False
        for parameter, earlier in kept.items():
            parameter.grad = earlier if parameter.grad is None else earlier + parameter.grad


def _part(values: Any, i: int, num: int) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.tensor_split(num)[i], values)
