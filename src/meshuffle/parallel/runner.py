"""What `Parallel` and its users need to know of a pipeline, without how it works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from meshuffle.planner.schedules import Schedule

Inputs = Callable[[int], tuple[Tensor, ...]]
Loss = Callable[[int, Any], Tensor]


class Runner(Protocol):
    """Runs the stages of a model that this rank holds; `pipeline.Pipeline` is one.

    Attributes:
        schedule: the order of stages and micro-batches, for all ranks.
    """

    schedule: Schedule

    @property
    def has_last(self) -> bool:
        """True on the ranks that compute the loss."""

    def train(
        self,
        sizes: Sequence[int],
        inputs: Inputs,
        loss: Loss,
        prepare: Callable[[int], None] = lambda _: None,
        before_last: Callable[[], None] = lambda: None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Go forward and backward through all micro-batches; gradients are added to `.grad`.

        Args:
            sizes: samples of each micro-batch of this replica.
            inputs: returns the model's inputs for a micro-batch; only the ranks of the first stage
                call it.
            loss: returns the loss of a micro-batch from the model's outputs; only the ranks of the
                last stage call it.
            prepare: is called with the micro-batch before each forward, to set its random numbers.
            before_last: is called before the last backward of this rank.
            around: makes the context in which each forward runs, for example autocast.
        """

    def whole(self, *inputs: Tensor) -> list[Tensor]:
        """Return the model's outputs for a batch of this replica, on all of its ranks."""

    def sum_tied(self) -> None:
        """Add up the gradients of parameters that several stages use, once a step."""

    def for_copy(self, module: nn.Module) -> Runner:
        """Return a runner of the same stages that calls `module`, a copy; for forwards alone."""
