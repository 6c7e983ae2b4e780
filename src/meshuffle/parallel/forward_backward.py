"""One step's forward and backward for people with a loop of their own, whatever the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from meshuffle.parallel.draws import draw_key
from meshuffle.parallel.gradients import sum_gradients
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.pipeline import Pipeline
from meshuffle.parallel.ranks import Ranks

LossFunction = Callable[[Any, Any], Tensor]


class ForwardBackward:
    """Goes forward and backward through a replica's batch, in the plan's micro-batches.

    Args:
        module: bound to `ranks`; cut into stages or not.
        num_micro_batches: of a step.
        seed: of the random masks.
    """

    def __init__(self, module: Parallel, ranks: Ranks, num_micro_batches: int, seed: int) -> None:
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

        with self._gradients_apart():
            if self.module.pipeline is None:
                for i, (some, _) in enumerate(parts):
                    self._draw(i, sizes)
                    finish(i, self.module.forward(*some)).backward()
            else:
                self.module.pipeline.train(
                    sizes, lambda i: parts[i][0], finish, lambda i: self._draw(i, sizes)
                )
            sum_gradients(self.module, self.ranks, average=True)
            if self.module.pipeline is not None:
                self.module.pipeline.sum_tied()
        self.step += 1
        return self._everywhere(total)

    def _draw(self, i: int, sizes: Sequence[int]) -> None:
        """Put in the key of a micro-batch's random masks; it holds the samples of all replicas."""
        first = self.ranks.dp_rank * sizes[i]
        self.ranks.draws.set(draw_key(self.seed, self.step, i), first)

    @contextmanager
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

    def _everywhere(self, loss: Tensor) -> Tensor:
        pipeline: Pipeline | None = self.module.pipeline
        if pipeline is not None:
            source = dist.get_global_rank(self.ranks.pp, pipeline.schedule.ranks[-1])
            dist.broadcast(loss, src=source, group=self.ranks.pp)
        dist.all_reduce(loss, group=self.ranks.dp)
        return loss / self.ranks.dp_world


def _part(values: Any, i: int, num: int) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.tensor_split(num)[i], values)
