"""What a rule says about one op: `Call` in, `Choice`s out; and the table of rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Node

from meshuffle.graph.node import is_tuple
from meshuffle.graph.runtime_ops import reorder
from meshuffle.layout.layout import Layout, Replicate, Samples, Shard, Split, Window
from meshuffle.layout.program import Call

aten = torch.ops.aten

Kind = Literal["channel", "spatial", "batch", "any"]


@dataclass(frozen=True)
class Choice:
    """One legal way to compute an op on all ranks.

    Attributes:
        inputs: how each tensor of `Call.inputs` must lie.
        output: how the result then lies; of an op with several results, one each.
        split: the layout whose parts divide the work; None where every rank does all of it.
        kind: the dimension that it prefers, as a plan text names it.
        local: writes the rank's computation where it is not the same call on the rank's parts.
        sent_bytes: what the op itself sends, over all ranks, forward and backward.
    """

    inputs: tuple[Layout, ...]
    output: Layout | tuple[Layout, ...]
    split: Split | None
    kind: Kind = "any"
    local: Callable[[Emitter], Any] | None = field(default=None, compare=False)
    sent_bytes: int = 0


class Emitter(ABC):
    """Writes calls of one rank's module; `parallel.lower` makes it, rules use it.

    Attributes:
        given: the op's arguments by name, with the rank's values in place of tensors.
        rank: along the `tp` axis.
    """

    given: dict[str, Any]
    rank: int

    @abstractmethod
    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a call of a function."""

    @abstractmethod
    def again(self, /, **changes: Any) -> Node:
        """Add the op itself, with some arguments changed."""

    @abstractmethod
    def sizes(self, *, exact: bool = False) -> list[Any]:
        """Return the sizes of the rank's part of the result.

        One that follows the batch is −1, or where `exact` a value of the module.
        """

    @abstractmethod
    def share(self, layout: Split, size: int) -> Any:
        """Return the rank's part of a dim of `size`, as a fraction."""

    def take(self, x: Node, dim: int, positions: Sequence[int]) -> Node:
        """Add what takes some of the rank's own positions of a dim."""
        first, last = positions[0], positions[-1]
        if list(positions) == list(range(first, last + 1)):
            return self.call(aten.slice.Tensor, x, dim, first, last + 1)
        return self.call(reorder, x, dim, tuple(positions))


Rule = Callable[[Call, Sequence[Layout], Sequence[Sequence[Layout]]], Iterable[Choice]]
"""(call, layouts that readers of the result want, layouts in which each input may arrive)."""

RULES: dict[Any, Rule] = {}
"""By ATen's packet, for example `torch.ops.aten.conv2d`."""


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the decorated rule for some ops."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def legal(call: Call, wanted: Sequence[Any], arriving: Sequence[Sequence[Layout]]) -> list[Choice]:
    """Return the choices of the op's rule, each once; none of an op that has no rule.

    Those that fix who has which sample are left out: how many there are is not known.
    """
    packet = call.packet
    if packet not in RULES or call.node.name in call.program.pinned or call.world == 1:
        return []
    found = dict.fromkeys(RULES[packet](call, wanted, arriving))
    return [choice for choice in found if _keeps_batch(call, choice)]


def _keeps_batch(call: Call, choice: Choice) -> bool:
    """Tell whether dims that follow the batch are split by samples, and no others."""
    outputs = choice.output if isinstance(choice.output, tuple) else (choice.output,)
    values = [*(node.meta["val"] for node in call.inputs), *call.results]
    for value, layout in zip(values, [*choice.inputs, *outputs], strict=True):
        if isinstance(layout, Samples) and not (
            call.has_samples and layout.dim == call.program.samples_dim_of(value)
        ):
            return False
        if isinstance(layout, Shard | Window) and not isinstance(value.shape[layout.dim], int):
            return False
    return True


def alike(call: Call, layout: Layout) -> Layout | tuple[Layout, ...]:
    """Return the output of a choice that puts the result, or each of several, in `layout`."""
    return (layout,) * len(call.results) if is_tuple(call.node) else layout


def replicated(call: Call) -> Choice:
    """Return the choice that is legal for every op: all of it on every rank."""
    return Choice((Replicate(),) * len(call.inputs), alike(call, Replicate()), None)
