"""What lowering writes: one rank's calls, what they send, and what crosses to the next stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx import Node

from meshuffle.graph.capture import named_tensors, tied_names
from meshuffle.layout.layout import Layout, Samples, Shard, even_size
from meshuffle.layout.program import Program
from meshuffle.parallel.batch_norm import SyncNorm
from meshuffle.planner.schedules import Action, Schedule


@dataclass
class Sent:
    """What one collective of a step sends, in bytes, by all `tp` ranks of one replica together."""

    name: str
    value: str
    forward: int
    backward: int


@dataclass(frozen=True)
class Crossing:
    """A value that one pipeline stage sends to the next, rank by rank of the `tp` axis.

    Attributes:
        node: of the whole program.
        layout: in which it is sent; its gradient comes back in the same parts.
        has_grad: whether one comes back.
    """

    node: Node
    layout: Layout
    has_grad: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the value, as it was captured."""
        found: torch.dtype = self.node.meta["val"].dtype
        return found

    def num_bytes(self, program: Program, rank: int, batch: int) -> int:
        """Return the bytes of a rank's part, of a micro-batch of `batch` samples."""
        return math.prod(self.shape(program, rank, batch)) * self.dtype.itemsize

    def shape(self, program: Program, rank: int, batch: int) -> tuple[int, ...]:
        """Return the sizes of a rank's part, of a micro-batch of `batch` samples."""
        fixed = program.graph.symbol is None
        sizes = list(program.graph.shape(self.node.meta["val"], None if fixed else batch))
        layout = self.layout
        if isinstance(layout, Shard):
            sizes[layout.dim] = len(layout.owners[rank])
        elif isinstance(layout, Samples):
            rows = sizes[layout.dim] // max(1, batch)
            sizes[layout.dim] = even_size(rank, program.world, batch) * rows
        return tuple(sizes)


@dataclass
class Code:
    """One rank's program, or its part of one pipeline stage.

    Attributes:
        graph: calls on this rank's parts; parameters by the model's own names.
        modules: conversions and draws that it calls, by name.
        stored: the layout of each parameter and buffer that is not whole, by the model's name.
        partial: parameters whose gradient on this rank is a term of a sum over the `tp` axis.
        sent: each collective, in order.
        reduced_bytes: what the reduction of `partial`'s gradients sends.
        sources: by name of a value of `graph`, the program's value and its layout.
        names: the parameters, buffers and constants that it reads.
        leaving: what it sends to the next stage, in order; it takes in what the one before sends,
            behind the number of samples.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module] = field(default_factory=dict)
    stored: dict[str, Shard] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    sent: list[Sent] = field(default_factory=list)
    reduced_bytes: int = 0
    sources: dict[str, tuple[str, Layout]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    leaving: list[Crossing] = field(default_factory=list)


def sent_across_cuts(
    codes: Sequence[Code], program: Program, schedule: Schedule, batch: int
) -> int:
    """Return what one replica's ranks send across cuts for a micro-batch, there and back."""
    return sum(
        crossing.num_bytes(program, rank, batch) * (1 + crossing.has_grad)
        for stage, code in enumerate(codes)
        for crossing in code.leaving
        for rank in range(program.world)
        if schedule.ranks[stage] != schedule.ranks[stage + 1]
    )


def predicted_bytes(
    codes: Sequence[Code], program: Program, schedule: Schedule, micro_batch: int, batch: int
) -> int:
    """Return what one replica's ranks send for a micro-batch of `batch` samples, in all stages.

    Where a backward is split in two, the one to the weights repeats that of each batch norm.
    """
    total = sent_across_cuts(codes, program, schedule, batch)
    for stage, code in enumerate(codes):
        asked = stage > 0 and any(crossing.has_grad for crossing in codes[stage - 1].leaving)
        is_split = Action(stage, "I", micro_batch) in schedule.orders[schedule.ranks[stage]]
        for sent in code.sent:
            twice = asked and is_split and isinstance(code.modules[sent.name], SyncNorm)
            total += sent.forward + sent.backward * (2 if twice else 1)
    return total


def stages_of(model: nn.Module, codes: Sequence[Code]) -> dict[str, frozenset[int]]:
    """Return the stages that read each parameter, buffer and constant, by all of its names."""
    found: dict[str, frozenset[int]] = {}
    for stage, code in enumerate(codes):
        for name in code.names:
            found[name] = found.get(name, frozenset()) | {stage}
    tied, names = tied_names(model), dict(named_tensors(model))
    return found | {n: found.get(tied.get(n, n), frozenset((0,))) for n in names}
