"""What a rule says about one op: `Query` in, `Choice`s out; and the table of rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Node

from meshuffle.comm.primitives import is_run
from meshuffle.graph.node import is_tuple
from meshuffle.graph.runtime_ops import reorder
from meshuffle.layout.layout import (
    Layout,
    Replicate,
    Samples,
    Shard,
    Split,
    Varying,
    Window,
    splits,
)
from meshuffle.layout.program import Call

aten = torch.ops.aten

Kind = Literal["channel", "spatial", "batch", "any"]
Local = Callable[["Emitter"], Any]
"""Writes a rank's computation of an op."""


@dataclass(frozen=True)
class Choice:
    """One legal way to compute an op on all ranks.

    Attributes:
        inputs: the layout that each tensor of `Call.inputs` must have.
        output: the layout that the result then has; a tuple where the op has several results.
        split: the layout whose parts divide the work; None where every rank does all of it.
        kind: the dimension that is split, as a plan text names it.
        local: writes the rank's computation where it is not the same call on the rank's parts.
        sent_bytes: bytes that the op itself sends, over all ranks, forward and backward.
    """

    inputs: tuple[Layout, ...]
    output: Layout | tuple[Layout, ...]
    split: Split | None
    kind: Kind = "any"
    local: Local | None = field(default=None, compare=False)
    sent_bytes: int = 0


class Emitter(ABC):
    """Writes calls of one rank's module; `parallel.lower` makes it, rules use it.

    Attributes:
        given: the op's arguments by name, with the rank's values in place of tensors.
        rank: this rank's number along the `tp` axis.
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

        A size that follows the batch is −1, or where `exact` a value of the module.
        """

    @abstractmethod
    def fraction_of(self, layout: Split, size: int) -> Any:
        """Return the rank's part of a dim of `size`, as a fraction."""

    def take(self, x: Node, dim: int, positions: Sequence[int]) -> Node:
        """Add what takes some of the rank's own positions of a dim."""
        if is_run(tuple(positions)):
            return self.call(aten.slice.Tensor, x, dim, positions[0], positions[-1] + 1)
        return self.call(reorder, x, dim, tuple(positions))


@dataclass(frozen=True, eq=False)
class Query(Call):
    """What a rule is asked: one op, with the layouts that are worth trying.

    Attributes:
        wanted: layouts that readers of the result would like; a tuple where there are several.
        arriving: the layouts in which each input may arrive.
    """

    wanted: Sequence[Layout | tuple[Layout, ...]]
    arriving: Mapping[Node, Sequence[Layout]]

    def splits_of(
        self, x: Node, wanted: Iterable[Layout | tuple[Layout, ...] | None] | None = None
    ) -> Iterator[Split]:
        """Yield splits to try: as wanted, as an input arrives, by samples of that input.

        Args:
            wanted: layouts of `x` that suit the readers; None where it lies as the result does.
        """
        first = self.wanted if wanted is None else wanted
        return splits([*first, *self.arriving[x], self.samples(x)])

    def all_arriving(self) -> list[Layout]:
        """Return the layouts in which some input may arrive."""
        return [layout for node in self.inputs for layout in self.arriving[node]]

    def choice(
        self,
        inputs: Mapping[Any, Layout | None],
        output: Layout | tuple[Layout, ...],
        split: Split,
        *,
        rest: Layout = Varying(),  # noqa: B008  # frozen
        **facts: Any,
    ) -> Choice:
        """Return the choice that has some inputs in the given layouts, all others in `rest`."""
        layouts = tuple(inputs.get(node) or rest for node in self.inputs)
        return Choice(layouts, output, split, **facts)


Choices = Iterator[Choice]
Rule = Callable[[Query], Iterable[Choice]]

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

    Choices that fix which rank has which sample are left out: a step may have another number of
    samples.

    Args:
        wanted: see `Query`.
        arriving: the layouts in which each of `call.inputs` may arrive.
    """
    if call.packet not in RULES or call.node.name in call.program.pinned or call.world == 1:
        return []
    sources = dict(zip(call.inputs, arriving, strict=True))
    choices = dict.fromkeys(RULES[call.packet](Query(call.program, call.node, wanted, sources)))
    return [choice for choice in choices if _keeps_batch(call, choice)]


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
